"""The curves of a run: `metrics.jsonl`, and TensorBoard files of the same numbers.

`metrics.jsonl` holds what the run computed and nothing of when, so that an interrupted run's file
is the uninterrupted one's. Speeds go to `speed.jsonl` and TensorBoard.
"""

import json
import os
from typing import Any

from selfimprove_jax import storage


class MetricsLog:
  """Appends flat dicts of numbers by step."""

  FILE = "metrics.jsonl"
  SPEED_FILE = "speed.jsonl"

  def __init__(self, folder: str | os.PathLike, *, from_step: int, writes: bool = True):
    """Goes on after `from_step`: later lines, of steps that will be made again, are dropped.

    Args:
      writes: False keeps the records in memory only, as the processes beside the main one do.
    """
    folder = storage.path(folder)
    path = folder / self.FILE
    self.records = [r for r in read_metrics(path) if r["step"] <= from_step]
    self._file = self._speed_file = self._board = None
    if writes:
      from tensorboardX import SummaryWriter

      text = "".join(json.dumps(record) + "\n" for record in self.records)
      self._file = storage.LineLog(path, text=text)
      self._speed_file = storage.LineLog(folder / self.SPEED_FILE)
      self._board_folder = folder / "tensorboard"
      self._local_board = storage.scratch(self._board_folder)
      self._board = SummaryWriter(str(self._local_board), purge_step=from_step + 1)

  @property
  def last_loss(self) -> float | None:
    """The newest training loss; None before the first."""
    losses = (r["train/loss"] for r in reversed(self.records) if "train/loss" in r)
    return next(losses, None)

  def write(self, step: int, metrics: dict[str, float], *, board: bool = True) -> None:
    record = {"step": step, **metrics}
    self.records.append(record)
    if self._file is not None:
      self._file.write(json.dumps(record) + "\n")
    if board:
      self._to_board(step, metrics)

  def write_speed(self, step: int, summary: dict[str, Any]) -> None:
    """A `speed.Clock`'s summary, which another run of the same steps would not repeat."""
    if self._speed_file is None:
      return
    self._speed_file.write(json.dumps({"step": step, **summary}) + "\n")
    shown = {"tokens_per_second": summary["tokens_per_second"], "goodput": summary["goodput"]}
    if summary["mfu"] is not None:
      shown["mfu"] = summary["mfu"]
    self._to_board(step, {f"speed/{name}": value for name, value in shown.items()})

  def _to_board(self, step, metrics):
    if self._board is not None:
      for name, value in metrics.items():
        self._board.add_scalar(name, value, step)

  def sync(self) -> None:
    """Brings an object store, which can't append, up to date; on a disk all is there already."""
    for file in (self._file, self._speed_file):
      if file is not None:
        file.sync()
    if self._board is not None and storage.is_remote(self._board_folder):
      self._board.flush()
      storage.upload(self._local_board, self._board_folder)

  def close(self) -> None:
    self.sync()
    for file in (self._file, self._speed_file, self._board):
      if file is not None:
        file.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The records of a `metrics.jsonl`; a last line torn by a crash is left out."""
  path = storage.path(path)
  if not path.exists():
    return []
  lines = path.read_bytes().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith(b"\n")]
