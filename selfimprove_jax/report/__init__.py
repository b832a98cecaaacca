"""Reports: the findings of a run as data, and renderers for HTML, the terminal, and JSON.

made = pipeline.report(run)
page = report.write(made, folder)
print(report.to_terminal(made))
"""

import json
import math
import os
from typing import Any

import numpy as np

from selfimprove_jax.report.blocks import Report
from selfimprove_jax.runs import storage


def write(report: Report, folder: str | os.PathLike) -> storage.Path:
  """Writes `report.json` and `report.html` into `folder` and returns the path of the page.

  The files hold no date and no random ids: the same report gives the same bytes.
  """
  from selfimprove_jax.report import page

  folder = storage.path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  storage.write_atomic(folder / "report.json", to_json(report).encode())
  storage.write_atomic(folder / "report.html", page.render(report).encode())
  return folder / "report.html"


def to_terminal(report: Report, *, examples: bool = False, width: int = 100) -> str:
  """Returns the summary and the claims as text; `examples` adds every other section."""
  from selfimprove_jax.report import terminal

  return terminal.render(report, examples=examples, width=width)


def to_json(report: Report) -> str:
  """Returns the report's data as JSON, numbers unrounded; NaN and infinity become null."""
  data = {"title": report.title, "command": report.command, **report.data}
  return json.dumps(_plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
  """Converts NumPy numbers and arrays to Python's, and tuples to lists."""
  if isinstance(value, dict):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, np.ndarray | np.generic):
    return _plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
