"""Serves a checkpoint with OpenAI's API; needs the extra `serve`.

python -m selfimprove_jax.serving --checkpoint=FOLDER_OR_GGUF --model_name=NAME
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
  -d '{"model": "NAME", "messages": [{"role": "user", "content": "Hello"}]}'
"""

import os
import pathlib
import sys

from absl import app, flags, logging

from selfimprove_jax.runtime import allocator, compilation_cache, partitioning

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Hugging Face folder, .gguf file, or orbax folder of ours."
)
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to listen on; one that other machines can reach requires a key."
)
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 for any free port.")
_API_KEY_ENV = flags.DEFINE_string(
  "api_key_env",
  "SELFIMPROVE_API_KEY",
  "Environment variable with the key that requests must have ('Authorization: Bearer KEY').",
)
_MODEL_NAME = flags.DEFINE_string(
  "model_name", None, "Name of the model in requests; the checkpoint's file name by default."
)
_CHAT_TEMPLATE = flags.DEFINE_string(
  "chat_template",
  None,
  "Jinja file to use instead of the model's template; or `plain`, for models not trained on chats.",
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "Hugging Face folder with a tokenizer to use instead of the checkpoint's."
)
_NUM_SLOTS = flags.DEFINE_integer(
  "num_slots", 16, "Completions sampled at once; others wait.", lower_bound=1
)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length",
  None,
  "Maximum tokens of prompt and completion; the model's context, at most 2048, by default.",
)
_MAX_WAITING = flags.DEFINE_integer(
  "max_waiting", 256, "Completions that may wait for a slot; others are refused.", lower_bound=0
)
_MAX_BODY_BYTES = flags.DEFINE_integer(
  "max_body_bytes", 1 << 20, "Maximum size of a request.", lower_bound=1
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "auto",
  ["auto", "float32", "bfloat16"],
  "Dtype of parameters, activations and KV cache; auto: float32 on CPUs, else bfloat16.",
)
_BATCH_INVARIANT = flags.DEFINE_bool(
  "batch_invariant",
  False,
  "Whether a request with a seed gets the same text, to the bit, under any load; slower.",
)
_DATA = flags.DEFINE_integer("data", -1, "Mesh axis that shards slots; -1 for all devices left.")
_FSDP = flags.DEFINE_integer("fsdp", 1, "Mesh axis that shards parameters and slots.")
_TENSOR = flags.DEFINE_integer("tensor", 1, "Mesh axis that shards heads and feed-forward layers.")
_DRAIN_SECONDS = flags.DEFINE_integer(
  "drain_seconds", 30, "How long running requests may continue after SIGTERM.", lower_bound=0
)
_COMPILATION_CACHE = flags.DEFINE_string(
  "compilation_cache",
  compilation_cache.DEFAULT_FOLDER,
  "Folder of compiled programs, for later starts; empty for none.",
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


def _serve() -> None:
  try:
    from selfimprove_jax.serving import run
    from selfimprove_jax.serving.app import make_app
  except ModuleNotFoundError as error:
    raise ImportError(
      f"the server needs the package {error.name}: pip install 'selfimprove_jax[serve]'"
    ) from None
  from selfimprove_jax.serving.service import EngineService

  run.exit_on_signals()
  host, name = _HOST.value, _MODEL_NAME.value or _default_name(_CHECKPOINT.value)
  key = run.api_key(host, variable=_API_KEY_ENV.value, environment=os.environ)
  sock = run.bind(host, _PORT.value)
  model = run.load(
    _CHECKPOINT.value,
    partitioning.make_mesh(data=_DATA.value, fsdp=_FSDP.value, tensor=_TENSOR.value),
    tokenizer=_TOKENIZER.value,
    chat_template=_CHAT_TEMPLATE.value,
    num_slots=_NUM_SLOTS.value,
    max_length=_MAX_LENGTH.value,
    dtype=_DTYPE.value,
    batch_invariant=_BATCH_INVARIANT.value,
  )
  service = EngineService(model.engine, max_waiting=_MAX_WAITING.value)
  size = f"{model.engine.num_slots} slots of {model.max_length} tokens"
  server = run.Server(
    make_app(service, model, name=name, host=host, key=key, max_body_bytes=_MAX_BODY_BYTES.value),
    service,
    drain_seconds=_DRAIN_SECONDS.value,
    on_ready=lambda: print(f"ready: {run.url(sock)} serves {name} ({size})", flush=True),
  )
  server.run(sockets=[sock])
  if server.failure is not None:
    sys.exit(f"the server has stopped: {server.failure}")  # with status 1, so that it is restarted


def _default_name(checkpoint: str) -> str:
  return pathlib.Path(checkpoint).resolve().name.removesuffix(".gguf")


if __name__ == "__main__":
  app.run(main)
