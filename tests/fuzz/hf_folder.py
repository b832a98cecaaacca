"""Damages the files of a tiny Hugging Face folder: it loads, or an error names it.

python -m tests.fuzz.hf_folder --minutes 10 --seed 0
"""

import contextlib
import dataclasses
import json
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax

from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.models.checkpoints import hf_export, open_checkpoint, params_checkpoint
from selfimprove_jax.models.checksums import DamagedCheckpointError
from selfimprove_jax.models.llama import Llama, LlamaConfig, init_params
from selfimprove_jax.runtime import partitioning
from tests.fuzz import harness

_MEMORY_BYTES = 2 << 30
_DOCUMENTED = (ValueError, DamagedCheckpointError)
_CONFIG = LlamaConfig(
  vocab_size=264,
  num_layers=2,
  embed_dim=16,
  mlp_dim=24,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  tie_embeddings=False,
)
_VALUES = (
  *(None, True, False, 0, 1, 2, -1, 10**9, 2**70, 1.5, 0.0, -2.0, 1e300),
  *("", "x", "two", "../x", "/etc/hosts", [], [1], ["x"], {}, {"a": 1}, {"factor": 4.0}),
)
_MORE_KEYS = (
  *("rope_scaling", "rope_parameters", "hidden_act", "layer_types", "quantization_config"),
  *("auto_map", "chat_template", "eos_token", "bos_token", "eos_token_id", "added_tokens"),
)


def make_folders(root: pathlib.Path) -> None:
  """Writes a model as a Hugging Face folder in several files, and as parameters in orbax."""
  for kind in ("qwen3", "llama"):
    config = dataclasses.replace(_CONFIG, qk_norm=kind == "qwen3")
    params = nn.unbox(init_params(Llama(config), jax.random.key(0)))
    tokenizers.train_bpe(["some words"], vocab_size=264).save(root / "tokenizer")
    options = {"tokenizer": root / "tokenizer", "max_positions": 32}
    hf_export.save_pretrained(
      root / kind,
      params,
      config,
      generation={"eos_token_id": 3},
      dtype="float32",
      max_shard_bytes=30_000 if kind == "qwen3" else 10**9,
      **options,
    )
  params_checkpoint.save_params(root / "orbax", params, config, **options)


def change_value(rng: random.Random, data: bytes) -> bytes:
  """Changes or adds the value of one key, at any depth."""
  try:
    value = json.loads(data)
  except ValueError:
    return harness.flip(rng, data)
  inner = value
  while isinstance(inner, dict) and inner:
    key = rng.choice([*inner, *_MORE_KEYS]) if rng.random() < 0.3 else rng.choice(list(inner))
    if not isinstance(inner.get(key), dict) or rng.random() < 0.3:
      inner[key] = rng.choice(_VALUES)
      break
    inner = inner[key]
  return json.dumps(value).encode()


@contextlib.contextmanager
def opened() -> Iterator[Callable[[int], str | None]]:
  """Yields the fuzzer of the folders."""
  mesh = partitioning.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  with tempfile.TemporaryDirectory() as scratch, harness.bounded_memory(_MEMORY_BYTES):
    root = pathlib.Path(scratch)
    make_folders(root)
    folders = [root / kind for kind in ("qwen3", "llama", "orbax")]
    # Of orbax only our own file: the others are checked by their checksums.
    names = {f: [p.name for p in f.iterdir() if p.is_file()] for f in folders}
    names[root / "orbax"] = ["model.json"]

    def load(folder: pathlib.Path, loads: bool) -> None:
      checkpoint = open_checkpoint(folder)
      assert checkpoint.max_positions > 0 and checkpoint.dtype
      checkpoint.tokenizer_files()
      assert checkpoint.generation is not None
      config = checkpoint.compute_config({"dtype": "float32"})
      if loads:  # which takes most of the time
        checkpoint.load_params(mesh, config)

    def try_seed(seed: int) -> str | None:
      rng = random.Random(seed)
      folder, copy = rng.choice(folders), root / "copy"
      name = rng.choice(sorted(names[folder]))
      shutil.rmtree(copy, ignore_errors=True)
      shutil.copytree(folder, copy)
      data = (copy / name).read_bytes()
      if name.endswith(".safetensors"):  # its header
        data = (
          rng.choice([harness.flip, harness.cut, harness.insert])(rng, data[:2000]) + data[2000:]
        )
      else:
        data = rng.choice([change_value, change_value, harness.damage])(rng, data)
      if rng.random() < 0.02:
        (copy / name).unlink()
        if rng.random() < 0.5:
          (copy / name).mkdir()
      else:
        (copy / name).write_bytes(data)
      try:
        load(copy, rng.random() < 0.3)
      except _DOCUMENTED as error:
        return None if str(copy) in str(error) else f"{name}: no name in: {str(error)[:300]}"
      except Exception as error:
        return f"{folder.name}/{name}: {type(error).__name__}: {str(error)[:300]}"
      return None

    for folder in folders:
      load(folder, True)
    yield try_seed


if __name__ == "__main__":
  harness.main(__doc__, opened)
