"""Writes tiny GGUF files."""

import gguf
import numpy as np

V, D, F, N, K, LAYERS = 64, 64, 96, 4, 2, 2
# transformers passes over the head width of a file: it takes D / N, and 128 for Qwen3.
HEAD_DIMS = {"llama": 16, "qwen2": 16, "qwen3": 128, "gemma3": 16}


def tensors_of(arch, tied):
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


def write(path, arch, tensors, *, quantization="F32", kv_heads=K, **metadata):
  """A GGUF file whose matrices are in a quantization; its values are those that it stores."""
  kind = gguf.GGMLQuantizationType[quantization]
  writer = gguf.GGUFWriter(path, arch)
  writer.add_block_count(LAYERS)
  writer.add_context_length(256)
  writer.add_embedding_length(D)
  writer.add_feed_forward_length(F)
  writer.add_head_count(N)
  if kv_heads is not None:
    writer.add_head_count_kv(kv_heads)
  writer.add_key_length(HEAD_DIMS[arch])
  writer.add_rope_freq_base(50_000.0)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_vocab_size(V)
  for key, value in metadata.items():
    if hasattr(writer, f"add_{key}"):
      getattr(writer, f"add_{key}")(value)
    else:
      add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
      add(f"{arch}.{key}", value)
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
