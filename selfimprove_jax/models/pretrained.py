"""A pretrained model: of a Hugging Face folder, a GGUF file, or an orbax folder of ours.

The one entry point for what starts from a pretrained model: continued pretraining, sampling.
"""

import dataclasses
import os
import pathlib
from typing import Any

from jax.sharding import Mesh

from selfimprove_jax import artifacts
from selfimprove_jax.models import gguf, hf, hf_config, params_checkpoint
from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.models.params import abstract_params

# What the weights were trained for; the other fields of `LlamaConfig` say how to compute.
_OF_THE_WEIGHTS = (
  "vocab_size",
  "num_layers",
  "embed_dim",
  "mlp_dim",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "qk_norm",
  "qkv_bias",
  "tie_embeddings",
  "rope_theta",
  "rope_scaling",
  "norm_eps",
)


def kind(path: str | os.PathLike) -> str:
  """What lies at a path: "hf", "gguf" or "orbax".

  Raises:
    ValueError: none of them; what was looked for is named.
  """
  path = pathlib.Path(path)
  if path.is_file() and path.suffix == ".gguf":
    return "gguf"
  if (path / params_checkpoint.MODEL_FILE).is_file():
    return "orbax"
  if (path / hf_config.CONFIG_FILE).is_file():
    return "hf"
  raise ValueError(
    f"{path} holds no model: it is no .gguf file, and no folder with {hf_config.CONFIG_FILE} "
    f"(Hugging Face) or {params_checkpoint.MODEL_FILE} (our parameters in orbax)"
  )


def read_config(path: str | os.PathLike, *, changes: dict[str, Any]) -> LlamaConfig:
  """The config of the model at a path.

  Args:
    changes: fields of `LlamaConfig` to set, of those that say how to compute (`dtype`,
      `param_dtype`, `remat`, `attention`, `dropout_rate`, ...).

  Raises:
    ValueError: no model there, or one that we can't run; or `changes` would make it another model,
      with every difference named.
  """
  readers = {
    "gguf": gguf.read_config,
    "hf": hf_config.read_config,
    "orbax": params_checkpoint.read_config,
  }
  config = readers[kind(path)](path)
  unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(config)})
  if unknown:
    raise ValueError(f"changes names {unknown}, which LlamaConfig lacks")
  changed = dataclasses.replace(config, **changes)
  old, new = (
    {name: dataclasses.asdict(c)[name] for name in _OF_THE_WEIGHTS} for c in (config, changed)
  )
  lines = artifacts.differences(old, new)
  if lines:
    raise ValueError(
      f"the model at {path} can't be changed in what its weights were trained for.\n"
      f"Differences (there -> asked for):\n  " + "\n  ".join(lines)
    )
  return changed


def load_pretrained(
  path: str | os.PathLike, mesh: Mesh, *, changes: dict[str, Any]
) -> tuple[LlamaConfig, Any]:
  """The model at a path and its parameters on a mesh, in `param_dtype`.

  Args:
    path: a Hugging Face folder, a .gguf file, or a folder of `params_checkpoint`.
    changes: of `read_config`.

  Raises:
    ValueError: of `read_config`; or a tensor is missing, too many, of another shape or dtype.
    DamagedCheckpointError: the orbax folder can't be read, or is not what was saved.
  """
  config = read_config(path, changes=changes)
  abstract = abstract_params(Llama(config), mesh)
  match kind(path):
    case "gguf":
      params = gguf.load_params(path, config=config, abstract=abstract)
    case "hf":
      params = hf.load_params(path, config=config, abstract=abstract)
    case "orbax":
      params = params_checkpoint.load_params(path, abstract=abstract)
  return config, params


def read_max_positions(path: str | os.PathLike) -> int:
  """The context length that the model at a path names."""
  readers = {
    "gguf": gguf.read_max_positions,
    "hf": hf_config.read_max_positions,
    "orbax": params_checkpoint.read_max_positions,
  }
  return readers[kind(path)](path)


def tokenizer_path(path: str | os.PathLike) -> pathlib.Path:
  """The folder of the model's tokenizer.

  Raises:
    ValueError: the model brings none, or it is inside a GGUF file.
  """
  if kind(path) == "gguf":
    raise ValueError(
      f"the tokenizer of {path} is inside it: convert the file first, with "
      f"tools/convert_checkpoint.py --from={path} --to=FOLDER"
    )
  return hf.read_tokenizer_path(path)
