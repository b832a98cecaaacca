"""Defines the interface of pretrained checkpoints of all formats."""

import abc
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from jax.sharding import Mesh

import selfimprove_jax.models.checkpoints.tokenizer_files as tokenizer_files
from selfimprove_jax.models.checkpoints.hf_config import read_json
from selfimprove_jax.models.checkpoints.tokenizer_files import TokenizerFiles
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.runs import artifacts, storage
from selfimprove_jax.runtime.config import parse, to_json
from selfimprove_jax.runtime.progress import Progress

# The fields of `LlamaConfig` that the weights were trained for; the others set how to compute.
_FIXED_BY_WEIGHTS = (
  *("vocab_size", "num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim"),
  *("qk_norm", "qkv_bias", "tie_embeddings", "rope_theta", "rope_scaling", "norm_eps"),
)
_END_BYTES = 1 << 20


class Checkpoint(abc.ABC):
  """A pretrained model at a path: its config, weights and tokenizer."""

  kind: ClassVar[str]

  def __init__(self, path: str | os.PathLike):
    self.path = storage.path(path)

  @functools.cached_property
  @abc.abstractmethod
  def config(self) -> LlamaConfig:
    """The config of the model as stored; raises ValueError for a model that we cannot compute."""

  @property
  @abc.abstractmethod
  def max_positions(self) -> int:
    """The context length that the model was made for."""

  @property
  def dtype(self) -> str:
    """The dtype of the stored weights; float32 if they have several or are quantized."""
    return self.config.param_dtype

  @abc.abstractmethod
  def load_params(
    self, mesh: Mesh, config: LlamaConfig, *, progress: Progress = Progress.QUIET
  ) -> Any:
    """Loads the parameters onto a mesh, in `config.param_dtype`.

    Args:
      config: the result of `compute_config`.
      progress: shows the bytes of the parameters that were loaded.

    Raises:
      ValueError: the tensors' names, shapes or dtypes do not fit the config.
      DamagedCheckpointError: the parameters cannot be read, or differ from the saved ones.
    """

  def compute_config(self, changes: Mapping[str, Any]) -> LlamaConfig:
    """Returns the stored config with changes in how to compute (`dtype`, `remat`, ...).

    Args:
      changes: JSON values of fields of `LlamaConfig`. Fields that the weights were trained for may
        be given, but not changed: ValueError.
    """
    stored = to_json(self.config)
    changed = parse(LlamaConfig, {**stored, **changes})
    fixed = [{name: c[name] for name in _FIXED_BY_WEIGHTS} for c in (stored, to_json(changed))]
    if lines := artifacts.differences(*fixed):
      raise ValueError(
        f"{self.path} holds another model than the config describes.\n"
        f"Differences (checkpoint -> config):\n  " + "\n  ".join(lines)
      )
    return changed

  @property
  def files(self) -> dict[str, dict[str, Any]]:
    """The size of every file, and the SHA-256 of its first and last MiB; not cached.

    Hashing whole files would take minutes for a large model. The ends contain the header of
    safetensors and GGUF files, and differ when a file was truncated or replaced.
    """
    root = self.path if self.path.is_dir() else self.path.parent
    found = {}
    for file in sorted(self._paths()):
      size = file.stat().st_size
      with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(_END_BYTES))
        opened.seek(max(opened.tell(), size - _END_BYTES))
        digest.update(opened.read())
      name = file.relative_to(root).as_posix()
      found[name] = {"bytes": size, "sha256_of_ends": digest.hexdigest()}
    return found

  @property
  def digest(self) -> str:
    """The SHA-256 of `files`, which identifies the content."""
    return artifacts.digest(self.files)

  def _paths(self) -> Iterable[pathlib.Path]:
    """Yields the files that the digest covers."""
    for path in self.path.rglob("*"):
      hidden = any(part.startswith(".") for part in path.relative_to(self.path).parts)
      if path.is_file() and not hidden:  # hidden: .git, the cache of downloads, .DS_Store
        yield path

  def tokenizer_files(self) -> TokenizerFiles:
    """Reads the tokenizer; raises ValueError if there is none."""
    return tokenizer_files.read_tokenizer(self._tokenizer_folder(), begins_with_bos=False)

  def copy_tokenizer(self, folder: str | os.PathLike) -> None:
    """Writes the tokenizer and chat template as Hugging Face's files; raises as above."""
    tokenizer_files.copy_tokenizer(self._tokenizer_folder(), folder)

  def _tokenizer_folder(self) -> pathlib.Path:
    return self.path

  @property
  def generation(self) -> dict[str, Any] | None:
    """The content of generation_config.json, else the ids of the special tokens, else None."""
    file = self.path / tokenizer_files.GENERATION_FILE
    if file.exists():
      return read_json(file)
    try:
      files = self.tokenizer_files()
    except ValueError:
      return None
    return {
      f"{kind}_id": files.backend.token_to_id(files.special_tokens[kind])
      for kind in ("bos_token", "eos_token", "pad_token")
      if kind in files.special_tokens
    }
