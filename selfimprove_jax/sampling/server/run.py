"""From a checkpoint to a server that answers: what `sampling.server`'s flags ask for."""

import asyncio
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import uvicorn

from selfimprove_jax import partitioning
from selfimprove_jax.models import pretrained
from selfimprove_jax.sampling.chat import PLAIN
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.loading import load_model
from selfimprove_jax.sampling.requests import Request
from selfimprove_jax.sampling.server.app import ENDING, ServedModel, make_app
from selfimprove_jax.sampling.server.gate import Gate
from selfimprove_jax.sampling.server.service import EngineService

_DEFAULT_MAX_LENGTH = 2048
# After requests that run are told of the end, for their answers to leave.
_LAST_SECONDS = 5


def api_key(host: str, *, variable: str, environment: Mapping[str, str]) -> str | None:
  """The key that requests must bring, or None for none.

  Args:
    variable: the environment variable that holds it.

  Raises:
    ValueError: there is none, and others than this machine could reach the server.
  """
  key = environment.get(variable)
  if key:
    return key
  if not _is_loopback(host):
    raise ValueError(
      f"--host={host} can be reached from other machines: set the environment variable {variable} "
      f"to a key that requests must bring, or listen on 127.0.0.1"
    )
  return None


def _is_loopback(host):
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
  """A socket for the server, before anything is loaded: a port in use is told at once.

  Raises:
    OSError: the port is in use, or the host no address of this machine.
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
  *,
  name: str,
  chat_template: str | None,
  num_slots: int,
  max_length: int | None,
  dtype: str | None,
  batch_invariant: bool,
  mesh: jax.sharding.Mesh,
) -> tuple[ServedModel, Engine]:
  """A checkpoint as a model to serve, and its engine, which has sampled once.

  Args:
    checkpoint: a Hugging Face folder, a .gguf file, or an orbax folder of ours.
    chat_template: None for the model's, `plain`, or the path of a Jinja file.
    max_length: tokens of prompt and completion; None for the model's context, at most 2048.
    dtype: of parameters, activations and cache; None for float32 on CPUs, bfloat16 elsewhere.
    batch_invariant: of `Engine`.

  Raises:
    ValueError: no such model; or `max_length` is more than its context.
  """
  if max_length is None:
    max_length = min(pretrained.read_max_positions(checkpoint), _DEFAULT_MAX_LENGTH)
  if dtype is None:
    dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
  loaded = load_model(
    checkpoint,
    mesh,
    num_slots=num_slots,
    max_length=max_length,
    changes={"dtype": dtype, "param_dtype": dtype},
    chat_template=_template(chat_template),
    batch_invariant=batch_invariant,
  )
  why_no_chat = None
  if loaded.chat is None:
    why_no_chat = (
      f"model {name!r} has no chat template: use /v1/completions, or start the server with "
      f"--chat_template={PLAIN}, or with the path of a Jinja file"
    )
  # What is compiled now does not keep the first caller waiting.
  loaded.engine.generate([Request(prompt=[loaded.files.tokenizer.eos_id], max_new_tokens=1)])
  model = ServedModel(
    name=name,
    files=loaded.files,
    chat=loaded.chat,
    why_no_chat=why_no_chat,
    grammars=loaded.grammars,
    vocab_size=loaded.config.vocab_size,
    max_length=max_length,
  )
  return model, loaded.engine


def _template(chat_template):
  if chat_template in (None, PLAIN):
    return chat_template
  with open(chat_template, encoding="utf-8") as file:
    return file.read()


def mesh(*, data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
  """The mesh of the flags."""
  return partitioning.make_mesh(data=data, fsdp=fsdp, tensor=tensor)


class Server(uvicorn.Server):
  """uvicorn's, which says when it is ready."""

  def __init__(
    self,
    service: EngineService,
    model: ServedModel,
    *,
    host: str,
    key: str | None,
    max_body_bytes: int,
    drain_seconds: int,
    on_ready: Callable[[], None],
  ):
    """Args:
    max_body_bytes: of a request; it bounds what a prompt costs to tokenize.
    drain_seconds: how long requests that run may go on after a signal to end; then they fail,
      with that reason.
    """
    app: Any = Gate(make_app(service, model), key=key, max_body_bytes=max_body_bytes, host=host)
    super().__init__(
      uvicorn.Config(
        app,
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=drain_seconds + _LAST_SECONDS,
      )
    )
    self._service = service
    self._drain_seconds = drain_seconds
    self._on_ready = on_ready

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    await super().startup(sockets)
    if self.started:
      self._on_ready()

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    draining = asyncio.create_task(self._drain())
    await super().shutdown(sockets)
    draining.cancel()

  async def _drain(self):
    await asyncio.sleep(self._drain_seconds)
    await asyncio.to_thread(self._service.close, ENDING)


def url(sock: socket.socket) -> str:
  """What clients take for the base URL."""
  host, port = sock.getsockname()[:2]
  return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def end_on_signals() -> None:
  """SIGTERM and SIGINT end the program with 0; uvicorn, while it runs, does so in its own time."""

  def end(*_):
    sys.exit(0)

  signal.signal(signal.SIGTERM, end)
  signal.signal(signal.SIGINT, end)
