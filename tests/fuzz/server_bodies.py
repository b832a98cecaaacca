"""Sends damaged requests to a server: 200 or a client's error, and the next request is answered.

python -m tests.fuzz.server_bodies --minutes 10 --seed 0
"""

import contextlib
import copy
import json
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import httpx
import jax

from selfimprove_jax.data import tokenizer as tokenizer_lib
from selfimprove_jax.language_models.chat import ChatTemplate
from selfimprove_jax.language_models.local import LocalModel
from selfimprove_jax.models import llama
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.serving import run
from selfimprove_jax.serving.app import make_app
from selfimprove_jax.serving.service import EngineService
from tests.fuzz import harness

_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
_COMMON: dict[str, Any] = {
  "model": "tiny",
  "max_tokens": 2,
  "n": 1,
  "seed": 1,
  "stop": ["x"],
  "stream": False,
  "temperature": 0.5,
  "top_p": 0.9,
  "top_k": 3,
  "min_tokens": 1,
  "presence_penalty": 0.1,
  "repetition_penalty": 1.1,
  "stop_token_ids": [3],
  "logit_bias": None,
  "tools": None,
}
_BODIES: list[tuple[str, dict[str, Any]]] = [
  ("chat/completions", {"messages": [{"role": "user", "content": "the cat"}], **_COMMON}),
  ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": True}),
  ("completions", {"prompt": "the cat", "logprobs": 1, "echo": True, **_COMMON}),
  ("completions", {"prompt": [5, 6], "regex": "[ab]+", "model": "tiny", "max_tokens": 3}),
  ("completions", {"prompt": ["a", "b"], "choices": ["x", "y"], "model": "tiny"}),
  (
    "chat/completions",
    {
      "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
      "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
      "stream": True,
      "stream_options": {"include_usage": True},
      "model": "tiny",
    },
  ),
]
_VALUES = [
  None,
  True,
  0,
  -1,
  2**31,
  2**63,
  2**70,
  1.5,
  1e-300,
  1e300,
  "",
  "x",
  [],
  {},
  [[]],
  [None],
]
_VALUES += [float("nan"), float("inf"), "\ud800", "\0", ["", 1], {"type": "text"}, [2**31], [-1]]


@contextlib.contextmanager
def opened() -> Iterator[Callable[[int], str | None]]:
  """Yields the fuzzer of a server of a tiny model."""
  with _server() as url, httpx.Client(timeout=harness.HANG_SECONDS) as client:

    def try_seed(seed: int) -> str | None:
      rng = random.Random(seed)
      path, body = copy.deepcopy(rng.choice(_BODIES))
      for _ in range(rng.randint(1, 3)):
        body = _changed(rng, body)
      data = json.dumps(body).encode()
      if rng.random() < 0.3:
        data = harness.damage(rng, data)
      reply = client.post(f"{url}/{path}", content=data, headers=_JSON)
      if not (reply.status_code == 200 or 400 <= reply.status_code < 500):
        return f"{path} {data[:300]!r}: {reply.status_code} {reply.text[:300]}"
      good = {"model": "tiny", "prompt": "the cat", "max_tokens": 1}
      after = client.post(f"{url}/completions", json=good)
      return None if after.status_code == 200 else f"{path} {data[:300]!r}, then {after.text[:300]}"

    yield try_seed


_JSON = {"content-type": "application/json"}


def _changed(rng: random.Random, body: Any) -> Any:
  if not isinstance(body, dict) or not body:
    return body
  key = rng.choice([*body, *_COMMON])
  if key in body and rng.random() < 0.5:
    return {**body, key: harness.edit_value(rng, body[key])}
  return {**body, key: rng.choice(_VALUES)}


@contextlib.contextmanager
def _server() -> Iterator[str]:
  tokenizer = tokenizer_lib.train_bpe(["the cat sat on the mat"] * 3, vocab_size=280)
  special = {"eos_token": tokenizer.eos_token}
  chat = ChatTemplate(tokenizer, _TEMPLATE, special_tokens=special, eos_ids=(tokenizer.eos_id,))
  shape = {"num_layers": 1, "embed_dim": 16, "mlp_dim": 32, "num_heads": 2, "num_kv_heads": 1}
  config = llama.LlamaConfig(vocab_size=tokenizer.vocab_size, head_dim=8, dtype="float32", **shape)
  params = nn.unbox(llama.init_params(llama.Llama(config), jax.random.key(0)))
  mesh = partitioning.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  engine = Engine(
    llama.Llama(config),
    params,
    mesh,
    eos_ids=(tokenizer.eos_id,),
    pad_id=tokenizer.pad_id,
    num_slots=4,
    max_length=64,
    decode_text=tokenizer.decode,
  )
  model = LocalModel(
    engine,
    name="tiny",
    config=config,
    tokenizer=tokenizer,
    chat=chat,
    eos_ids=(tokenizer.eos_id,),
    prefix_ids=(),
  )
  service = EngineService(engine, max_waiting=256)
  sock, ready = run.bind("127.0.0.1", 0), threading.Event()
  app = make_app(service, model, name="tiny", host="127.0.0.1", key=None, max_body_bytes=1_000_000)
  server = run.Server(app, service, drain_seconds=1, on_ready=ready.set)
  thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
  thread.start()
  assert ready.wait(30)
  try:
    yield run.url(sock)
  finally:
    server.should_exit = True
    thread.join(30)
    sock.close()


if __name__ == "__main__":
  harness.main(__doc__, opened)
