"""Tiny GGUF files, written here, against transformers' own reader."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from selfimprove_jax.models.checkpoints import open_checkpoint
from selfimprove_jax.models.llama import Llama, RopeScaling, rope_frequencies
from selfimprove_jax.runtime import partitioning

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
from tests.models.checkpoints.gguf_files import D, K, N, V, tensors_of, write  # noqa: E402


def _load(path, mesh, **changes):
  checkpoint = open_checkpoint(path)
  config = checkpoint.compute_config({"dtype": "float32", **changes})
  return config, checkpoint.load_params(mesh, config)


@pytest.mark.parametrize(
  ("arch", "quantization", "tied"),
  [
    ("llama", "Q8_0", True),
    ("llama", "Q4_1", False),
    ("qwen2", "F16", True),
    ("qwen3", "F32", False),
  ],
)
def test_logits_are_those_of_transformers_on_the_same_file(
  arch, quantization, tied, tmp_path, one_device_mesh
):
  import transformers

  path = tmp_path / "model.gguf"
  write(path, arch, tensors_of(arch, tied), quantization=quantization)
  config, params = _load(path, one_device_mesh)
  assert (config.tie_embeddings, config.norm_eps, config.rope_theta) == (tied, 1e-5, 5e4)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file=path.name, dtype=torch.float32
  ).eval()
  tokens = np.random.default_rng(1).integers(0, V, (2, 12)).astype(np.int32)
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
  ours, _ = jax.jit(Llama(config).apply)({"params": params}, tokens, positions)
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_every_supported_type_is_dequantized_onto_a_mesh(quantization, tmp_path):
  stored = write(
    tmp_path / "model.gguf", "qwen2", tensors_of("qwen2", True), quantization=quantization
  )
  mesh = partitioning.make_mesh(data=1, fsdp=4, tensor=2)
  _, params = _load(tmp_path / "model.gguf", mesh, param_dtype="bfloat16")
  attention = params["layers"]["attention"]
  expected = stored["blk.1.attn_k.weight"].reshape(K, 16, D).transpose(2, 0, 1)
  np.testing.assert_array_equal(attention["wk_DKH"][1], expected.astype("bfloat16"))
  assert len(attention["wk_DKH"].sharding.device_set) == 8
  np.testing.assert_array_equal(
    params["embedding_VD"], stored["token_embd.weight"].astype("bfloat16")
  )


def test_llama_3_1_s_rope_scaling_is_recognized_from_its_factors(tmp_path):
  scaling = RopeScaling(factor=32.0)
  factors = rope_frequencies(16, 5e4, RopeScaling()) / rope_frequencies(16, 5e4, scaling)
  assert factors.max() == pytest.approx(32) and factors.min() == pytest.approx(1)
  tensors = tensors_of("llama", True)
  write(tmp_path / "a.gguf", "llama", {**tensors, "rope_freqs.weight": factors})
  assert open_checkpoint(tmp_path / "a.gguf").config.rope_scaling == scaling
  factors[1] *= 2
  write(tmp_path / "b.gguf", "llama", {**tensors, "rope_freqs.weight": factors})
  with pytest.raises(ValueError, match=r"rope_freqs\.weight that is not Llama 3\.1's"):
    _ = open_checkpoint(tmp_path / "b.gguf").config


@pytest.mark.parametrize(
  ("arch", "metadata", "message"),
  [
    ("gemma3", {}, "architecture 'gemma3'; supported are"),
    ("llama", {"expert_count": 8}, r"llama\.expert_count=8"),
    ("llama", {"rope_dimension_count": 8}, r"rope\.dimension_count=8; supported is 16"),
    ("qwen2", {"sliding_window": 128}, r"attention\.sliding_window=128"),
    ("qwen3", {"rope_scaling_type": gguf.RopeScalingType.YARN}, r"rope\.scaling\.type='yarn'"),
    (
      "llama",
      {"rope_scaling_factor": 4.0},
      r"rope\.scaling\.factor=4\.0; supported is 0\.0 or 1\.0",
    ),
    ("llama", {"rope.scale_linear": 2.0}, r"llama\.rope\.scale_linear=2\.0"),
    ("llama", {"attention.scale": 0.5}, r"attention\.scale=0\.5; supported is 0\.0"),
    ("llama", {"logit_scale": 0.0625}, r"logit_scale=0\.0625"),
    ("llama", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0"),
    ("llama", {"value_length": 8}, r"value_length=8; supported is 16"),
    ("llama", {"swin_norm": 1}, r"llama\.swin_norm=True, which may change what the model computes"),
    ("llama", {"head_count": [4, 4]}, r"no model: llama\.attention\.head_count=\[4, 4\]: must be"),
    ("llama", {"kv_heads": [2, 2]}, r"head_count_kv=\[2, 2\]: must be"),
    (
      "llama",
      {"kv_heads": 3},
      "head_count=4 must be a multiple of llama.attention.head_count_kv=3",
    ),
    ("llama", {"context_length": 0}, "context_length=0; it must be a positive integer"),
  ],
)
def test_what_our_model_does_not_compute_is_refused_by_name(arch, metadata, message, tmp_path):
  write(tmp_path / "model.gguf", arch, tensors_of(arch, True), **metadata)
  checkpoint = open_checkpoint(tmp_path / "model.gguf")
  with pytest.raises(ValueError, match=message):
    _ = (checkpoint.config, checkpoint.max_positions)


def test_a_file_without_head_count_kv_has_as_many_as_heads(tmp_path):
  write(tmp_path / "model.gguf", "llama", tensors_of("llama", True), kv_heads=None)
  assert open_checkpoint(tmp_path / "model.gguf").config.num_kv_heads == N


def test_keys_that_leave_the_model_as_it_is_are_harmless(tmp_path):
  none = {"rope.scaling.factor": 1.0, "expert_count": 0, "logit_scale": 1.0, "value_length": 16}
  tensors = tensors_of("llama", True)
  write(tmp_path / "a.gguf", "llama", tensors)
  write(tmp_path / "b.gguf", "llama", tensors, **none, tensor_data_layout="Meta AI original pth")
  a, b = (open_checkpoint(tmp_path / name).config for name in ("a.gguf", "b.gguf"))
  assert a == b


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"blk.1.ffn_up.weight": None}, r"lacks blk\.1\.ffn_up\.weight"),
    ({"blk.0.attn_q.bias": np.zeros(D, np.float32)}, r"model lacks: blk\.0\.attn_q\.bias"),
    (
      {"blk.0.attn_q.weight": np.zeros((D, D + 32), np.float32)},
      r"\(64, 96\) instead of \(64, 64\)",
    ),
  ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, message, tmp_path, one_device_mesh):
  tensors = tensors_of("llama", True) | change
  tensors = {name: value for name, value in tensors.items() if value is not None}
  write(tmp_path / "model.gguf", "llama", tensors)
  with pytest.raises(ValueError, match=message):
    _load(tmp_path / "model.gguf", one_device_mesh)


def test_another_quantization_and_a_file_that_is_no_gguf_are_refused(tmp_path, one_device_mesh):
  write(tmp_path / "model.gguf", "llama", tensors_of("llama", True), quantization="Q5_0")
  with pytest.raises(ValueError, match=r"token_embd\.weight in Q5_0; supported are"):
    _load(tmp_path / "model.gguf", one_device_mesh)
  (tmp_path / "other.gguf").write_bytes(b"no model" * 9)
  with pytest.raises(
    ValueError, match=r"other\.gguf is not a whole GGUF file: it begins with b'no m"
  ):
    _ = open_checkpoint(tmp_path / "other.gguf").config


def test_a_config_that_claims_a_billion_layers_is_refused_at_once(tmp_path, one_device_mesh):
  write(tmp_path / "model.gguf", "llama", tensors_of("llama", True), block_count=10**9)
  with pytest.raises(ValueError, match=r"lacks layers: it holds tensors of 2, .* has 1000000000"):
    _load(tmp_path / "model.gguf", one_device_mesh)


def test_a_file_cut_anywhere_is_named(tmp_path):
  path = tmp_path / "model.gguf"
  write(path, "llama", tensors_of("llama", True), quantization="Q8_0")
  whole, reader = path.read_bytes(), gguf.GGUFReader(path)
  last = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
  del reader  # it maps the file
  for length in [*range(0, 1500, 7), *range(1500, last, 1999), last - 1]:
    path.write_bytes(whole[:length])
    os.utime(path, ns=(length, length))  # a file that was replaced within a tick of the clock
    with pytest.raises(ValueError, match=r"model\.gguf is not a whole GGUF file: "):
      _ = open_checkpoint(path).config
