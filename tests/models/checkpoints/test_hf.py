"""Hugging Face folders, against transformers itself."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch

from selfimprove_jax.models.checkpoints import hf, open_checkpoint
from selfimprove_jax.models.llama import Llama, abstract_params
from selfimprove_jax.runtime import partitioning

T = 20
# Documents of each row: alone after padding, alone before it, three packed with padding behind.
ROWS = [[(6, 14)], [(0, 17)], [(0, 5), (5, 9), (14, 3)]]
FAMILIES = (
  *("llama-3.2", "qwen2.5", "qwen3", "qwen3-embedding"),
  *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("llama-3", "llama-3.1", "smollm2", "qwen3-tied")
  ),
)


def _batch():
  tokens = np.random.default_rng(0).integers(0, 96, (len(ROWS), T)).astype(np.int32)
  positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
  for row, documents in enumerate(ROWS):
    for index, (start, length) in enumerate(documents):
      positions[row, start : start + length] = np.arange(length)
      segments[row, start : start + length] = index + 1
  return tokens, positions, segments


def _load(folder, mesh, **changes):
  checkpoint = open_checkpoint(folder)
  config = checkpoint.compute_config({"dtype": "float32", **changes})
  return config, checkpoint.load_params(mesh, config)


@functools.partial(jax.jit, static_argnames=("config", "logits"))
def _apply(params, config, tokens, positions, segments, logits):
  model = Llama(config)
  return model.apply({"params": params}, tokens, positions, segments, logits=logits)[0]


@torch.no_grad()
def _transformers(model, tokens, mask=None):
  positions = None
  if mask is not None:
    positions = torch.tensor(np.maximum(np.cumsum(mask, 1) - 1, 0))
    mask = torch.tensor(mask)
  found = model(torch.tensor(tokens), attention_mask=mask, position_ids=positions)
  return (found.logits if hasattr(found, "logits") else found.last_hidden_state).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_padded_and_packed(family, hf_model, one_device_mesh):
  model, folder = hf_model(family)
  config, params = _load(folder, one_device_mesh)
  tokens, positions, segments = _batch()
  bare = family == "qwen3-embedding"
  ours = np.asarray(_apply(params, config, tokens, positions, segments, not bare))

  mask = (segments[:2] > 0).astype(np.int64)
  padded = _transformers(model, tokens[:2], mask)
  seen = mask.astype(bool)
  np.testing.assert_allclose(ours[:2][seen], padded[seen], atol=1e-4, rtol=0)
  for start, length in ROWS[2]:
    span = slice(start, start + length)
    alone = _transformers(model, tokens[2:, span])
    np.testing.assert_allclose(ours[2, span], alone[0], atol=1e-4, rtol=0)


def test_devices_get_their_shards_whatever_files_hold_them(hf_model, tmp_path, one_device_mesh):
  model, folder = hf_model("qwen3")
  model.save_pretrained(tmp_path, max_shard_size="20KB")
  assert len(list(tmp_path.glob("*.safetensors"))) > 3
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
  _, whole = _load(folder, one_device_mesh)
  config, params = _load(tmp_path, mesh)
  expected = abstract_params(Llama(config), mesh)

  def compare(whole, sharded, leaf):
    assert sharded.sharding == leaf.sharding
    for shard in sharded.addressable_shards:
      np.testing.assert_array_equal(np.asarray(whole)[shard.index], shard.data)

  jax.tree.map(compare, whole, params, expected)
  assert "tensor" in expected["layers"]["attention"]["wq_DNH"].sharding.spec


def test_each_value_is_read_once_and_little_is_held_at_a_time(hf_model, monkeypatch):
  _, folder = hf_model("llama-3")
  reads = []
  read = hf._Weights.read

  def counted(self, name, slices):
    reads.append((name, read(self, name, slices)))
    return reads[-1][1]

  monkeypatch.setattr(hf._Weights, "read", counted)
  _load(folder, partitioning.make_mesh(data=2, fsdp=4, tensor=1))
  sharded = [(name, values) for name, values in reads if values.ndim == 2]
  stored = safetensors.numpy.load_file(folder / "model.safetensors")
  matrices = {name: values for name, values in stored.items() if values.ndim == 2}
  assert sum(v.nbytes for _, v in sharded) == sum(v.nbytes for v in matrices.values())
  # A quarter of one layer's matrix, as fsdp=4 shards it.
  assert all(v.nbytes == matrices[name].nbytes // 4 for name, v in sharded)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_is_converted_to_the_parameters_dtype(
  stored, hf_model, tmp_path, one_device_mesh
):
  model, folder = hf_model("smollm2")
  _, exact = _load(folder, one_device_mesh)
  dtype = getattr(torch, stored)
  state = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
  import safetensors.torch

  del state["lm_head.weight"]
  safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
  shutil.copy(folder / "config.json", tmp_path)
  assert open_checkpoint(tmp_path).dtype == stored
  for param_dtype in ("float32", "bfloat16"):
    _, params = _load(tmp_path, one_device_mesh, param_dtype=param_dtype)
    jax.tree.map(
      lambda x, y, d=param_dtype: np.testing.assert_array_equal(x, y.astype(stored).astype(d)),
      params,
      exact,
    )


@pytest.fixture
def damaged(hf_model, tmp_path):
  """A copy of a tied Llama's folder: change its tensors, and read it."""
  _, folder = hf_model("llama-3.2")
  shutil.copy(folder / "config.json", tmp_path)
  tensors = safetensors.numpy.load_file(folder / "model.safetensors")

  def read(mesh):
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    return _load(tmp_path, mesh)

  return tmp_path, tensors, read


def test_missing_and_extra_tensors_are_refused_by_name(damaged, one_device_mesh):
  _, tensors, read = damaged
  gate = tensors.pop("model.layers.1.mlp.gate_proj.weight")
  with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.gate_proj\.weight"):
    read(one_device_mesh)
  tensors["model.layers.1.mlp.gate_proj.weight"] = gate
  tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)  # harmless
  with pytest.raises(ValueError, match=r"model lacks: model\.layers\.0\.self_attn\.q_proj\.bias$"):
    read(one_device_mesh)


def test_a_wrong_shape_is_refused_with_both(damaged, one_device_mesh):
  _, tensors, read = damaged
  tensors["model.norm.weight"] = np.ones(31, np.float32)
  with pytest.raises(ValueError, match=r"model\.norm\.weight \(31,\) instead of \(32,\)"):
    read(one_device_mesh)


@pytest.mark.parametrize("dtype", [np.int8, np.float64])
def test_an_unsupported_dtype_is_refused_by_name(dtype, damaged, one_device_mesh):
  folder, tensors, read = damaged
  name = "model.layers.2.mlp.up_proj.weight"
  tensors[name] = tensors[name].astype(dtype)
  stored = {np.int8: "I8", np.float64: "F64"}[dtype]
  with pytest.raises(ValueError, match=rf"layers\.2\.mlp\.up_proj\.weight {stored}; supported"):
    read(one_device_mesh)
  with pytest.raises(ValueError, match=stored):
    _ = open_checkpoint(folder).dtype


def test_a_head_beside_tied_embeddings_must_be_the_embedding(damaged, one_device_mesh):
  _, tensors, read = damaged
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  read(one_device_mesh)
  tensors["lm_head.weight"][95, 3] += 1
  with pytest.raises(ValueError, match=r"lm_head\.weight is not its model\.embed_tokens\.weight"):
    read(one_device_mesh)


def test_missing_and_damaged_files_are_named(damaged, hf_model, tmp_path, one_device_mesh):
  folder, _, _ = damaged
  with pytest.raises(ValueError, match=r"has no model\.safetensors"):
    _load(folder, one_device_mesh)
  (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
  with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
    _load(folder, one_device_mesh)
  model, _ = hf_model("llama-3.2")
  model.save_pretrained(folder / "shards", max_shard_size="20KB")
  index = folder / "shards" / "model.safetensors.index.json"
  files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  (folder / "shards" / files[1]).unlink()
  with pytest.raises(ValueError, match=files[1]):
    _load(folder / "shards", one_device_mesh)


def test_a_config_that_claims_a_billion_layers_is_refused_at_once(damaged, one_device_mesh):
  folder, _, read = damaged
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
  with pytest.raises(ValueError, match=r"lacks layers: it holds tensors of 3, .* has 1000000000"):
    read(one_device_mesh)


@pytest.mark.parametrize(
  ("index", "message"),
  [
    ({}, "has no weight_map"),
    ({"weight_map": []}, "has no weight_map"),
    ({"weight_map": {"a": "../model.safetensors"}}, r"puts a into '../model\.safetensors'"),
    ({"weight_map": {"a": "/etc/passwd"}}, "puts a into '/etc/passwd', which is no file of its"),
    ({"weight_map": {"a": 3}}, "puts a into 3"),
    ({"weight_map": {"a": "."}}, r"puts a into '\.'"),
    ({"weight_map": {"a": "folder"}}, "folder is damaged"),
    ({"weight_map": {"a": "model.safetensors"}}, "does not fit its files"),
  ],
)
def test_an_index_names_files_of_its_folder(index, message, damaged, one_device_mesh):
  folder, _, read = damaged
  (folder / "folder").mkdir()
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(ValueError, match=message):
    read(one_device_mesh)
