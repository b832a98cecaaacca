"""Serves a checkpoint by OpenAI's API; needs the extra `serve`; see README.md.

python -m selfimprove_jax.sampling.server --checkpoint=FOLDER_OR_GGUF
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
  -d '{"model": "NAME", "messages": [{"role": "user", "content": "Hello"}]}'
"""

import os
import pathlib
import sys

from absl import app, flags, logging

from selfimprove_jax import allocator, compilation_cache

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "A Hugging Face folder, a .gguf file, or a folder of our own parameters."
)
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to listen on; one that other machines reach needs a key."
)
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 for any that is free.")
_API_KEY_ENV = flags.DEFINE_string(
  "api_key_env",
  "SELFIMPROVE_API_KEY",
  "Environment variable with the key that requests must bring ('Authorization: Bearer KEY').",
)
_MODEL_NAME = flags.DEFINE_string(
  "model_name", None, "What requests call the model; by default as the checkpoint is called."
)
_CHAT_TEMPLATE = flags.DEFINE_string(
  "chat_template",
  None,
  "A file of Jinja instead of the model's own; or `plain`, for models that never saw a chat.",
)
_NUM_SLOTS = flags.DEFINE_integer(
  "num_slots", 16, "Completions sampled at once; the rest wait.", lower_bound=1
)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length",
  None,
  "Tokens of prompt and completion together; by default the model's context, at most 2048.",
)
_MAX_WAITING = flags.DEFINE_integer(
  "max_waiting", 256, "Completions that may wait for a slot; more are refused.", lower_bound=0
)
_MAX_BODY_BYTES = flags.DEFINE_integer("max_body_bytes", 1 << 20, "Largest request.", lower_bound=1)
_DTYPE = flags.DEFINE_string(
  "dtype", None, "Of parameters, activations and cache: float32 on CPUs, else bfloat16."
)
_BATCH_INVARIANT = flags.DEFINE_bool(
  "batch_invariant",
  False,
  "A request with a seed gets the same text to the bit whatever is sampled beside it; slower.",
)
_DATA = flags.DEFINE_integer("data", -1, "Devices over which slots are split; -1: what is left.")
_FSDP = flags.DEFINE_integer("fsdp", 1, "Devices over which parameters and slots are split.")
_TENSOR = flags.DEFINE_integer(
  "tensor", 1, "Devices over which heads and layers' widths are split."
)
_DRAIN_SECONDS = flags.DEFINE_integer(
  "drain_seconds", 30, "How long requests that run may go on after SIGTERM.", lower_bound=0
)
_COMPILATION_CACHE = flags.DEFINE_string(
  "compilation_cache",
  compilation_cache.DEFAULT_FOLDER,
  "Folder where what XLA compiled is kept for later starts; empty for none.",
)


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  if _CHECKPOINT.value is None:
    raise app.UsageError("--checkpoint is missing: the model to serve")
  allocator.restart_with_it()
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  compilation_cache.keep_in(_COMPILATION_CACHE.value)
  try:
    _serve()
  except (ValueError, RuntimeError, OSError, ImportError) as error:
    logging.debug("failed", exc_info=True)
    sys.exit(f"{type(error).__name__}: {error}")


def _serve():
  try:
    from selfimprove_jax.sampling.server import run
  except ModuleNotFoundError as error:
    raise ImportError(
      f"the server needs the package {error.name}: pip install 'selfimprove_jax[serve]'"
    ) from None
  from selfimprove_jax.sampling.server.service import EngineService

  run.end_on_signals()
  host, name = _HOST.value, _MODEL_NAME.value or _default_name(_CHECKPOINT.value)
  key = run.api_key(host, variable=_API_KEY_ENV.value, environment=os.environ)
  sock = run.bind(host, _PORT.value)
  model, engine = run.load(
    _CHECKPOINT.value,
    name=name,
    chat_template=_CHAT_TEMPLATE.value,
    num_slots=_NUM_SLOTS.value,
    max_length=_MAX_LENGTH.value,
    dtype=_DTYPE.value,
    batch_invariant=_BATCH_INVARIANT.value,
    mesh=run.mesh(data=_DATA.value, fsdp=_FSDP.value, tensor=_TENSOR.value),
  )
  ready = (
    f"ready: {run.url(sock)} serves {name} ({engine.num_slots} slots of {engine.max_length} tokens)"
  )
  server = run.Server(
    EngineService(engine, max_waiting=_MAX_WAITING.value),
    model,
    host=host,
    key=key,
    max_body_bytes=_MAX_BODY_BYTES.value,
    drain_seconds=_DRAIN_SECONDS.value,
    on_ready=lambda: print(ready, flush=True),
  )
  server.run(sockets=[sock])


def _default_name(checkpoint):
  return pathlib.Path(checkpoint).resolve().name.removesuffix(".gguf")


if __name__ == "__main__":
  app.run(main)
