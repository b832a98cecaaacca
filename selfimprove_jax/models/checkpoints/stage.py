"""Loads the model that a stage of a run has trained."""

import functools
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from jax.sharding import Mesh

import selfimprove_jax.models.checkpoints.params_checkpoint as params_checkpoint
import selfimprove_jax.models.checkpoints.tokenizer_files as tokenizer_files
from selfimprove_jax.models.checkpoints.checkpoint import Checkpoint
from selfimprove_jax.models.checkpoints.tokenizer_files import TokenizerFiles
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.runs import artifacts

_FOLDER = "checkpoints"


class StageCheckpoint(Checkpoint):
  """The folder of a stage that trained a model, as in `runs/sbp_quick/arms/sbp`."""

  kind = "stage"

  def __init__(self, path: str | os.PathLike, *, step: int | None):
    """Opens a stage.

    Raises:
      ArtifactError: the stage is unfinished or damaged.
      ValueError: it trained no model, or saved no checkpoint of this step.
    """
    super().__init__(path)
    self._summary = artifacts.open_artifact(self.path).summary
    if not {"model", "step", "checksums"} <= self._summary.keys():
      raise ValueError(f"the stage {self.path} trained no model")
    self.step = self._summary["step"] if step is None else step
    steps = sorted(int(p.name) for p in (self.path / _FOLDER).iterdir() if p.name.isdigit())
    if self.step not in steps:
      raise ValueError(f"{self.path} has no checkpoint of step {self.step}; it has {steps}")

  @functools.cached_property
  def config(self) -> LlamaConfig:
    return params_checkpoint.parse_config({**self._summary["model"], "dropout_rate": 0.0})

  @property
  def max_positions(self) -> int:
    """The length of the rows that the model was trained on."""
    config = json.loads((self.path / "config.json").read_bytes())["config"]
    return config["seq_len"] if "seq_len" in config else config["training"]["seq_len"]

  def load_params(self, mesh: Mesh, config: LlamaConfig) -> Any:
    folder = self.path / _FOLDER / str(self.step)
    if self.step == self._summary["step"]:
      checksums = self._summary["checksums"]
    else:
      checksums = json.loads((folder / "checksums" / "metadata").read_bytes())["params"]
    saved_dtype = self.config.param_dtype
    return params_checkpoint.restore(folder / "params", mesh, config, saved_dtype, checksums)

  def tokenizer_files(self) -> TokenizerFiles:
    # `data.packing` begins every training text with BOS.
    return tokenizer_files.read_tokenizer(self._tokenizer_folder(), begins_with_bos=True)

  def _tokenizer_folder(self) -> pathlib.Path:
    for parent in self.path.resolve().parents:
      if (parent / "tokenizer" / "manifest.json").exists():
        return artifacts.open_artifact(parent / "tokenizer").path("tokenizer")
    raise ValueError(f"no folder above {self.path} has a stage named tokenizer")

  def _paths(self) -> Iterable[pathlib.Path]:
    # Not the logs, which a stage appends to.
    yield from (self.path / "config.json", self.path / "manifest.json")
    yield from (p for p in (self.path / _FOLDER / str(self.step)).rglob("*") if p.is_file())
