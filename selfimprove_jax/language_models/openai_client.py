"""Calls to an OpenAI-compatible API: the official client, retries, and rate limits."""

import asyncio
import contextlib
import dataclasses
import datetime
import email.utils
import itertools
import json
import logging
import os
import random
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
Call = Callable[[Any, dict[str, Any]], Awaitable[Any]]
"""Maps the client with raw responses, and headers to add, to a response."""

_logger = logging.getLogger(__name__)

# Statuses that a later attempt may not get. From 520 on they are a proxy's, not the API's.
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
_OVERLOADED = {429, 503, 529}
_SHOWN_CHARACTERS = 300
# Servers without authentication are often given a word such as EMPTY. Redacting that would change
# replies that contain the word.
_LEAST_SECRET_CHARACTERS = 16
_BURST_SECONDS = 1.0
_MAX_BODY_BYTES = 2**30


class EndpointError(RuntimeError):
  """A failure that every other request would have too, such as a refused key.

  Attributes:
    billed: whether the endpoint may charge for the failed call.
  """

  def __init__(self, message: str, *, billed: bool = False) -> None:
    super().__init__(message)
    self.billed = billed


class RequestError(Exception):
  """The endpoint refuses this request, with an HTTP status, and would refuse it again."""

  billed = False

  def __init__(self, message: str, *, status: int) -> None:
    super().__init__(message)
    self.status = status


class AttemptError(Exception):
  """One attempt failed; another may succeed.

  Attributes:
    billed: whether the endpoint may have done the work, and may charge for it.
    overloaded: whether the endpoint says that it is overloaded or that a rate limit was hit.
    retry_after: seconds that the endpoint asks to wait, or None.
  """

  def __init__(
    self,
    message: str,
    *,
    billed: bool,
    overloaded: bool = False,
    retry_after: float | None = None,
  ) -> None:
    super().__init__(message)
    self.billed, self.overloaded, self.retry_after = billed, overloaded, retry_after


def _check_positive(config: Any) -> None:
  for name, value in dataclasses.asdict(config).items():
    if value is not None and value <= 0:
      raise ValueError(f"{name} is {value}; it must be more than 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeouts:
  """Limits in seconds: for connecting, for a silence, and for one attempt.

  A reply arrives whole, so `read` also limits how long a model may write.
  """

  connect: float = 10.0
  read: float = 600.0
  total: float = 900.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retries:
  """Exponential backoff with full jitter.

  The wait after attempt n is uniform in [0, min(max_seconds, initial_seconds * 2**(n - 1))], and at
  least what the endpoint asks for (Retry-After).

  Attributes:
    max_attempts: attempts per request.
    max_retry_after_seconds: a longer Retry-After ends the run.
    max_failures_in_a_row: the run ends when this many requests in a row failed in all attempts.
  """

  max_attempts: int = 6
  initial_seconds: float = 1.0
  max_seconds: float = 60.0
  max_retry_after_seconds: float = 900.0
  max_failures_in_a_row: int = 64

  __post_init__ = _check_positive

  def seconds(self, attempt: int) -> float:
    """Draws the wait after an attempt; the first one is 1."""
    return random.uniform(0, min(self.max_seconds, self.initial_seconds * 2 ** (attempt - 1)))


async def with_retries(attempt: Callable[[], Awaitable[T]], retries: Retries) -> T:
  """Calls `attempt` until it succeeds, and returns its result.

  Raises:
    AttemptError: the last attempt failed too; the message has the number of attempts.
    EndpointError: the endpoint asks for a longer wait than is allowed.
  """
  for number in itertools.count(1):
    try:
      return await attempt()
    except AttemptError as error:
      asked = error.retry_after or 0.0
      if asked > retries.max_retry_after_seconds:
        raise EndpointError(f"{error}; it asks to wait {asked:.0f} s: run again then") from None
      if number == retries.max_attempts:
        message = f"{error} (after {number} attempts)"
        raise AttemptError(message, billed=error.billed) from None
      seconds = max(asked, retries.seconds(number))
      _logger.info("%s; attempt %d follows in %.1f s", error, number + 1, seconds)
      await asyncio.sleep(seconds)


class OpenAIClient:
  """One endpoint's `openai.AsyncOpenAI`, used in one event loop; no message contains the key.

  The client's own retries are switched off, because each attempt needs an entry in the ledger and
  counts against the rate limits.
  """

  def __init__(self, base_url: str, *, api_key_env: str | None, timeouts: Timeouts) -> None:
    """Reads the key and creates the client.

    Args:
      api_key_env: environment variable that holds the key; None for an endpoint without one.

    Raises:
      ValueError: the variable is not set or holds no key; or `base_url` is not a plain URL.
    """
    import openai

    url = urllib.parse.urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.query:
      # The URL is not shown, since a part that does not belong there may be a key.
      raise ValueError(
        "base_url must be like https://host/v1, without a user, a password or a query"
      )
    self._key = "" if api_key_env is None else os.environ.get(api_key_env, "").strip()
    if api_key_env is not None and not self._key:
      raise ValueError(f"the environment variable {api_key_env}, which holds the key, is not set")
    if not (self._key.isascii() and self._key.isprintable()):
      raise ValueError(f"the key in {api_key_env} has characters that are not allowed in a key")
    self.base_url = base_url.rstrip("/")
    self._key_name = api_key_env
    self._timeouts = timeouts
    # The client insists on a key. Without ours it would send OPENAI_API_KEY to any endpoint.
    self._headers = {} if self._key else {"Authorization": openai.Omit()}
    self._client = openai.AsyncOpenAI(
      base_url=self.base_url,
      api_key=self._key or "none",
      max_retries=0,
      timeout=openai.Timeout(timeouts.read, connect=timeouts.connect, pool=None),
      # A compressed body of a megabyte may unpack to gigabytes.
      default_headers={"Accept-Encoding": "identity"},
      http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [_bound_body]}),
    )

  async def send(self, call: Call) -> bytes:
    """Makes one attempt and returns the body of the response, with the key redacted.

    Raises:
      EndpointError, RequestError, AttemptError: the attempt failed, classified by its cause.
    """
    import openai

    try:
      async with asyncio.timeout(self._timeouts.total):
        response = await call(self._client.with_raw_response, self._headers)
    except openai.APIStatusError as error:
      self._raise_status(error.response)
    except (openai.APIConnectionError, _BodyError) as error:
      self._raise_connection(error)
    except openai.OpenAIError as error:
      raise self._failed(f": {self._without_key(str(error))}") from None
    except UnicodeEncodeError as error:
      raise RequestError(f"the request can't be sent ({error})", status=400) from None
    except (LookupError, AssertionError, ValueError, TypeError) as error:
      # The client decodes a response by the charset that the server names, such as rot13.
      raise self._failed(f" sent a response that can't be read ({type(error).__name__})") from None
    except TimeoutError:
      raise self._failed(f" took longer than {self._timeouts.total:g} s") from None
    if len(self._key) < _LEAST_SECRET_CHARACTERS:
      return response.content
    return response.content.replace(self._key.encode(), b"[key]")

  async def send_json(self, call: Call) -> dict[str, Any]:
    """Makes one attempt and returns the JSON object of the response; raises like `send`."""
    content = await self.send(call)
    try:
      value = json.loads(content)
      # A key that is escaped in the body shows only after decoding.
      if len(self._key) >= _LEAST_SECRET_CHARACTERS:
        key, text = json.dumps(self._key)[1:-1], json.dumps(value, ensure_ascii=False)
        value = json.loads(text.replace(key, "[key]"))
    except (ValueError, RecursionError) as error:
      raise self._failed(f" sent invalid JSON ({error})") from None
    if not isinstance(value, dict):
      raise self._failed(" sent JSON that is not an object")
    return value

  async def close(self) -> None:
    """Closes the connections."""
    await self._client.close()

  def _failed(self, what: str, *, billed: bool = True) -> AttemptError:
    return AttemptError(self.base_url + what, billed=billed)

  def _raise_connection(self, error: Exception) -> NoReturn:
    # Compared by name: the cause is of the HTTP library, which differs between the client's
    # versions.
    cause = error.__cause__ or error
    name = type(cause).__name__
    if name == "ReadTimeout":
      raise self._failed(f" sent nothing for {self._timeouts.read:g} s") from None
    if isinstance(cause, _BodyError):
      raise self._failed(f" sent {cause}") from None
    detail = self._without_key(f"{name}: {cause}" if str(cause) else name)
    if name in ("ConnectError", "ConnectTimeout"):
      raise self._failed(f" can't be reached ({detail})", billed=False) from None
    raise self._failed(f" broke the connection off ({detail})") from None

  def _raise_status(self, response: Any) -> NoReturn:
    status = response.status_code
    said = response.content.decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
      said = json.dumps(json.loads(said), ensure_ascii=False)  # shows what was escaped
    said = self._without_key(" ".join(said.split()))[:_SHOWN_CHARACTERS]
    reason = self._without_key(response.reason_phrase)[:_SHOWN_CHARACTERS]
    message = f"{self.base_url}: {status} {reason}: {said}"
    if status in (401, 403):
      whose = f"the key in {self._key_name} is refused" if self._key_name else "it needs a key"
      raise EndpointError(f"{message}\n{whose}")
    if status == 402 or b"insufficient_quota" in response.content:
      raise EndpointError(f"{message}\nthe account has no money left")
    if status == 404:
      raise EndpointError(
        f"{message}\nit knows no such model, or {self.base_url} is not the address of an "
        f"OpenAI-compatible API (it often ends in /v1)"
      )
    if status not in _RETRIED:
      raise RequestError(message, status=status)
    seconds = retry_after_seconds(response.headers, now=time.time())
    overloaded = status in _OVERLOADED
    raise AttemptError(message, billed=False, overloaded=overloaded, retry_after=seconds)

  def _without_key(self, message: str) -> str:
    return message.replace(self._key, "[key]") if self._key else message


class _BodyError(Exception):
  """The body of a response is compressed, or too large."""


async def _bound_body(response: Any) -> None:
  """Limits what a response's body takes in memory; called before it is read."""
  encoding = response.headers.get("content-encoding", "identity")
  if encoding.strip().lower() not in ("", "identity"):
    raise _BodyError(f"a body that is compressed ({encoding[:20]}), which was not asked for")
  stream = response.stream

  class Bounded(type(stream)):  # the HTTP library, which differs between versions, asks for its own
    def __init__(self) -> None:
      self.size = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
      async for chunk in stream:
        self.size += len(chunk)
        if self.size > _MAX_BODY_BYTES:
          raise _BodyError(f"a body of more than {_MAX_BODY_BYTES} bytes")
        yield chunk

    async def aclose(self) -> None:
      await stream.aclose()

  response.stream = Bounded()


def retry_after_seconds(headers: Mapping[str, str], *, now: float) -> float | None:
  """Returns the wait that a response asks for: `retry-after-ms`, or `retry-after` in either form.

  Args:
    headers: names in lower case, or a mapping that ignores case.
    now: seconds since 1970.
  """
  for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
    with contextlib.suppress(KeyError, ValueError):
      return max(0.0, float(headers[name]) * unit)
  try:
    date = email.utils.parsedate_to_datetime(headers["retry-after"])
  except (KeyError, ValueError, OverflowError, TypeError, IndexError):
    return None
  if date.tzinfo is None:
    date = date.replace(tzinfo=datetime.UTC)
  return max(0.0, date.timestamp() - now)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Rate limits of an endpoint; None for no limit.

  In any minute at most 1/60 more than a limit is sent, plus one request that alone exceeds it.

  Attributes:
    max_concurrent: calls in flight. Halved whenever the endpoint is overloaded; grows back with
      calls that succeed.
    tokens_per_minute: tokens of prompts and completions. A completion counts as `max_tokens` until
      its length is known.
  """

  max_concurrent: int = 32
  requests_per_minute: float | None = None
  tokens_per_minute: float | None = None
  input_tokens_per_minute: float | None = None
  output_tokens_per_minute: float | None = None

  __post_init__ = _check_positive


class Throttle:
  """Admits calls in order of arrival, within the limits; used in one event loop."""

  def __init__(
    self,
    limits: Limits,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
  ) -> None:
    self._clock, self._sleep = clock, sleep
    self._max = self._allowed = float(limits.max_concurrent)
    self._running = 0
    self._resume_at = 0.0
    self._turn = asyncio.Lock()
    self._changed = asyncio.Event()
    # Each bucket with the amount that a call of (input, output) tokens takes from it.
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
    """Waits until a call may be made, and counts it as in flight.

    Yields a function that corrects the token counts when the call's usage is known.
    """
    async with self._turn:  # a queue: asyncio's locks are first come, first served
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
    """Raises the concurrency: by one, after as many calls as may be in flight."""
    self._allowed = min(self._max, self._allowed + 1 / self._allowed)
    self._changed.set()

  def cool_down(self, seconds: float) -> None:
    """Stops sending for some seconds and halves the concurrency: the endpoint is overloaded."""
    now = self._clock()
    if now >= self._resume_at:  # a burst of refusals halves it once
      self._allowed = max(1.0, self._allowed / 2)
    self._resume_at = max(self._resume_at, now + seconds)

  @property
  def allowed(self) -> int:
    """Number of calls that may be in flight now."""
    return int(self._allowed)

  def _seconds_to_wait(self, input_tokens: int, output_tokens: int) -> float | None:
    """Returns seconds to wait, or None if another call must end first."""
    if self._running >= self.allowed:
      return None
    waits = [b.seconds_until(amount(input_tokens, output_tokens)) for b, amount in self._buckets]
    return max(0.0, self._resume_at - self._clock(), *waits)


class _Bucket:
  """A token bucket that holds one second's worth, and may go into debt.

  Ours rather than aiolimiter's: its limiter can neither return the unused tokens of a completion
  that was shorter than `max_tokens`, nor admit a request that is larger than the bucket.
  """

  def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
    self._rate = per_minute / 60
    self._level = self._capacity = max(1.0, self._rate * _BURST_SECONDS)
    self._clock, self._at = clock, clock()

  def seconds_until(self, amount: int) -> float:
    """Returns seconds until the amount, or a full bucket if that is less, is available."""
    now = self._clock()
    self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
    self._at = now
    missing = min(amount, self._capacity) - self._level
    # Clocks are rounded: without a tolerance, a wait of 0 seconds could repeat.
    return missing / self._rate if missing > 1e-9 * self._capacity else 0.0

  def take(self, amount: int) -> None:
    """Removes an amount, or returns one if it is negative."""
    self._level = min(self._capacity, self._level - amount)
