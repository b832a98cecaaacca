import dataclasses
import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.models.checkpoints import (
  hf_export,
  open_checkpoint,
  params_checkpoint,
  tokenizer_files,
)
from selfimprove_jax.models.llama import Llama, LlamaConfig, abstract_params, init_params
from selfimprove_jax.runtime import partitioning

CONFIG = LlamaConfig(
  vocab_size=64, num_layers=2, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8
)


@pytest.fixture(scope="module")
def params():
  return nn.unbox(init_params(Llama(CONFIG), jax.random.key(0)))


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
  """Returns a folder with one folder of each kind."""
  folder = tmp_path_factory.mktemp("saved")
  tokenizers.train_bpe(["some words"], vocab_size=262).save(folder / "tokenizer")
  options = {"tokenizer": folder / "tokenizer", "max_positions": 32}
  hf_export.save_pretrained(
    folder / "hf", params, CONFIG, generation=None, dtype="float32", **options
  )
  params_checkpoint.save_params(folder / "orbax", params, CONFIG, **options)
  return folder


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_each_kind_of_folder_is_recognized_and_loaded_on_the_mesh(kind, saved, params):
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
  checkpoint = open_checkpoint(saved / kind)
  assert (checkpoint.kind, checkpoint.dtype, checkpoint.max_positions) == (kind, "float32", 32)
  changes = {"dtype": "float32", "param_dtype": "bfloat16", "dropout_rate": 0.1}
  config = checkpoint.compute_config(changes)
  assert config == dataclasses.replace(CONFIG, **changes)
  loaded = checkpoint.load_params(mesh, config)
  expected = abstract_params(Llama(config), mesh)

  def compare(x, leaf, saved_leaf):
    assert (x.dtype, x.sharding) == (leaf.dtype, leaf.sharding)
    np.testing.assert_array_equal(x, saved_leaf.astype("bfloat16"))

  jax.tree.map(compare, loaded, expected, params)


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_changes_to_what_the_weights_were_trained_for_are_refused(kind, saved):
  changes = {"num_layers": 3, "rope_theta": 1e4, "remat": "full", "embed_dim": 32}
  with pytest.raises(ValueError) as error:
    open_checkpoint(saved / kind).compute_config(changes)
  assert str(error.value).splitlines()[-2:] == [
    "  num_layers: 2 -> 3",
    "  rope_theta: 500000.0 -> 10000.0",
  ]
  with pytest.raises(ValueError, match=r"layers=3: there is no such knob"):
    open_checkpoint(saved / kind).compute_config({"layers": 3})
  with pytest.raises(ValueError, match=r"dtype='fp8'"):
    open_checkpoint(saved / kind).compute_config({"dtype": "fp8"})


def test_a_path_without_a_model_says_what_was_looked_for(tmp_path):
  for path in (tmp_path, tmp_path / "absent", tmp_path / "absent.gguf"):
    with pytest.raises(ValueError, match=r"neither a \.gguf file nor a folder with config\.json"):
      open_checkpoint(path)


def test_every_visible_file_counts_for_the_digest(saved, tmp_path):
  checkpoint = open_checkpoint(saved / "hf")
  before = checkpoint.digest
  assert set(checkpoint.files) >= {"config.json", "model.safetensors", "tokenizer.json"}
  (saved / "hf" / ".cache").mkdir()
  (saved / "hf" / ".cache" / "lock").write_text("x")
  assert checkpoint.digest == before == open_checkpoint(saved / "hf").digest
  weights = saved / "hf" / "model.safetensors"
  size = weights.stat().st_size
  with weights.open("r+b") as file:
    file.seek(size - 1)
    last = file.read()
    file.seek(size - 1)
    file.write(bytes([last[0] ^ 1]))
  assert checkpoint.digest != before
  with weights.open("r+b") as file:
    file.seek(size - 1)
    file.write(last)
  assert checkpoint.digest == before
  (saved / "hf" / "added.txt").write_text("x")
  assert checkpoint.digest != before
  os.remove(saved / "hf" / "added.txt")


def test_only_the_ends_of_a_large_file_are_hashed(saved):
  large = saved / "orbax" / "large"
  large.write_bytes(b"a" * (1 << 20) + b"b" * (1 << 20) + b"c" * (1 << 20))
  before = open_checkpoint(saved / "orbax").digest
  large.write_bytes(b"a" * (1 << 20) + b"x" * (1 << 20) + b"c" * (1 << 20))
  assert open_checkpoint(saved / "orbax").digest == before
  large.write_bytes(b"a" * (1 << 20) + b"x" * (1 << 20) + b"c" * ((1 << 20) - 1) + b"d")
  assert open_checkpoint(saved / "orbax").digest != before
  os.remove(large)


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_the_tokenizer_comes_with_ends_prefix_and_generation_config(kind, saved):
  checkpoint = open_checkpoint(saved / kind)
  files = checkpoint.tokenizer_files()
  tokenizer = tokenizers.make_tokenizer(files.backend, files.special_tokens, name=kind)
  assert (tokenizer.vocab_size, tokenizer.eos_token) == (262, "<|eos|>")
  assert files.eos_ids == (tokenizer.eos_id,)
  # Our own models saw BOS at the beginning of every text; this tokenizer adds none by itself.
  assert files.prefix_ids == ((tokenizer.bos_id,) if kind == "orbax" else ())
  ids = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
  assert checkpoint.generation == ids


def test_a_step_is_only_for_stages(saved):
  with pytest.raises(ValueError, match="step=3 is for a trained stage"):
    open_checkpoint(saved / "hf", step=3)


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_a_checkpoint_without_a_tokenizer_says_what_was_looked_for(kind, params, tmp_path):
  options = {"tokenizer": None, "max_positions": 32}
  if kind == "hf":
    hf_export.save_pretrained(
      tmp_path / "m", params, CONFIG, generation=None, dtype="float32", **options
    )
  else:
    params_checkpoint.save_params(tmp_path / "m", params, CONFIG, **options)
  checkpoint = open_checkpoint(tmp_path / "m")
  assert checkpoint.generation is None
  for use in (checkpoint.tokenizer_files, lambda: checkpoint.copy_tokenizer(tmp_path)):
    with pytest.raises(ValueError, match=r"no tokenizer: none of tokenizer\.json"):
      use()


def test_an_orbax_folder_of_an_earlier_version_is_read(saved, tmp_path):
  value = json.loads((saved / "orbax" / "model.json").read_text())
  value["model"] |= {"unrolled": False, "rope_scaling": None}
  (tmp_path / "model.json").write_text(json.dumps(value))
  assert open_checkpoint(tmp_path).config == CONFIG


_ASKED = """
import sys
import transformers
from selfimprove_jax.data import tokenizer
from selfimprove_jax.models.checkpoints import tokenizer_files
import pathlib
folder = pathlib.Path(sys.argv[1])
for bos in (None, False):
  try:
    if bos is None:
      tokenizer.load_tokenizer(folder)
    else:
      tokenizer_files.read_tokenizer(folder, begins_with_bos=bos)
  except ValueError as error:
    print("refused:", str(error)[:60])
"""


def test_a_folder_s_own_code_is_not_run_even_if_standard_input_says_yes(
  tmp_path, subprocess_options
):
  mark = tmp_path / "was_run"
  folder = tmp_path / "model"
  folder.mkdir()
  (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\nclass Config: pass\n")
  auto = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Config"}
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"tokenizer_class": "Own", "auto_map": auto})
  )
  (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
  (folder / "vocab.json").write_text("{}")
  found = subprocess.run(
    [sys.executable, "-c", _ASKED, folder],
    input="y\n" * 9,
    capture_output=True,
    **subprocess_options,
  )
  assert found.returncode == 0, found.stderr
  assert found.stdout.count("refused:") == 2, found.stdout
  assert not mark.exists()


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("tokenizer.json", "garbage"),
    ("tokenizer.json", "[" * 100_000),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"eos_token": 3, "tokenizer_class": "PreTrainedTokenizerFast"}'),
  ],
)
def test_a_damaged_tokenizer_is_refused_with_its_folder(name, text, tmp_path):
  tokenizers.train_bpe(["a b"], vocab_size=262).save(tmp_path)
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=f"the tokenizer of {tmp_path} can't be read"):
    tokenizer_files.read_tokenizer(tmp_path, begins_with_bos=False)
  with pytest.raises(ValueError, match=f"tokenizer '{tmp_path}' can't be read"):
    tokenizers.load_tokenizer(tmp_path)
