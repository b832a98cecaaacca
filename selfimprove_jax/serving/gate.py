"""Checks before the server's application: API key, headers, size of the body."""

import hmac
from typing import Any

from starlette.responses import JSONResponse

from selfimprove_jax.serving.schema import ApiError

# starlette's TrustedHostMiddleware and RequestBodyLimitMiddleware refuse in plain text, and clients
# of OpenAI's API expect its JSON; its AuthenticationMiddleware would be longer than `_check`.

OPEN_PATHS = ("/health",)
_LOCAL_HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]"))


class Gate:
  """ASGI middleware that refuses requests that are too large, lack the key, or are a web page's.

  Against CSRF, requests with a body must have the Content-Type application/json: browsers ask a
  server before they send it across origins, and this one does not allow it. Against DNS rebinding
  (a page's own host name that resolves to 127.0.0.1), the Host must be this machine if there is no
  key.
  """

  def __init__(self, app: Any, *, key: str | None, host: str, max_body_bytes: int):
    """Args:
    key: expected in `Authorization: Bearer`, except for `OPEN_PATHS`; None for no key.
    host: address that the server listens on.
    max_body_bytes: maximum size of a request, which bounds the cost of tokenizing a prompt.
    """
    self._app = app
    self._max_body_bytes = max_body_bytes
    self._key = key
    self._hosts = _LOCAL_HOSTS | {host}

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
      try:
        self._check(scope, {name.lower(): value for name, value in scope["headers"]})
      except ApiError as error:
        response = JSONResponse(error.body(), error.status, headers=error.headers())
        await response(scope, receive, send)
        return
      receive = self._limited(receive)
    await self._app(scope, receive, send)

  def _check(self, scope: Any, headers: dict[bytes, bytes]) -> None:
    if self._key is None:
      host = headers.get(b"host", b"").decode("latin-1")
      name = host if host.endswith("]") else host.rpartition(":")[0] or host
      if name not in self._hosts:
        names = ", ".join(sorted(self._hosts))
        raise ApiError(403, f"the Host is {name!r}; a server without a key accepts only {names}")
    elif scope["path"] not in OPEN_PATHS:
      given = headers.get(b"authorization", b"")
      # In constant time, so that the response time does not tell how much of the key is right.
      if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):
        message = "the header Authorization must be 'Bearer' and this server's key"
        raise ApiError(401, message, code="invalid_api_key")
    if scope["method"] == "POST":
      kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
      if kind != b"application/json":
        raise ApiError(415, "the header Content-Type must be application/json")
    self._check_size(int(headers.get(b"content-length", b"0")))

  def _limited(self, receive: Any) -> Any:
    """Counts bytes as they arrive: a chunked body does not announce its size."""
    size = 0

    async def limited() -> Any:
      nonlocal size
      message = await receive()
      size += len(message.get("body", b""))
      self._check_size(size)
      return message

    return limited

  def _check_size(self, size: int) -> None:
    if size > self._max_body_bytes:
      message = f"a body may have at most {self._max_body_bytes} bytes"
      raise ApiError(413, message, code="body_too_large")
