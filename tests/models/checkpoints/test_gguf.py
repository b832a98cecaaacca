"""Tiny GGUF files, written here, against transformers' own reader."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from selfimprove_jax.models.checkpoints import open_checkpoint
from selfimprove_jax.models.llama import Llama, RopeScaling, rope_frequencies
from selfimprove_jax.runtime import partitioning

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

V, D, F, N, K, LAYERS = 64, 64, 96, 4, 2, 2
# transformers passes over the head width of a file: it takes D / N, and 128 for Qwen3.
HEAD_DIMS = {"llama": 16, "qwen2": 16, "qwen3": 128, "gemma3": 16}


def _tensors(arch, tied):
  """Name -> values, in llama.cpp's names and torch's order of axes."""
  r, H = np.random.default_rng(0), HEAD_DIMS[arch]

  def normal(*shape):
    return (0.3 * r.normal(size=shape)).astype(np.float32)

  tensors = {"token_embd.weight": normal(V, D), "output_norm.weight": 1 + normal(D)}
  if not tied:
    tensors["output.weight"] = normal(V, D)
  for layer in range(LAYERS):
    parts = {
      "attn_norm.weight": 1 + normal(D),
      "attn_q.weight": normal(N * H, D),
      "attn_k.weight": normal(K * H, D),
      "attn_v.weight": normal(K * H, D),
      "attn_output.weight": normal(D, N * H),
      "ffn_norm.weight": 1 + normal(D),
      "ffn_gate.weight": normal(F, D),
      "ffn_up.weight": normal(F, D),
      "ffn_down.weight": normal(D, F),
    }
    if arch == "qwen2":
      parts |= {f"attn_{x}.bias": normal(n * H) for x, n in (("q", N), ("k", K), ("v", K))}
    if arch == "qwen3":
      parts |= {f"attn_{x}_norm.weight": 1 + normal(H) for x in "qk"}
    tensors |= {f"blk.{layer}.{name}": value for name, value in parts.items()}
  return tensors


def _write(path, arch, tensors, *, quantization="F32", **metadata):
  """A GGUF file whose matrices are in a quantization; its values are those that it stores."""
  kind = gguf.GGMLQuantizationType[quantization]
  writer = gguf.GGUFWriter(path, arch)
  writer.add_block_count(LAYERS)
  writer.add_context_length(256)
  writer.add_embedding_length(D)
  writer.add_feed_forward_length(F)
  writer.add_head_count(N)
  writer.add_head_count_kv(K)
  writer.add_key_length(HEAD_DIMS[arch])
  writer.add_rope_freq_base(50_000.0)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_vocab_size(V)
  for key, value in metadata.items():
    getattr(writer, f"add_{key}")(value)
  stored = {}
  for name, value in tensors.items():
    if value.ndim == 2:
      data = gguf.quantize(value, kind)
      writer.add_tensor(name, data, raw_dtype=kind)
      stored[name] = gguf.dequantize(data, kind)
    else:
      writer.add_tensor(name, value)
      stored[name] = value
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return stored


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
  _write(path, arch, _tensors(arch, tied), quantization=quantization)
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
  stored = _write(
    tmp_path / "model.gguf", "qwen2", _tensors("qwen2", True), quantization=quantization
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
  tensors = _tensors("llama", True)
  _write(tmp_path / "a.gguf", "llama", {**tensors, "rope_freqs.weight": factors})
  assert open_checkpoint(tmp_path / "a.gguf").config.rope_scaling == scaling
  factors[1] *= 2
  _write(tmp_path / "b.gguf", "llama", {**tensors, "rope_freqs.weight": factors})
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
  ],
)
def test_what_our_model_does_not_compute_is_refused_by_name(arch, metadata, message, tmp_path):
  _write(tmp_path / "model.gguf", arch, _tensors(arch, True), **metadata)
  with pytest.raises(ValueError, match=message):
    _ = open_checkpoint(tmp_path / "model.gguf").config


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
  tensors = _tensors("llama", True) | change
  tensors = {name: value for name, value in tensors.items() if value is not None}
  _write(tmp_path / "model.gguf", "llama", tensors)
  with pytest.raises(ValueError, match=message):
    _load(tmp_path / "model.gguf", one_device_mesh)


def test_another_quantization_and_a_file_that_is_no_gguf_are_refused(tmp_path, one_device_mesh):
  _write(tmp_path / "model.gguf", "llama", _tensors("llama", True), quantization="Q5_0")
  with pytest.raises(ValueError, match=r"token_embd\.weight in Q5_0; supported are"):
    _load(tmp_path / "model.gguf", one_device_mesh)
  (tmp_path / "other.gguf").write_bytes(b"no model" * 9)
  with pytest.raises(ValueError, match=r"other\.gguf is not a whole GGUF file"):
    _ = open_checkpoint(tmp_path / "other.gguf").config
