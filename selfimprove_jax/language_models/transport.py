"""HTTP to an OpenAI-compatible endpoint: what each way to fail means, and trying again."""

import asyncio
import dataclasses
import datetime
import email.utils
import json
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

_logger = logging.getLogger(__name__)

_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
_TOO_MUCH = {429, 503, 529}
_SHOWN_CHARACTERS = 300
# A shorter key is a word like EMPTY, for servers that want some key, and would be cut out of texts.
_LEAST_SECRET_CHARACTERS = 16


class EndpointError(RuntimeError):
  """What would fail every other request too: a key that is refused, a model that is not there."""


class RequestError(Exception):
  """The endpoint refuses this request, whatever comes after.

  Attributes:
    status: of HTTP.
  """

  def __init__(self, message: str, *, status: int):
    super().__init__(message)
    self.status = status


class AttemptError(Exception):
  """One attempt failed; another may not.

  Attributes:
    billed: the endpoint may have done the work, and may ask for its price.
    overloaded: it said that it has too much to do.
    retry_after: seconds that it asks to wait, or None.
  """

  def __init__(
    self,
    message: str,
    *,
    billed: bool,
    overloaded: bool = False,
    retry_after: float | None = None,
  ):
    super().__init__(message)
    self.billed, self.overloaded, self.retry_after = billed, overloaded, retry_after


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeouts:
  """Seconds.

  Attributes:
    connect: to be connected.
    read: in which nothing arrives. An answer arrives as a whole, so it is also the longest that
      a model may take to write one.
    total: for one attempt.
  """

  connect: float = 10.0
  read: float = 600.0
  total: float = 900.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retries:
  """How often, and after how long, a failed attempt is made again.

  The wait before attempt n + 1 is drawn from [0, min(max_seconds, initial_seconds * 2**(n - 1))]
  (exponential back-off with full jitter), and is no shorter than what the endpoint asks for.

  Attributes:
    max_attempts: for one request.
    max_retry_after_seconds: an endpoint that asks for a longer wait ends the run.
    max_failures_in_a_row: as many requests failed for good, and none succeeded between: the
      endpoint is taken to be down, and the run ends.
  """

  max_attempts: int = 6
  initial_seconds: float = 1.0
  max_seconds: float = 60.0
  max_retry_after_seconds: float = 900.0
  max_failures_in_a_row: int = 64

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value <= 0:
        raise ValueError(f"{name} is {value}; it must be more than 0")

  def seconds(self, attempt: int) -> float:
    """The wait after attempt `attempt`, the first being 1."""
    return random.uniform(0, min(self.max_seconds, self.initial_seconds * 2 ** (attempt - 1)))


async def with_retries(
  attempt: Callable[[], Awaitable[T]],
  retries: Retries,
  *,
  sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T:
  """What `attempt` gives in the end.

  Raises:
    AttemptError: that of the last attempt, which says how many there were.
    EndpointError: the endpoint asks for a longer wait than is allowed.
  """
  for number in range(1, retries.max_attempts + 1):
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
      await sleep(seconds)
  raise AssertionError("max_attempts is at least 1")


class Transport:
  """Calls to one endpoint, within one event loop. Its key is in no message and no answer."""

  def __init__(
    self,
    base_url: str,
    *,
    api_key_env: str | None,
    timeouts: Timeouts,
    max_connections: int,
  ):
    """Args:
    api_key_env: the environment variable that holds the key; None for an endpoint without one.

    Raises:
      ValueError: the variable is not set; `base_url` is no plain address.
    """
    import httpx

    url = httpx.URL(base_url)
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query:
      # Not shown: what does not belong in an address may be a key.
      raise ValueError(
        "base_url must be like https://host/v1, without a user, a password or a query"
      )
    headers = {}
    self._key = None
    if api_key_env is not None:
      self._key = os.environ.get(api_key_env, "").strip()
      if not self._key:
        raise ValueError(f"the environment variable {api_key_env}, of the key, is not set")
      if not (self._key.isascii() and self._key.isprintable()):
        raise ValueError(f"the key in {api_key_env} has characters that no key has")
      headers["Authorization"] = f"Bearer {self._key}"
    self.base_url = base_url.rstrip("/")
    self._key_name = api_key_env
    self._timeouts = timeouts
    self._client = httpx.AsyncClient(
      headers=headers,
      timeout=httpx.Timeout(timeouts.read, connect=timeouts.connect, pool=None),
      limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=None),
    )

  async def send(self, method: str, path: str, **options: Any) -> bytes:
    """The body of the answer, with the key blotted out.

    Args:
      options: of `httpx.AsyncClient.request`: `json`, `files`, `headers`, ...

    Raises:
      EndpointError, RequestError, AttemptError: by what went wrong.
    """
    import httpx

    url = self.base_url + path
    try:
      async with asyncio.timeout(self._timeouts.total):
        response = await self._client.request(method, url, **options)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
      raise AttemptError(f"{url} can't be reached ({_named(error)})", billed=False) from None
    except httpx.ReadTimeout:
      message = f"{url} sent nothing for {self._timeouts.read:g} s"
      raise AttemptError(message, billed=True) from None
    except TimeoutError:
      message = f"{url} took longer than {self._timeouts.total:g} s"
      raise AttemptError(message, billed=True) from None
    except httpx.HTTPError as error:
      message = f"{url} broke the connection off ({_named(error)})"
      raise AttemptError(self._without_key(message), billed=True) from None
    if response.is_success:
      content = response.content
      if self._key is not None and len(self._key) >= _LEAST_SECRET_CHARACTERS:
        content = content.replace(self._key.encode(), b"[key]")
      return content
    self._raise_status(response)
    raise AssertionError("an unsuccessful status raises")

  async def send_json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
    """The answer as a JSON object.

    Raises:
      AttemptError: also where it is half of one.
    """
    content = await self.send(method, path, **options)
    try:
      value = json.loads(content)
    except ValueError as error:
      raise AttemptError(f"{self.base_url}{path}: no JSON ({error})", billed=True) from None
    if not isinstance(value, dict):
      raise AttemptError(f"{self.base_url}{path}: JSON, but no object", billed=True)
    return value

  async def close(self) -> None:
    await self._client.aclose()

  def _raise_status(self, response):
    status = response.status_code
    said = self._without_key(" ".join(response.text.split()))[:_SHOWN_CHARACTERS]
    message = f"{self.base_url}: {status} {response.reason_phrase}: {said}"
    if status in (401, 403):
      whose = f"the key in {self._key_name} is refused" if self._key_name else "it wants a key"
      raise EndpointError(f"{message}\n{whose}")
    if status == 402 or "insufficient_quota" in response.text:
      raise EndpointError(f"{message}\nthe account has no money left")
    if status == 404:
      raise EndpointError(
        f"{message}\nit knows no such model, or {self.base_url} is not the address of an "
        f"OpenAI-compatible API (it often ends in /v1)"
      )
    if status in _TRY_AGAIN:
      raise AttemptError(
        message,
        billed=False,
        overloaded=status in _TOO_MUCH,
        retry_after=retry_after_seconds(response.headers, now=time.time()),
      )
    raise RequestError(message, status=status)

  def _without_key(self, message):
    return message if self._key is None else message.replace(self._key, "[key]")


def retry_after_seconds(headers: Mapping[str, str], *, now: float) -> float | None:
  """The wait that an answer asks for: `retry-after-ms`, or `retry-after` in seconds or as a date.

  Args:
    headers: names in lower case, or of a mapping that ignores case.
    now: in seconds since 1970.
  """
  for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
    try:
      return max(0.0, float(headers[name]) * unit)
    except (KeyError, ValueError):
      continue
  try:
    date = email.utils.parsedate_to_datetime(headers["retry-after"])
  except (KeyError, ValueError):
    return None
  if date.tzinfo is None:
    date = date.replace(tzinfo=datetime.UTC)
  return max(0.0, date.timestamp() - now)


def _named(error):
  return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
