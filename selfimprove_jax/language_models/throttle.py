"""Keeps calls within what an endpoint allows: how many at once, how many and how long a minute."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable

_BURST_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What an endpoint allows; None for no limit.

  In any minute at most 1/60 more than a limit is sent, besides one request that alone exceeds it.

  Attributes:
    max_concurrent: calls under way at once. It is halved each time the endpoint says that it has
      too much to do, and grows back with the calls that succeed.
    requests_per_minute: calls.
    tokens_per_minute: of prompts and completions together; a completion counts as `max_tokens`
      until it is there.
    input_tokens_per_minute, output_tokens_per_minute: of each alone.
  """

  max_concurrent: int = 32
  requests_per_minute: float | None = None
  tokens_per_minute: float | None = None
  input_tokens_per_minute: float | None = None
  output_tokens_per_minute: float | None = None

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value is not None and value <= 0:
        raise ValueError(f"{name} is {value}; it must be more than 0, or None for no limit")


class Throttle:
  """First come, first served; used within one event loop."""

  def __init__(
    self,
    limits: Limits,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
  ):
    """Args:
    clock, sleep: time in seconds, and what waits for it to pass.
    """
    self._clock, self._sleep = clock, sleep
    self._max = self._allowed = float(limits.max_concurrent)
    self._running = 0
    self._resume_at = 0.0
    self._turn = asyncio.Lock()
    self._changed = asyncio.Event()
    # Each with what a call of (input, output) tokens takes from it.
    self._buckets: list[tuple[_Bucket, Callable[[int, int], int]]] = [
      (_Bucket(per_minute, clock), amount)
      for per_minute, amount in (
        (limits.requests_per_minute, lambda i, o: 1),
        (limits.tokens_per_minute, lambda i, o: i + o),
        (limits.input_tokens_per_minute, lambda i, o: i),
        (limits.output_tokens_per_minute, lambda i, o: o),
      )
      if per_minute is not None
    ]

  @contextlib.asynccontextmanager
  async def slot(
    self, input_tokens: int, output_tokens: int
  ) -> AsyncIterator[Callable[[int, int], None]]:
    """Waits until a call may be made and lasts as long as it is under way.

    Gives a function to be told how many tokens the call took in the end.
    """
    async with self._turn:
      while (wait := self._seconds_to_wait(input_tokens, output_tokens)) != 0:
        if wait is None:
          self._changed.clear()
          await self._changed.wait()
        else:
          await self._sleep(wait)
      self._running += 1
      for bucket, amount in self._buckets:
        bucket.take(amount(input_tokens, output_tokens))

    def took(actual_input: int, actual_output: int) -> None:
      for bucket, amount in self._buckets:
        bucket.take(amount(actual_input, actual_output) - amount(input_tokens, output_tokens))

    try:
      yield took
    finally:
      self._running -= 1
      self._changed.set()

  def succeeded(self) -> None:
    """A call was answered: a little more may be under way at once."""
    self._allowed = min(self._max, self._allowed + 1 / self._allowed)
    self._changed.set()

  def cool_down(self, seconds: float) -> None:
    """The endpoint has too much to do: nothing is sent for so long, then half as much at once."""
    now = self._clock()
    if now >= self._resume_at:  # of many calls refused at once, the first halves
      self._allowed = max(1.0, self._allowed / 2)
    self._resume_at = max(self._resume_at, now + seconds)

  @property
  def allowed(self) -> int:
    """How many calls may be under way at once now."""
    return int(self._allowed)

  def _seconds_to_wait(self, input_tokens, output_tokens):
    """0 to go on now; None until another call has ended."""
    if self._running >= self.allowed:
      return None
    waits = [b.seconds_until(amount(input_tokens, output_tokens)) for b, amount in self._buckets]
    return max(0.0, self._resume_at - self._clock(), *waits)


class _Bucket:
  """Fills at a steady rate up to a second's worth; what takes more than is in it leaves a debt."""

  def __init__(self, per_minute, clock):
    self._rate = per_minute / 60
    self._capacity = max(1.0, self._rate * _BURST_SECONDS)
    self._level = self._capacity
    self._clock = clock
    self._at = clock()

  def seconds_until(self, amount):
    now = self._clock()
    self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
    self._at = now
    missing = min(amount, self._capacity) - self._level
    # Times are rounded: what is missing by a billionth is there.
    return missing / self._rate if missing > 1e-9 * self._capacity else 0.0

  def take(self, amount):
    self._level = min(self._capacity, self._level - amount)
