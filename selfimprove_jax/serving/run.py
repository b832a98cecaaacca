"""The server's start and end: its key, its socket, the model, signals."""

import asyncio
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

import h11
import jax
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from selfimprove_jax.language_models import local
from selfimprove_jax.language_models.chat import PLAIN
from selfimprove_jax.language_models.local import ComputeConfig, LocalModel
from selfimprove_jax.sampling.requests import Request
from selfimprove_jax.serving.app import ENDING
from selfimprove_jax.serving.service import EngineService

# After running requests were failed at the end of draining, for their responses to be sent.
_LAST_SECONDS = 5
_LAST_ANSWERS_SECONDS = 1


def api_key(host: str, *, variable: str, environment: Mapping[str, str]) -> str | None:
  """Returns the key that requests must have, or None.

  Args:
    variable: name of the environment variable that holds it.

  Raises:
    ValueError: there is no key, and other machines could reach the server.
  """
  key = environment.get(variable)
  if key:
    return key
  if not _is_loopback(host):
    raise ValueError(
      f"--host={host} can be reached from other machines: set the environment variable {variable} "
      f"to a key that requests must have, or listen on 127.0.0.1"
    )
  return None


def _is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
  """Binds the server's socket, before the model is loaded, so that a used port fails at once.

  Raises:
    OSError: the port is in use, or the host is not an address of this machine.
  """
  family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
  sock = socket.socket(family, socket.SOCK_STREAM)
  sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    sock.bind(address)
  except OSError as error:
    sock.close()
    raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
  return sock


def load(
  checkpoint: str | os.PathLike,
  mesh: jax.sharding.Mesh,
  *,
  tokenizer: str | None,
  chat_template: str | None,
  num_slots: int,
  max_length: int | None,
  dtype: str,
  batch_invariant: bool,
) -> LocalModel:
  """Loads a checkpoint and samples once, so that the first request does not wait for compilation.

  Args:
    tokenizer: a folder, or None for the checkpoint's own.
    chat_template: None for the model's own, `plain`, or the path of a Jinja file.
    max_length, dtype, batch_invariant: see `local.load`.

  Raises:
    ValueError: there is no such model, or `max_length` exceeds its context.
  """
  if chat_template not in (None, PLAIN):
    with open(chat_template, encoding="utf-8") as file:
      chat_template = file.read()
  model = local.load(
    checkpoint,
    mesh,
    num_slots=num_slots,
    max_length=max_length,
    compute=ComputeConfig(dtype=dtype),
    tokenizer=tokenizer,
    chat_template=chat_template,
    batch_invariant=batch_invariant,
  )
  model.engine.generate([Request(prompt=[model.tokenizer.eos_id], max_new_tokens=1)])
  _ = model.grammars  # takes seconds
  return model


class Protocol(H11Protocol):
  """uvicorn's HTTP, which closes connections whose client stalls in the middle of a request.

  Whole headers must arrive within `header_seconds`, and each further part of a body within
  `body_seconds`. (Idle connections between requests are uvicorn's `timeout_keep_alive`.)
  """

  header_seconds = 10.0
  body_seconds = 30.0

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    self._stalled: asyncio.TimerHandle | None = None
    self._expect(self.header_seconds)

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    match self.conn.their_state:
      case h11.IDLE:  # in the middle of headers; more of them gives no more time
        if self._stalled is None:
          self._expect(self.header_seconds)
      case h11.SEND_BODY:
        self._expect(self.body_seconds)
      case _:
        self._expect(None)

  def connection_lost(self, error: Exception | None) -> None:
    self._expect(None)
    super().connection_lost(error)

  def _expect(self, seconds: float | None) -> None:
    if self._stalled is not None:
      self._stalled.cancel()
      self._stalled = None
    if seconds is not None and not self.transport.is_closing():
      self._stalled = self.loop.call_later(seconds, self.transport.abort)


class Server(uvicorn.Server):
  """uvicorn's server, with a call when it is ready and a limit on draining.

  It shuts down when the service stops by itself; `failure` is then the reason, and None otherwise.
  """

  def __init__(
    self,
    app: Any,
    service: EngineService,
    *,
    drain_seconds: int,
    on_ready: Callable[[], None],
  ):
    """Args:
    drain_seconds: how long running requests may continue after a signal; then they fail.
    """
    super().__init__(
      uvicorn.Config(
        app,
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        http=Protocol,
        timeout_graceful_shutdown=drain_seconds + _LAST_SECONDS,
      )
    )
    self._service = service
    self._drain_seconds = drain_seconds
    self._on_ready = on_ready
    self.failure: str | None = None

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    await super().startup(sockets)
    if self.started:
      self._on_ready()

  async def on_tick(self, counter: int) -> bool:
    ends = await super().on_tick(counter)
    if not ends and (stopped := self._service.stopped) is not None:
      self.failure = stopped
      # Requests of this moment are answered with the reason before the socket closes.
      await asyncio.sleep(_LAST_ANSWERS_SECONDS)
      return True
    return ends

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    draining = asyncio.create_task(self._drain())
    await super().shutdown(sockets)
    draining.cancel()

  async def _drain(self) -> None:
    await asyncio.sleep(self._drain_seconds)
    await asyncio.to_thread(self._service.close, ENDING)


def url(sock: socket.socket) -> str:
  """Returns the base URL for clients."""
  host, port = sock.getsockname()[:2]
  return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def exit_on_signals() -> None:
  """Makes SIGTERM and SIGINT exit with 0 until uvicorn replaces the handlers."""

  def exit_(*_: Any) -> None:
    sys.exit(0)

  signal.signal(signal.SIGTERM, exit_)
  signal.signal(signal.SIGINT, exit_)
