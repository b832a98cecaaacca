"""What a run found: report.json, report.html and the table printed at its end.

A report is a JSON-able dict. Optional keys are marked `?`; a run without that stage leaves them
out, or gives None or nothing. An estimate is {"value", "stderr", "unit"}.

  title, command    what was run
  commit            str or None
  config            nested dict: the whole config
  versions          name -> version
  hardware          name -> what the run had
  arms              name -> {
    label, train_tokens, steps, train_flops, all_in_flops, seconds, weight_decay, dropout_rate,
    best_validation, final_validation,
    evals           {"heldout_nll": estimate, "bits_per_byte": estimate}
    passes?         source -> how often its documents were seen, 0.97
    flops_parts?    any of seed, embedding, tuning, sampling, arm -> FLOPs
    curve?          [{"step", "tokens", "train_loss" or None, "validation_loss" or None}]}
  comparison        what `evaluation.comparison.compare` returns
  stages?           [{"name", "seconds", "tokens", "flops"}], None where it does not apply
  corpus?, tokenizer?  name -> count or fact
  conditioning?     {"true_nll", "random_nll", "gap": estimate, "gate", "num_pairs"}
  relevance?        {"own", "random", "real": estimate or number, "retained_share"}
  pairs?            {"counts"?: name -> count, "recall"?: estimate, "similarities"?: [number]}
  synthesis?        source -> {"counts"?, "finish_reasons"?: name -> count,
                               "quality"?: name -> estimate}
  examples?         [{"source", "seed_id", "seed_text", "text", "finish_reason", "similarity"}];
                    an unconditional sample has None for its seed's text
  pair_examples?    [{"d1", "d2", "d1_text", "d2_text", "similarity"}]
"""

import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from selfimprove_jax import artifacts
from selfimprove_jax.report import page
from selfimprove_jax.report.table import print_table

__all__ = ["print_table", "write_report"]


def write_report(report: dict[str, Any], folder: str | os.PathLike) -> pathlib.Path:
  """Writes `report.json` (numbers unrounded) and `report.html` into `folder`; gives its path.

  The page is a function of the JSON file: no date, no random ids, so the same report gives the
  same bytes (with the same matplotlib). Numbers that are not finite become null.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(_plain(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
  artifacts.write_atomic(folder / "report.json", text.encode())
  artifacts.write_atomic(folder / "report.html", page.render(json.loads(text)).encode())
  return folder / "report.html"


def _plain(value: Any) -> Any:
  """JSON types only: NumPy numbers and arrays become Python's, tuples lists."""
  if isinstance(value, dict):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, np.ndarray | np.generic):
    return _plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
