"""Runs an engine in its own thread, for asyncio code that serves many callers at once."""

import asyncio
import collections
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from selfimprove_jax.sampling.requests import ContinuationScore, Request, ScoreRequest, Update

_logger = logging.getLogger(__name__)

# Number of failed steps in a row after which the engine is considered broken: its cache is donated
# to each step, and may be lost when one fails.
MAX_FAILURES = 3


class BusyError(Exception):
  """The queue is full; try again later."""


class StoppedError(Exception):
  """The service has stopped, and finishes no more requests; the message is the reason."""


class EngineError(Exception):
  """The engine failed during a request; the message is the reason."""


class EngineService:
  """Runs an engine's steps as long as there is work; all callers share its batch.

  Only the service's own thread touches the engine. A step that raises fails the requests in the
  engine; after `MAX_FAILURES` such steps in a row the service stops.
  """

  def __init__(self, engine: Any, *, max_waiting: int):
    """Args:
      engine: an `Engine`, for the use of the service alone.
      max_waiting: requests that may wait, in addition to the engine's slots.

    Raises:
      ValueError: `max_waiting` is negative.
    """
    if max_waiting < 0:
      raise ValueError(f"max_waiting is {max_waiting}; it must be at least 0")
    self.max_requests = engine.num_slots + max_waiting
    self._engine = engine
    # Shared between threads: read and written under the lock.
    self._lock = threading.Condition()
    self._commands: collections.deque[Callable[[], None]] = collections.deque()
    self._num_requests = 0
    self._stopped: str | None = None
    self._counts = collections.Counter()
    self._engine_stats = dict(engine.stats())
    self._num_running = 0
    # Used by the engine's thread alone: the tickets of each stream, by request index.
    self._tickets: dict[Stream, dict[int, int]] = {}
    self._num_failures = 0
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
    self._thread.start()

  @property
  def stopped(self) -> str | None:
    """The reason why it has stopped, or None."""
    with self._lock:
      return self._stopped

  def stats(self) -> dict[str, dict[str, Any]]:
    """Returns counts of `requests` by outcome, gauges of `now`, and the counts of the `engine`."""
    with self._lock:
      now = {
        "running": self._num_running,
        "waiting": max(0, self._num_requests - self._num_running),
      }
      return {"requests": dict(self._counts), "now": now, "engine": dict(self._engine_stats)}

  async def submit(self, requests: Sequence[Request]) -> "Stream":
    """Submits requests to the engine, all or none.

    Use the stream in an `async with`: leaving it early cancels its requests.

    Raises:
      ValueError: the engine can never run one of them, or there are more than the queue can hold.
      BusyError: the queue has no room for them now.
      StoppedError: the service has stopped.
    """
    if len(requests) > self.max_requests:
      raise ValueError(
        f"{len(requests)} completions at once; at most {self.max_requests} are possible"
      )
    stream = Stream(self, len(requests))
    with self._lock:
      if self._stopped is not None:
        raise StoppedError(self._stopped)
      if self._num_requests + len(requests) > self.max_requests:
        self._counts["busy"] += len(requests)
        raise BusyError(
          f"{self._num_requests} requests run or wait, of at most {self.max_requests}"
        )
      self._num_requests += len(requests)
      self._command(functools.partial(self._begin, stream, list(requests)))
    try:
      await stream.accepted
    except asyncio.CancelledError:
      stream.cancel()
      raise
    return stream

  async def score(self, requests: Sequence[ScoreRequest]) -> list[ContinuationScore]:
    """Scores continuations between two steps of the engine.

    Raises:
      StoppedError: the service has stopped.
      EngineError: scoring failed.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[ContinuationScore]] = loop.create_future()

    def settle(result: list[ContinuationScore] | Exception) -> None:
      if found.done():  # the caller has gone
        return
      if isinstance(result, Exception):
        found.set_exception(result)
      else:
        found.set_result(result)

    def work() -> None:
      result: list[ContinuationScore] | Exception
      try:
        stopped = self.stopped
        result = list(self._engine.score(requests)) if stopped is None else StoppedError(stopped)
      except Exception as error:  # it fails alone
        result = EngineError(f"{type(error).__name__}: {error}")
      loop.call_soon_threadsafe(settle, result)

    with self._lock:
      if self._stopped is not None:
        raise StoppedError(self._stopped)
      self._command(work)
    return await found

  def cancel(self, stream: "Stream") -> None:
    """Cancels the unfinished requests of a stream, which yields nothing more."""
    with self._lock:
      self._command(functools.partial(self._cancel, stream))

  def close(self, reason: str = "the service is shut down") -> None:
    """Fails unfinished requests and ends the thread; waits for the current step."""
    self._stop(reason)
    self._thread.join()

  def _command(self, command: Callable[[], None]) -> None:
    self._commands.append(command)
    self._lock.notify()

  def _stop(self, reason: str) -> None:
    with self._lock:
      self._stopped = self._stopped or reason
      self._lock.notify()

  # The methods below run in the engine's thread.

  def _run(self) -> None:
    while self._wait_for_work():
      try:
        while command := self._next_command():
          command()
        self._engine.step()
        self._num_failures = 0
      except Exception as error:  # callers get it; the service continues
        self._step_failed(error)
      self._publish()
    self._fail_all(StoppedError(self.stopped))
    while command := self._next_command():
      command()

  def _wait_for_work(self) -> bool:
    with self._lock:
      while not (self._commands or self._stopped is not None or self._has_work()):
        self._lock.wait()
      return self._stopped is None

  def _has_work(self) -> bool:
    return self._engine.num_running + self._engine.num_waiting > 0

  def _next_command(self) -> Callable[[], None] | None:
    with self._lock:
      return self._commands.popleft() if self._commands else None

  def _begin(self, stream: "Stream", requests: Sequence[Request]) -> None:
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

  def _update(self, stream: "Stream", index: int, update: Update) -> None:
    tickets = self._tickets.get(stream)
    if tickets is None:  # cancelled
      return
    if update.completion is not None:
      del tickets[index]
      if not tickets:
        del self._tickets[stream]
      # Before `put`: the caller may submit again at once.
      self._release(1, update.completion.finish_reason)
    stream.put((index, update))

  def _cancel(self, stream: "Stream") -> None:
    tickets = self._tickets.pop(stream, {})
    for ticket in tickets.values():
      self._engine.cancel(ticket)
    self._release(len(tickets), "cancelled")

  def _release(self, number: int, outcome: str | None = None) -> None:
    with self._lock:
      self._num_requests -= number
      if outcome is not None and number:
        self._counts[outcome] += number

  def _step_failed(self, error: Exception) -> None:
    _logger.exception("a step of the engine failed")
    reason = f"{type(error).__name__}: {error}"
    self._num_failures += 1
    if not self._fail_all(EngineError(reason)) or self._num_failures >= MAX_FAILURES:
      self._stop(f"the engine has failed: {reason}")

  def _fail_all(self, error: Exception) -> bool:
    """Fails all requests; returns whether the engine could cancel them."""
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

  def _publish(self) -> None:
    stats, running = dict(self._engine.stats()), self._engine.num_running
    with self._lock:
      self._engine_stats, self._num_running = stats, running


class Stream:
  """Async iterator of (request index, update) for requests that were submitted together.

  It ends after the last update of each request. If the engine fails or the service stops,
  `EngineError` or `StoppedError` is raised from it.
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
    """Cancels the unfinished requests."""
    if self._num_open:
      self._num_open = 0
      self._service.cancel(self)

  def accept(self, error: Exception | None) -> None:
    """Called by the service: makes `submit` return or raise, if it still waits."""
    self._in_loop(self._accept, error)

  def put(self, item: tuple[int, Update] | Exception) -> None:
    """Called by the service: the next item."""
    self._in_loop(self._queue.put_nowait, item)

  def _accept(self, error: Exception | None) -> None:
    if self.accepted.done():
      return
    if error is None:
      self.accepted.set_result(None)
    else:
      self.accepted.set_exception(error)

  def _in_loop(self, function: Callable[[Any], None], argument: Any) -> None:
    try:
      self._loop.call_soon_threadsafe(function, argument)
    except RuntimeError:  # the event loop has ended, and with it the caller
      _logger.debug("nobody waits for %s", argument)
