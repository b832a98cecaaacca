"""What stands before the server's application: the key, the size of a body, and how it is sent."""

import hmac
from typing import Any

from starlette.responses import JSONResponse

from selfimprove_jax.sampling.server.schema import ApiError

OPEN_PATHS = ("/health",)
_LOCAL_HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]"))


class Gate:
  """An ASGI application before another.

  Bodies must be JSON by their header: a web page cannot have a browser send such a one to this
  machine without asking first. Without a key, nor does it answer to another name than this
  machine's own (a page's, that was made to point here).
  """

  def __init__(self, app: Any, *, key: str | None, max_body_bytes: int, host: str):
    """Args:
    key: what `Authorization: Bearer` must say, but for `OPEN_PATHS`; None for no key.
    host: what the server listens on.
    """
    self._app = app
    self._key = key
    self._max_body_bytes = max_body_bytes
    self._hosts = _LOCAL_HOSTS | {host}

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    headers = {name.lower(): value for name, value in scope["headers"]}
    try:
      self._check(scope, headers)
      body = await self._read(headers, receive) if scope["method"] == "POST" else None
    except ApiError as error:
      answer = {"www-authenticate": "Bearer"} if error.status == 401 else {}
      # What is left of a body would be read as the next request.
      answer["connection"] = "close"
      response = JSONResponse(error.body(), error.status, headers=answer)
      await response(scope, receive, send)
      return
    await self._app(scope, receive if body is None else _replay(body, receive), send)

  def _check(self, scope, headers):
    if self._key is None:
      host = headers.get(b"host", b"").decode("latin-1")
      name = host if host.endswith("]") else host.rpartition(":")[0] or host
      if name not in self._hosts:
        names = ", ".join(sorted(self._hosts))
        raise ApiError(403, f"the host is {name!r}; a server without a key answers to {names}")
    elif scope["path"] not in OPEN_PATHS:
      given = headers.get(b"authorization", b"")
      if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):
        message = "the header Authorization must be 'Bearer' and this server's key"
        raise ApiError(401, message, code="invalid_api_key")
    if scope["method"] == "POST":
      kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
      if kind != b"application/json":
        raise ApiError(415, "the header Content-Type must be application/json")

  async def _read(self, headers, receive):
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > self._max_body_bytes:
      raise self._too_large()
    parts, size = [], 0
    while True:
      message = await receive()
      if message["type"] == "http.disconnect":
        return b""
      parts.append(message.get("body", b""))
      size += len(parts[-1])
      if size > self._max_body_bytes:
        raise self._too_large()
      if not message.get("more_body", False):
        return b"".join(parts)

  def _too_large(self):
    return ApiError(413, f"a body may have {self._max_body_bytes} bytes", code="body_too_large")


def _replay(body, receive):
  left = [{"type": "http.request", "body": body, "more_body": False}]

  async def replay():
    return left.pop() if left else await receive()

  return replay
