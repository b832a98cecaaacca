"""An engine in a thread of its own, for asyncio code that serves many callers at once."""

import asyncio
import collections
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from selfimprove_jax.sampling.requests import Request, Update

_logger = logging.getLogger(__name__)

# An engine whose steps fail so often in a row is taken for broken (its cache is donated to each
# step, and may be lost with one).
MAX_FAILURES = 3


class BusyError(Exception):
  """As many requests wait as may; later there may be room."""


class StoppedError(Exception):
  """The service takes and finishes no more requests; with the reason."""


class EngineError(Exception):
  """The engine failed while it worked on a request; with the reason."""


class EngineService:
  """Runs an engine's steps as long as there is work; requests share its batch.

  Its own thread is the only one that touches the engine. A step that raises fails the requests in
  the engine, with the reason; after `MAX_FAILURES` in a row the service stops.
  """

  def __init__(self, engine: Any, *, max_waiting: int):
    """Args:
      engine: an `Engine`, which nobody else uses from now on.
      max_waiting: requests beyond the engine's slots that may wait; at least 0.

    Raises:
      ValueError: `max_waiting` is negative.
    """
    if max_waiting < 0:
      raise ValueError(f"max_waiting is {max_waiting}; it must be at least 0")
    self.max_requests = engine.num_slots + max_waiting
    self._engine = engine
    # What other threads ask of the engine's; all of these are read and written under the lock.
    self._lock = threading.Condition()
    self._commands: collections.deque[Callable[[], None]] = collections.deque()
    self._num_requests = 0
    self._stopped: str | None = None
    self._counts = collections.Counter()
    self._engine_stats = dict(engine.stats())
    self._num_running = 0
    # Of the engine's thread alone: the tickets of each stream, by their numbers in it.
    self._tickets: dict[Stream, dict[int, int]] = {}
    self._num_failures = 0
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._thread.start()

  @property
  def stopped(self) -> str | None:
    """Why it takes no more requests, or None."""
    with self._lock:
      return self._stopped

  def stats(self) -> dict[str, dict[str, Any]]:
    """Counters and numbers of now: `requests` by how they ended, `now`, and the engine's own."""
    with self._lock:
      now = {
        "running": self._num_running,
        "waiting": max(0, self._num_requests - self._num_running),
      }
      return {"requests": dict(self._counts), "now": now, "engine": dict(self._engine_stats)}

  async def submit(self, requests: Sequence[Request]) -> "Stream":
    """Gives requests to the engine, one after another, all or none.

    Use the stream in an `async with`: leaving it early cancels what still runs.

    Raises:
      ValueError: the engine can never run one of them, or they are more than may wait at all.
      BusyError: there is no room for them now.
      StoppedError: the service has been stopped.
    """
    if len(requests) > self.max_requests:
      raise ValueError(f"{len(requests)} completions at once; at most {self.max_requests} may be")
    stream = Stream(self, len(requests))
    with self._lock:
      if self._stopped is not None:
        raise StoppedError(self._stopped)
      if self._num_requests + len(requests) > self.max_requests:
        self._counts["busy"] += len(requests)
        raise BusyError(f"{self._num_requests} requests run or wait, and no more may")
      self._num_requests += len(requests)
      self._command(functools.partial(self._begin, stream, list(requests)))
    try:
      await stream.accepted
    except asyncio.CancelledError:
      stream.cancel()
      raise
    return stream

  def cancel(self, stream: "Stream") -> None:
    """Ends the requests of a stream that still run; nothing more comes of it."""
    with self._lock:
      self._command(functools.partial(self._cancel, stream))

  def close(self, reason: str = "the service is shut down") -> None:
    """Fails the requests that still run, and ends the thread; waits for the step under way."""
    self._stop(reason)
    self._thread.join()

  def _command(self, command):
    self._commands.append(command)
    self._lock.notify()

  def _stop(self, reason):
    with self._lock:
      self._stopped = self._stopped or reason
      self._lock.notify()

  # What follows runs in the engine's thread.

  def _run(self):
    while self._wait_for_work():
      try:
        while command := self._next_command():
          command()
        self._engine.step()
        self._num_failures = 0
      except Exception as error:  # whatever a step may raise: callers get it, and others go on
        self._step_failed(error)
      self._publish()
    self._fail_all(StoppedError(self.stopped))
    while command := self._next_command():
      command()

  def _wait_for_work(self):
    with self._lock:
      while not (self._commands or self._stopped is not None or self._has_work()):
        self._lock.wait()
      return self._stopped is None

  def _has_work(self):
    return self._engine.num_running + self._engine.num_waiting > 0

  def _next_command(self):
    with self._lock:
      return self._commands.popleft() if self._commands else None

  def _begin(self, stream, requests):
    if (stopped := self.stopped) is not None:
      self._release(len(requests))
      stream.accept(StoppedError(stopped))
      return
    tickets = self._tickets[stream] = {}
    try:
      for index, request in enumerate(requests):
        on_update = functools.partial(self._update, stream, index)
        tickets[index] = self._engine.submit(request, on_update)
    except ValueError as error:
      self._release(len(requests) - len(tickets))
      self._cancel(stream)
      stream.accept(error)
    except Exception:
      self._release(len(requests) - len(tickets))
      raise
    else:
      stream.accept(None)

  def _update(self, stream: "Stream", index: int, update: Update):
    tickets = self._tickets.get(stream)
    if tickets is None:  # cancelled
      return
    if update.completion is not None:
      del tickets[index]
      if not tickets:
        del self._tickets[stream]
      self._release(1, update.completion.finish_reason)  # first: the caller may ask for more
    stream.put((index, update))

  def _cancel(self, stream):
    tickets = self._tickets.pop(stream, {})
    for ticket in tickets.values():
      self._engine.cancel(ticket)
    self._release(len(tickets), "cancelled")

  def _release(self, number, outcome=None):
    with self._lock:
      self._num_requests -= number
      if outcome is not None and number:
        self._counts[outcome] += number

  def _step_failed(self, error):
    _logger.exception("a step of the engine failed")
    reason = f"{type(error).__name__}: {error}"
    self._num_failures += 1
    if not self._fail_all(EngineError(reason)) or self._num_failures >= MAX_FAILURES:
      self._stop(f"the engine has failed: {reason}")

  def _fail_all(self, error):
    """Whether the engine let go of all that it had."""
    let_go = True
    for stream, tickets in list(self._tickets.items()):
      del self._tickets[stream]
      for ticket in tickets.values():
        try:
          self._engine.cancel(ticket)
        except Exception:
          _logger.exception("the engine cannot cancel a request")
          let_go = False
      self._release(len(tickets), "error")
      stream.accept(error)
      stream.put(error)
    return let_go

  def _publish(self):
    stats, running = dict(self._engine.stats()), self._engine.num_running
    with self._lock:
      self._engine_stats, self._num_running = stats, running


class Stream:
  """Updates of requests that were submitted together, each with the number of its request.

  It ends after the last update of each request; where they end early, `EngineError` or
  `StoppedError` is raised from it.
  """

  def __init__(self, service: EngineService, num_requests: int):
    self._service = service
    self._num_open = num_requests
    self._loop = asyncio.get_running_loop()
    self._queue: asyncio.Queue = asyncio.Queue()
    self.accepted: asyncio.Future[None] = self._loop.create_future()

  def __aiter__(self) -> "Stream":
    return self

  async def __anext__(self) -> tuple[int, Update]:
    if not self._num_open:
      raise StopAsyncIteration
    item = await self._queue.get()
    if isinstance(item, Exception):
      self._num_open = 0
      raise item
    self._num_open -= item[1].completion is not None
    return item

  async def __aenter__(self) -> "Stream":
    return self

  async def __aexit__(self, *_) -> None:
    self.cancel()

  def cancel(self) -> None:
    """Ends what still runs."""
    if self._num_open:
      self._num_open = 0
      self._service.cancel(self)

  def accept(self, error: Exception | None) -> None:
    """For the service: `submit` returns, or raises the error, unless it already has."""
    self._in_loop(self._accept, error)

  def put(self, item: tuple[int, Update] | Exception) -> None:
    """For the service: what comes next."""
    self._in_loop(self._queue.put_nowait, item)

  def _accept(self, error):
    if self.accepted.done():
      return
    if error is None:
      self.accepted.set_result(None)
    else:
      self.accepted.set_exception(error)

  def _in_loop(self, function, argument):
    try:
      self._loop.call_soon_threadsafe(function, argument)
    except RuntimeError:  # the loop has ended, and with it the caller
      _logger.debug("nobody waits for %s", argument)
