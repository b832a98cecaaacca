"""Makes tiny random models of the supported families with transformers."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest

_SHAPE = {
  "vocab_size": 96,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 256,
}


def _llama3(factor):
  # For a context as short as the tests' rows, so that the scaling has an effect.
  return {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": factor,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
  }


def _default(theta):
  return {"rope_type": "default", "rope_theta": theta}


# Name -> architecture, and the fields of its config other than the shape.
FAMILIES = {
  "llama-3": ("LlamaForCausalLM", {"rms_norm_eps": 1e-5, "rope_parameters": _default(5e5)}),
  "llama-3.1": ("LlamaForCausalLM", {"rms_norm_eps": 1e-5, "rope_parameters": _llama3(8.0)}),
  "llama-3.2": (
    "LlamaForCausalLM",
    {
      "rms_norm_eps": 1e-5,
      "rope_parameters": _llama3(32.0),
      "tie_word_embeddings": True,
      "head_dim": 16,
    },
  ),
  "smollm2": (
    "LlamaForCausalLM",
    {
      "rms_norm_eps": 1e-5,
      "rope_parameters": _default(1e5),
      "tie_word_embeddings": True,
      "hidden_size": 36,
      "num_attention_heads": 3,
      "num_key_value_heads": 1,
    },
  ),
  "qwen2.5": ("Qwen2ForCausalLM", {"rope_parameters": _default(1e6)}),
  "qwen3": ("Qwen3ForCausalLM", {"rope_parameters": _default(1e6), "head_dim": 16}),
  "qwen3-tied": (
    "Qwen3ForCausalLM",
    {"rope_parameters": _default(1e6), "head_dim": 16, "tie_word_embeddings": True},
  ),
  "qwen3-embedding": ("Qwen3Model", {"rope_parameters": _default(1e6), "head_dim": 16}),
}


@pytest.fixture(scope="session")
def hf_model(tmp_path_factory) -> Callable[[str], tuple[Any, pathlib.Path]]:
  """Returns a family's model with random parameters, and the folder it is saved in."""
  made: dict[str, tuple[Any, pathlib.Path]] = {}

  def make(family: str) -> tuple[Any, pathlib.Path]:
    import torch
    import transformers

    if family not in made:
      architecture, fields = FAMILIES[family]
      model_class = getattr(transformers, architecture)
      torch.manual_seed(len(made))
      model = model_class(model_class.config_class(**{**_SHAPE, **fields})).eval()
      with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that an unused one shows
          parameter.add_(0.2 * torch.randn_like(parameter))
      folder = tmp_path_factory.mktemp(family)
      model.save_pretrained(folder)
      made[family] = (model, folder)
    return made[family]

  return make
