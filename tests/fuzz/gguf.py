"""Damages a tiny GGUF file: it loads, or an error names it.

python -m tests.fuzz.gguf --minutes 10 --seed 0
"""

import contextlib
import json
import os
import pathlib
import random
import struct
import tempfile
from collections.abc import Callable, Iterator

import jax

from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.models.checkpoints import open_checkpoint
from selfimprove_jax.runtime import partitioning
from tests.fuzz import harness
from tests.models.checkpoints import gguf_files

_MEMORY_BYTES = 2 << 30
_EDGES = (0, 1, 2, 3, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 60, (1 << 64) - 1)


def make_file(path: pathlib.Path) -> int:
  """Writes the file, with a tokenizer; returns where its tensors' values begin."""
  tokenizer = tokenizers.train_bpe(["the cat sat on the mat"] * 3, vocab_size=280)
  vocab = tokenizer.backend.get_vocab()
  merges = json.loads(tokenizer.backend.to_str())["model"]["merges"]
  tensors = gguf_files.tensors_of("llama", True)
  gguf_files.write(
    path,
    "llama",
    tensors,
    quantization="Q8_0",
    tokenizer_model="gpt2",
    tokenizer_pre="gpt-2",
    token_list=sorted(vocab, key=vocab.get),
    token_types=[3 if token < 4 else 1 for token in range(len(vocab))],
    token_merges=[" ".join(pair) for pair in merges],
    bos_token_id=tokenizer.bos_id,
    eos_token_id=tokenizer.eos_id,
    chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
  )
  return path.read_bytes().rindex(b"blk.1.ffn_down.weight") + 64


def change_number(rng: random.Random, data: bytes) -> bytes:
  """Writes a number over some bytes: most of a header's bytes are lengths, counts, and types."""
  size, letter = rng.choice([(1, "B"), (2, "H"), (4, "I"), (8, "Q")])
  at = rng.randrange(max(1, len(data) - size))
  value = rng.choice([*_EDGES, rng.randrange(300)]) % (1 << 8 * size)
  return data[:at] + struct.pack(f"<{letter}", value) + data[at + size :]


def change_key(rng: random.Random, data: bytes) -> bytes:
  """Changes the value of one of the architecture's keys."""
  places = [at for at in range(len(data) - 6) if data[at : at + 6] == b"llama."]
  at = rng.choice(places)
  end = at + struct.unpack("<Q", data[at - 8 : at])[0]
  value = rng.choice([*_EDGES, rng.randrange(300)]) % (1 << 32)
  return data[: end + 4] + struct.pack("<I", value) + data[end + 8 :]


@contextlib.contextmanager
def opened() -> Iterator[Callable[[int], str | None]]:
  """Yields the fuzzer of one file."""
  mesh = partitioning.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  with tempfile.TemporaryDirectory() as scratch, harness.bounded_memory(_MEMORY_BYTES):
    path = pathlib.Path(scratch) / "model.gguf"
    header = make_file(path)
    whole = path.read_bytes()

    def load(loads: bool) -> None:
      checkpoint = open_checkpoint(path)
      assert checkpoint.max_positions > 0
      checkpoint.tokenizer_files()
      config = checkpoint.compute_config({"dtype": "float32"})
      if loads:  # which takes most of the time
        checkpoint.load_params(mesh, config)

    def try_seed(seed: int) -> str | None:
      rng = random.Random(seed)
      kind = rng.choice([change_number, change_number, change_key, harness.flip, harness.damage])
      damaged = kind(rng, whole[:header])
      damaged += b"" if rng.random() < 0.1 else whole[header:]
      # Another file, since the old one is still mapped, with a time of its own.
      path.unlink()
      path.write_bytes(damaged)
      os.utime(path, ns=(seed, seed))
      try:
        load(rng.random() < 0.3)
      except ValueError as error:
        return None if str(path) in str(error) else f"no name in: {str(error)[:300]}"
      return None

    load(True)
    yield try_seed


if __name__ == "__main__":
  harness.main(__doc__, opened)
