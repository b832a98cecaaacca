"""config.json: both of transformers' forms of RoPE, and what is refused."""

import dataclasses
import json

import pytest

from selfimprove_jax.models.checkpoints import hf_config
from selfimprove_jax.models.llama import LlamaConfig, RopeScaling

# Llama 3.1's and Qwen2.5's own files, as transformers 4 wrote them.
LLAMA = {
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": False,
  "hidden_act": "silu",
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "max_position_embeddings": 131072,
  "mlp_bias": False,
  "num_attention_heads": 32,
  "num_hidden_layers": 32,
  "num_key_value_heads": 8,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "vocab_size": 128256,
}
QWEN2 = {
  "architectures": ["Qwen2ForCausalLM"],
  "hidden_act": "silu",
  "hidden_size": 1536,
  "intermediate_size": 8960,
  "max_position_embeddings": 131072,
  "max_window_layers": 28,
  "num_attention_heads": 12,
  "num_hidden_layers": 28,
  "num_key_value_heads": 2,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": 131072,
  "tie_word_embeddings": True,
  "use_mrope": False,
  "use_sliding_window": False,
  "vocab_size": 151936,
}


@pytest.fixture
def read(tmp_path):
  def read_it(config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return hf_config.read_config(tmp_path)

  return read_it


def test_llama_3_1_8b_is_read_to_its_last_parameter(read):
  config = read(LLAMA)
  assert config == LlamaConfig(
    vocab_size=128256,
    num_layers=32,
    embed_dim=4096,
    mlp_dim=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    qk_norm=False,
    tie_embeddings=False,
    rope_theta=5e5,
    rope_scaling=RopeScaling(
      factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    ),
    norm_eps=1e-5,
  )
  assert config.num_parameters == 8_030_261_248  # as its model card counts


def test_qwen_2_5_1_5b_has_biases_and_its_unused_window_is_no_matter(read):
  config = read(QWEN2)
  assert config.qkv_bias and not config.qk_norm and config.tie_embeddings
  assert (config.head_dim, config.rope_theta) == (128, 1e6)
  assert config.num_parameters == 1_543_714_304


def test_both_ways_to_write_rope_are_the_same(read):
  scaling = LLAMA["rope_scaling"]
  without = {k: v for k, v in LLAMA.items() if k not in ("rope_scaling", "rope_theta")}
  new = without | {"rope_parameters": {**scaling, "rope_theta": 5e5}}
  assert read(new) == read(LLAMA)
  assert read({**LLAMA, "rope_scaling": None}).rope_scaling == RopeScaling()


@pytest.mark.parametrize(
  ("base", "change", "message"),
  [
    (LLAMA, {"architectures": ["MistralForCausalLM"]}, r"'MistralForCausalLM'\]; supported are"),
    (LLAMA, {"architectures": None}, r"architectures=\[\]; supported are"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    (LLAMA, {"attention_bias": True}, "attention_bias=True"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias=True"),
    (LLAMA, {"vocab_size": None}, "has no vocab_size"),
    (LLAMA, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "without low_freq_factor"),
    (LLAMA, {"rope_scaling": {"factor": 4.0}}, r"factor=4\.0 for RoPE of the type 'default'"),
    (LLAMA, {"rope_scaling": "linear"}, "rope_scaling='linear'; it must be an object"),
    (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'"),
    (LLAMA, {"model_type": "mistral"}, "model_type='mistral'; supported is 'llama'"),
    (LLAMA, {"residual_multiplier": 0.22}, r"residual_multiplier=0\.22; supported is 1\.0"),
    (
      LLAMA,
      {"final_logit_softcapping": 30.0},
      r"softcapping=30\.0; supported is a file without it",
    ),
    (LLAMA, {"num_local_experts": 8}, "num_local_experts=8; supported is False"),
    (LLAMA, {"auto_map": {"AutoModelForCausalLM": "m.Own"}}, "AutoModelForCausalLM .auto_map."),
    (QWEN2, {"use_sliding_window": True}, "use_sliding_window=True"),
    (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, r"\['sliding_attention'\]"),
  ],
)
def test_what_our_model_does_not_compute_is_refused_by_name(base, change, message, read):
  with pytest.raises(ValueError, match=message):
    read({**base, **change})


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM'; supported are"),
    ({"num_hidden_layers": "two"}, "no model: num_hidden_layers='two': must be a valid integer"),
    ({"hidden_size": -1}, "no model: hidden_size=-1: must be greater than or equal to 1"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    (
      {"num_key_value_heads": 7},
      "num_attention_heads=32 must be a multiple of num_key_value_heads=7",
    ),
    ({"rope_theta": [1]}, "rope_theta"),
    ({"layer_types": 3}, "layer_types 3; supported is 'full_attention'"),
    ({"rope_scaling": LLAMA["rope_scaling"] | {"factor": "8"}}, "factor='8'"),
  ],
)
def test_a_value_that_describes_no_model_is_refused_with_the_file(change, message, read):
  with pytest.raises(ValueError, match=rf"config\.json (describes|has) .*{message}"):
    read({**LLAMA, **change})


@pytest.mark.parametrize("text", ["[" * 10_000, '["LlamaForCausalLM"]', "\x00", "1" * 5000])
def test_a_config_that_is_no_object_is_named(text, tmp_path):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"config\.json (is not JSON|holds)"):
    hf_config.read_config(tmp_path)


def test_a_missing_and_a_broken_config_are_named(tmp_path):
  with pytest.raises(ValueError, match=r"has no config\.json"):
    hf_config.read_config(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError, match=r"config\.json is not JSON"):
    hf_config.read_config(tmp_path)


@pytest.mark.parametrize("base", [LLAMA, QWEN2])
def test_what_is_written_reads_back_as_it_was(base, read):
  config = read(base)
  assert read(hf_config.config_json(config, dtype="bfloat16", max_positions=131072)) == config


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"qk_norm": True, "qkv_bias": True}, "no architecture with qk_norm=True and qkv_bias=True"),
    ({"embed_dim": 4100}, "embed_dim=4100 is not a multiple of num_heads=32"),
  ],
)
def test_a_model_that_transformers_lacks_is_refused(change, message, read):
  config = dataclasses.replace(read(LLAMA), **change)
  with pytest.raises(ValueError, match=message):
    hf_config.config_json(config, dtype="float32", max_positions=64)
