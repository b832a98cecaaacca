"""Compares a section of a config with the arguments of the function that it is for."""

import importlib
import inspect
from collections.abc import Callable, Collection
from typing import Any

from selfimprove_jax.data import corpora

TRAINING = (
  *("batch_rows", "seq_len", "peak_lr", "final_lr", "warmup_fraction", "b1", "b2", "eps"),
  *("clip_norm", "accumulation_steps", "num_evaluations", "num_checkpoints", "keep", "patience"),
  *("board_every", "optimizer", "momentum_dtype", "skip_spikes"),
)
"""Keys of a section of `model_stages.train`."""


def compare(
  where: str, found: Collection[str], *, required: Collection[str], allowed: Collection[str]
) -> None:
  """Refuses missing and unknown keys.

  Raises:
    ValueError: there is one; all are named, after `where`.
  """
  missing = [key for key in required if key not in found]
  unknown = [key for key in found if key not in allowed]
  if missing or unknown:
    raise ValueError(
      f"{where} lacks {missing} and has unknown keys {unknown}; its keys are {sorted(allowed)}"
    )


def compare_with_arguments(
  section: str, values: Collection[str], function: Callable, given: Collection[str]
) -> None:
  """Compares the keys of a section with a function's arguments but those `given` from elsewhere.

  Raises:
    ValueError: see `compare`.
  """
  parameters = {
    name: p for name, p in inspect.signature(function).parameters.items() if name not in given
  }
  required = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty]
  compare(f"section {section!r}", values, required=required, allowed=parameters)


def compare_section(
  config: dict[str, Any], section: str, function: str, given: Collection[str]
) -> None:
  """`compare_with_arguments` of the section "a.b", with "module:function" of this package.

  Raises:
    ValueError: see `compare`.
  """
  values: Any = config
  for key in section.split("."):
    values = values[key]
  module, name = function.split(":")
  found = getattr(importlib.import_module(f"selfimprove_jax.{module}"), name)
  compare_with_arguments(section, values, found, given)


def check_corpus(section: str, corpus: dict[str, Any]) -> None:
  """Checks the options of a corpus, which depend on its source; nothing of it is read.

  Raises:
    ValueError: the source is unknown, or its options do not fit it.
  """
  try:  # nothing is read before the first document is asked for
    corpora.read_corpus(
      corpus["source"], on_error=corpus["on_error"], on_rejected=print, **corpus["options"]
    )
  except TypeError as error:
    raise ValueError(f"section '{section}.options' does not fit: {error}") from None
