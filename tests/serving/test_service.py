"""Many callers of one engine: their updates, refusals, and failing steps."""

import asyncio
import contextlib
import threading
import time

import pytest

from selfimprove_jax.sampling.requests import Completion, Request, Update
from selfimprove_jax.serving import service
from selfimprove_jax.serving.service import BusyError, EngineError, EngineService, StoppedError


class Counter:
  """A fake engine whose model counts up from the prompt.

  A step acquires `gate`, if it is set, and raises the next error of `fail`, if it is not None.
  """

  def __init__(self, num_slots=2):
    self.num_slots = num_slots
    self.max_length = 100
    self.gate: threading.Semaphore | None = None
    self.fail: list[Exception | None] = []
    self.fail_cancel = False
    self.threads, self.cancelled, self.most_running = set(), [], 0
    self._queue, self._slots, self._next = [], {}, 0

  num_running = property(lambda self: len(self._slots))
  num_waiting = property(lambda self: len(self._queue))

  def stats(self):
    return {"new_tokens": 7}

  def submit(self, request, on_update=None):
    self.threads.add(threading.current_thread())
    if request.max_new_tokens > self.max_length:
      raise ValueError(f"max_new_tokens is {request.max_new_tokens}; the window is 100")
    self._next += 1
    self._queue.append((self._next, request, on_update))
    return self._next

  def cancel(self, ticket):
    if self.fail_cancel:
      raise RuntimeError("the cache is gone")
    self.cancelled.append(ticket)
    self._queue = [entry for entry in self._queue if entry[0] != ticket]
    self._slots.pop(ticket, None)

  def step(self):
    self.threads.add(threading.current_thread())
    if self.gate is not None:
      self.gate.acquire()
    if self.fail and (error := self.fail.pop(0)):
      raise error
    while self._queue and len(self._slots) < self.num_slots:
      ticket, request, on_update = self._queue.pop(0)
      self._slots[ticket] = (request, on_update, [])
    self.most_running = max(self.most_running, len(self._slots))
    for ticket, (request, on_update, tokens) in list(self._slots.items()):
      tokens.append(request.prompt[-1] + len(tokens) + 1)
      done = len(tokens) == request.max_new_tokens
      completion = Completion(list(tokens), "length") if done else None
      if done:
        del self._slots[ticket]
      on_update(Update(tokens[-1:], None, None, completion))
    return []


def _request(first=0, num_tokens=3):
  return Request(prompt=[first], max_new_tokens=num_tokens)


async def _collect(served, *requests):
  tokens = {index: [] for index in range(len(requests))}
  async with await served.submit(requests) as stream:
    async for index, update in stream:
      tokens[index] += update.tokens
      if update.completion:
        assert update.completion.tokens == tokens[index]
  return list(tokens.values())


@contextlib.contextmanager
def _serving(engine, max_waiting=100):
  served = EngineService(engine, max_waiting=max_waiting)
  try:
    yield served
  finally:
    if engine.gate is not None:
      engine.gate.release(1000)
      engine.gate = None
    served.close()
  assert not served._thread.is_alive()


async def _until(condition):
  for _ in range(1000):
    if condition():
      return
    await asyncio.sleep(0.005)
  raise AssertionError("never happened")


def test_callers_get_their_own_tokens_and_share_the_batch():
  engine = Counter(num_slots=8)

  async def main(served):
    return await asyncio.gather(*(_collect(served, _request(100 * i, 5)) for i in range(30)))

  with _serving(engine) as served:
    results = asyncio.run(main(served))
    assert served.stats()["requests"] == {"length": 30}
  assert results == [[[100 * i + k for k in range(1, 6)]] for i in range(30)]
  assert engine.most_running == 8
  assert engine.threads == {served._thread}


def test_requests_given_together_come_in_one_stream():
  with _serving(Counter()) as served:
    tokens = asyncio.run(_collect(served, _request(0, 2), _request(10, 4), _request(20, 1)))
  assert tokens == [[1, 2], [11, 12, 13, 14], [21]]


def test_updates_come_as_they_are_made():
  engine = Counter()
  engine.gate = threading.Semaphore(0)

  async def main(served):
    async with await served.submit([_request(0, 3)]) as stream:
      for expected in (1, 2, 3):
        engine.gate.release()
        assert (await anext(stream))[1].tokens == [expected]
      with pytest.raises(StopAsyncIteration):
        await anext(stream)

  with _serving(engine) as served:
    asyncio.run(main(served))
  assert engine.cancelled == []


def test_request_that_can_never_run_is_refused_and_its_companions_with_it():
  engine = Counter()

  async def main(served):
    with pytest.raises(ValueError, match="max_new_tokens is 101"):
      await served.submit([_request(), _request(num_tokens=101)])
    assert await _collect(served, _request()) == [[1, 2, 3]]
    await _until(lambda: served.stats()["now"] == {"running": 0, "waiting": 0})

  with _serving(engine) as served:
    asyncio.run(main(served))
  assert engine.cancelled == [1]


def test_requests_beyond_the_queue_are_refused_until_there_is_room():
  engine = Counter(num_slots=2)
  engine.gate = threading.Semaphore(0)

  async def main(served):
    tasks = [asyncio.create_task(_collect(served, _request(10 * i))) for i in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(BusyError, match="3 requests"):
      await served.submit([_request()])
    with pytest.raises(ValueError, match="at most 3"):
      await served.submit([_request()] * 4)
    engine.gate.release(100)
    assert await asyncio.gather(*tasks) == [[[1, 2, 3]], [[11, 12, 13]], [[21, 22, 23]]]
    assert await _collect(served, _request()) == [[1, 2, 3]]

  with _serving(engine, max_waiting=1) as served:
    asyncio.run(main(served))
    assert served.stats()["requests"] == {"busy": 1, "length": 4}


def test_leaving_a_stream_frees_its_slot():
  engine = Counter(num_slots=1)
  engine.gate = threading.Semaphore(0)

  async def main(served):
    async with await served.submit([_request(0, 90), _request(5, 90)]) as stream:
      engine.gate.release()
      await anext(stream)
    waiting = asyncio.create_task(_collect(served, _request(50)))
    await asyncio.sleep(0)
    engine.gate.release(5)
    assert await asyncio.wait_for(waiting, 10) == [[51, 52, 53]]

  with _serving(engine) as served:
    asyncio.run(main(served))
    assert served.stats()["requests"] == {"cancelled": 2, "length": 1}
  assert engine.cancelled == [1, 2]


def test_caller_that_is_cancelled_while_it_waits_to_be_taken_leaves_nothing_behind():
  engine = Counter(num_slots=1)
  engine.gate = threading.Semaphore(0)

  async def main(served):
    first = asyncio.create_task(_collect(served, _request()))
    await _until(lambda: engine.num_waiting)  # the engine's thread is now in a step
    second = asyncio.create_task(served.submit([_request(10, 90)]))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
      await second
    engine.gate.release(100)
    assert await first == [[1, 2, 3]]
    await _until(lambda: not any(served.stats()["now"].values()))

  with _serving(engine) as served:
    asyncio.run(main(served))
  assert engine.cancelled == [2]


def test_failing_step_fails_those_in_the_engine_and_no_other():
  engine = Counter()
  engine.fail = [None, ValueError("NaN everywhere")]

  async def main(served):
    with pytest.raises(EngineError, match="ValueError: NaN everywhere"):
      await _collect(served, _request())
    assert await _collect(served, _request()) == [[1, 2, 3]]

  with _serving(engine) as served:
    asyncio.run(main(served))
    assert served.stopped is None
    assert served.stats()["requests"] == {"error": 1, "length": 1}


def test_engine_that_only_fails_is_stopped_with_the_reason():
  engine = Counter()
  engine.fail = [RuntimeError("out of memory")] * service.MAX_FAILURES

  async def main(served):
    for _ in range(service.MAX_FAILURES):
      with pytest.raises(EngineError, match="out of memory"):
        await _collect(served, _request())
    await _until(lambda: served.stopped)
    with pytest.raises(StoppedError, match="the engine has failed: RuntimeError: out of memory"):
      await _collect(served, _request())

  with _serving(engine) as served:
    asyncio.run(main(served))


def test_engine_that_cannot_let_go_is_stopped():
  engine = Counter()
  engine.fail, engine.fail_cancel = [RuntimeError("lost")], True

  async def main(served):
    with pytest.raises(EngineError, match="lost"):
      await _collect(served, _request())
    await _until(lambda: served.stopped)

  with _serving(engine) as served:
    asyncio.run(main(served))


def test_closing_fails_what_runs_and_takes_no_more():
  engine = Counter(num_slots=1)
  engine.gate = threading.Semaphore(0)

  async def main(served):
    tasks = [asyncio.create_task(_collect(served, _request(0, 90))) for _ in range(3)]
    await _until(lambda: engine.num_waiting)
    closing = asyncio.create_task(asyncio.to_thread(served.close, "good night"))
    await _until(lambda: served.stopped)
    engine.gate.release(2)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
      assert isinstance(result, StoppedError) and str(result) == "good night"
    await closing
    with pytest.raises(StoppedError, match="good night"):
      await served.submit([_request()])

  with _serving(engine) as served:
    asyncio.run(main(served))
  assert engine.num_running == engine.num_waiting == 0


def test_idle_service_uses_no_processor_time():
  with _serving(Counter()) as served:
    asyncio.run(_collect(served, _request()))
    began = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - began < 0.1


def test_caller_whose_loop_has_ended_harms_nobody():
  engine = Counter()
  engine.gate = threading.Semaphore(0)

  async def leave(served):
    await served.submit([_request(0, 5)])

  with _serving(engine) as served:
    asyncio.run(leave(served))
    engine.gate.release(100)
    assert asyncio.run(_collect(served, _request())) == [[1, 2, 3]]


def test_negative_max_waiting_is_refused():
  with pytest.raises(ValueError, match="max_waiting is -1"):
    EngineService(Counter(), max_waiting=-1)
