"""Exported models, read by transformers."""

import dataclasses
import json
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.models.checkpoints import hf_export
from selfimprove_jax.models.llama import Llama, LlamaConfig, RopeScaling, abstract_params
from selfimprove_jax.runtime import partitioning

OURS = LlamaConfig(
  vocab_size=96,
  num_layers=3,
  embed_dim=32,
  mlp_dim=48,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  dtype="float32",
)
CONFIGS = {
  "Qwen3ForCausalLM": {},
  "Qwen3ForCausalLM-untied": {"tie_embeddings": False, "rope_theta": 3e4, "norm_eps": 1e-2},
  "LlamaForCausalLM": {
    "qk_norm": False,
    "rope_scaling": RopeScaling(factor=8.0, original_max_positions=16),
  },
  "Qwen2ForCausalLM": {"qk_norm": False, "qkv_bias": True, "tie_embeddings": False},
}


def _random_params(config, mesh):
  """On a mesh; norms and biases random too, so that none can go unused."""
  r = np.random.default_rng(1)

  def make(path, leaf):
    centre = 1.0 if path[-1].key == "scale" else 0.0
    values = (centre + 0.2 * r.normal(size=leaf.shape)).astype(leaf.dtype)
    return jax.device_put(values, leaf.sharding)

  return jax.tree.map_with_path(make, abstract_params(Llama(config), mesh))


def _save(folder, params, config, **options):
  options = {
    "tokenizer": None,
    "generation": None,
    "max_positions": 64,
    "dtype": "float32",
    **options,
  }
  hf_export.save_pretrained(folder, params, config, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_our_logits(name, tmp_path):
  import transformers

  config = dataclasses.replace(OURS, **CONFIGS[name])
  params = _random_params(config, partitioning.make_mesh(data=1, fsdp=4, tensor=2))
  # Files of a few tensors, and one of the embedding, which is larger than a file may be.
  _save(tmp_path / "model", params, config, max_shard_bytes=10_000)
  assert len(list((tmp_path / "model").glob("*.safetensors"))) > 5

  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
  assert type(model).__name__ == name.removesuffix("-untied")
  assert model.dtype == torch.float32 and model.config.max_position_embeddings == 64
  tokens = np.random.default_rng(0).integers(0, 96, (2, 18)).astype(np.int32)
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  params = jax.device_put(params, jax.devices()[0])
  positions = jnp.broadcast_to(jnp.arange(18), tokens.shape)
  ours, _ = jax.jit(Llama(config).apply)({"params": params}, tokens, positions)
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def params():
  return _random_params(OURS, partitioning.make_mesh(data=4, fsdp=2, tensor=1))


def test_tokenizer_and_generation_config_go_along(params, tmp_path):
  import transformers

  tokenizer = tokenizers.train_bpe(["a text of some words, words"] * 3, vocab_size=270)
  tokenizer.save(tmp_path / "tokenizer")
  generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": [tokenizer.eos_id, 7]}
  _save(tmp_path / "model", params, OURS, tokenizer=tmp_path / "tokenizer", generation=generation)
  loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
  assert loaded.encode("some words") == tokenizer.encode("some words")
  assert loaded.eos_token_id == tokenizer.eos_id
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
  assert model.generation_config.eos_token_id == [tokenizer.eos_id, 7]
  assert model.config.bos_token_id == tokenizer.bos_id


def test_the_dtype_is_that_asked_for_and_halves_the_file(params, tmp_path):
  for dtype in ("float32", "bfloat16"):
    _save(tmp_path / dtype, params, OURS, dtype=dtype)
  exact, half = (
    safetensors.numpy.load_file(tmp_path / dtype / "model.safetensors")
    for dtype in ("float32", "bfloat16")
  )
  for name, value in exact.items():
    np.testing.assert_array_equal(half[name], value.astype("bfloat16"))
  assert json.loads((tmp_path / "bfloat16/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_float16_that_would_overflow_is_refused(params, tmp_path):
  large = {**params, "embedding_VD": params["embedding_VD"] * 1e6}
  with pytest.raises(ValueError, match=r"float16 can't hold .* model\.embed_tokens\.weight"):
    _save(tmp_path / "model", large, OURS, dtype="float16")
  assert not (tmp_path / "model").exists()
  with pytest.raises(ValueError, match="dtype='int8' can't be written"):
    _save(tmp_path / "model", params, OURS, dtype="int8")


def test_a_folder_with_something_in_it_is_left_alone(params, tmp_path):
  (tmp_path / "notes").write_text("mine")
  with pytest.raises(ValueError, match="exists already"):
    _save(tmp_path, params, OURS)
  assert [path.name for path in tmp_path.iterdir()] == ["notes"]


_ONE_OF_TWO = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 2)
from selfimprove_jax.runtime import distributed
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.models.checkpoints import hf_export
from selfimprove_jax.models.checkpoints import params_checkpoint
from selfimprove_jax.models.checkpoints import open_checkpoint
index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.initialize(coordinator=f"localhost:{port}", num_processes=2, process_id=index,
                       connect_seconds=60, heartbeat_seconds=60, hang_seconds=60)
mesh = partitioning.make_mesh(data=1, fsdp=2, tensor=2)
checkpoint = open_checkpoint(f"{folder}/model")
config = checkpoint.config
params = checkpoint.load_params(mesh, config)
assert not params["layers"]["attention"]["wq_DNH"].is_fully_addressable
params_checkpoint.save_params(f"{folder}/orbax", params, config, tokenizer=None, max_positions=64)
params = open_checkpoint(f"{folder}/orbax").load_params(mesh, config)
hf_export.save_pretrained(f"{folder}/again", params, config, tokenizer=None, generation=None,
                          max_positions=64, dtype="float32")
"""


@pytest.mark.slow
def test_two_processes_read_and_write_a_model_that_neither_holds_whole(
  params, tmp_path, subprocess_options
):
  _save(tmp_path / "model", params, OURS)
  with socket.create_server(("localhost", 0)) as free:
    port = free.getsockname()[1]
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _ONE_OF_TWO, str(index), str(port), str(tmp_path)],
      stderr=subprocess.PIPE,
      **subprocess_options,
    )
    for index in range(2)
  ]
  errors = [process.communicate(timeout=120)[1] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], errors
  for name in ("config.json", "model.safetensors"):
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


_KILLED_EXPORT = """
import os, sys
from safetensors import numpy as st
from selfimprove_jax.models.checkpoints import hf_export
from selfimprove_jax.models.llama import Llama, LlamaConfig, init_params
import flax.linen as nn, jax

save, saved = st.save_file, []
def dying(*arguments, **options):
  save(*arguments, **options)
  saved.append(1)
  if len(saved) == 3:
    os._exit(9)
st.save_file = dying
config = LlamaConfig(vocab_size=96, num_layers=3, embed_dim=32, mlp_dim=48, num_heads=4,
                     num_kv_heads=2, head_dim=16)
params = nn.unbox(init_params(Llama(config), jax.random.key(0)))
hf_export.save_pretrained(sys.argv[1], params, config, tokenizer=None, generation=None,
                          max_positions=64, dtype="float32", max_shard_bytes=10_000)
"""


@pytest.mark.slow
def test_a_killed_export_leaves_no_folder_and_the_next_one_is_whole(
  params, tmp_path, subprocess_options
):
  process = subprocess.run(
    [sys.executable, "-c", _KILLED_EXPORT, str(tmp_path / "model")],
    capture_output=True,
    **subprocess_options,
  )
  assert process.returncode == 9, process.stderr
  assert not (tmp_path / "model").exists()
  _save(tmp_path / "model", params, OURS)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
  assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
    "config.json",
    "model.safetensors",
  ]
