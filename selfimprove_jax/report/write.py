"""A report dict as two files: report.json and report.html."""

import json
import math
import os
from typing import Any

import numpy as np

from selfimprove_jax import storage
from selfimprove_jax.report import page


def write_report(report: dict[str, Any], folder: str | os.PathLike) -> storage.Path:
  """Writes `report.json` (numbers unrounded) and `report.html` into `folder`; gives its path.

  The page is a function of the JSON file: no date, no random ids, so the same report gives the
  same bytes (with the same matplotlib). Numbers that are not finite become null.
  """
  folder = storage.path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(_plain(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
  storage.write_atomic(folder / "report.json", text.encode())
  storage.write_atomic(folder / "report.html", page.render(json.loads(text)).encode())
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
