"""The curves of a run: `metrics.jsonl`, and TensorBoard files of the same numbers.

`metrics.jsonl` holds what the run computed and nothing of when, so that an interrupted run's file
is the uninterrupted one's. Speeds go to TensorBoard only.
"""

import json
import os
import pathlib
from typing import Any

from selfimprove_jax import artifacts


class MetricsLog:
  """Appends flat dicts of numbers by step."""

  FILE = "metrics.jsonl"

  def __init__(self, folder: str | os.PathLike, *, from_step: int):
    """Goes on after `from_step`: later lines, of steps that will be made again, are dropped."""
    from tensorboardX import SummaryWriter

    folder = pathlib.Path(folder)
    self._path = folder / self.FILE
    self.records = [r for r in read_metrics(self._path) if r["step"] <= from_step]
    text = "".join(json.dumps(record) + "\n" for record in self.records)
    artifacts.write_atomic(self._path, text.encode())
    self._file = self._path.open("a", encoding="utf-8")
    self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

  @property
  def last_loss(self) -> float | None:
    """The newest training loss; None before the first."""
    losses = (r["train/loss"] for r in reversed(self.records) if "train/loss" in r)
    return next(losses, None)

  def write(self, step: int, metrics: dict[str, float], *, board: bool = True) -> None:
    record = {"step": step, **metrics}
    self.records.append(record)
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()
    if board:
      self.board(step, metrics)

  def board(self, step: int, metrics: dict[str, float]) -> None:
    """To TensorBoard only: numbers that another run of the same steps would not repeat."""
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)

  def close(self) -> None:
    self._file.close()
    self._board.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The records of a `metrics.jsonl`; a last line torn by a crash is left out."""
  path = pathlib.Path(path)
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith("\n")]
