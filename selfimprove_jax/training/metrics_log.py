"""Writes the curves of a run: `metrics.jsonl`, and the same numbers to TensorBoard files.

If the environment names a Weights & Biases project (`WANDB_PROJECT`), they go there too.

`metrics.jsonl` holds no times, so an interrupted run ends with the same file as an uninterrupted
one. Speeds go to `speed.jsonl` and TensorBoard.
"""

import hashlib
import json
import os
from typing import Any

from selfimprove_jax.runs import storage


class MetricsLog:
  """Appends flat dicts of numbers, one record per step and kind."""

  FILE = "metrics.jsonl"
  SPEED_FILE = "speed.jsonl"

  def __init__(self, folder: str | os.PathLike, *, from_step: int, writes: bool = True):
    """Opens the log after `from_step`; drops later lines, whose steps will be computed again.

    Args:
      writes: False keeps the records in memory only, for all but the main process of a job.
    """
    folder = storage.path(folder)
    path = folder / self.FILE
    self.records = [r for r in read_metrics(path) if r["step"] <= from_step]
    self._file = self._speed_file = self._board = self._wandb = None
    if writes:
      from tensorboardX import SummaryWriter

      text = "".join(json.dumps(record) + "\n" for record in self.records)
      self._file = storage.LineLog(path, text=text)
      self._speed_file = storage.LineLog(folder / self.SPEED_FILE)
      self._board_folder = folder / "tensorboard"
      self._local_board = storage.scratch(self._board_folder)
      self._board = SummaryWriter(str(self._local_board), purge_step=from_step + 1)
      if os.environ.get("WANDB_PROJECT"):
        self._wandb = _wandb_run(folder)

  @property
  def last_loss(self) -> float | None:
    """Returns the newest training loss; None before the first."""
    losses = (r["train/loss"] for r in reversed(self.records) if "train/loss" in r)
    return next(losses, None)

  def write(self, step: int, metrics: dict[str, float], *, board: bool = True) -> None:
    """Appends a record; with `board`, also a point of each TensorBoard curve."""
    record = {"step": step, **metrics}
    self.records.append(record)
    if self._file is not None:
      self._file.write(json.dumps(record) + "\n")
    if board:
      self._to_board(step, metrics)

  def write_speed(self, step: int, summary: dict[str, Any]) -> None:
    """Appends the summary of a `speed.Clock` to `speed.jsonl` and TensorBoard."""
    if self._speed_file is None:
      return
    self._speed_file.write(json.dumps({"step": step, **summary}) + "\n")
    shown = {"tokens_per_second": summary["tokens_per_second"], "goodput": summary["goodput"]}
    if summary["mfu"] is not None:
      shown["mfu"] = summary["mfu"]
    self._to_board(step, {f"speed/{name}": value for name, value in shown.items()})

  def _to_board(self, step: int, metrics: dict[str, float]) -> None:
    if self._board is not None:
      for name, value in metrics.items():
        self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(metrics, step=step)

  def sync(self) -> None:
    """Uploads what was written to an object store, which can't append; does nothing on a disk."""
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
    if self._wandb is not None:
      self._wandb.finish()


def _wandb_run(folder: storage.Path) -> Any:
  """Starts or continues the Weights & Biases run of a folder.

  The client reads its other variables itself: WANDB_ENTITY, WANDB_API_KEY, WANDB_MODE.
  """
  try:
    import wandb
  except ImportError as error:
    raise ImportError(
      f"WANDB_PROJECT={os.environ['WANDB_PROJECT']} is set and wandb is not installed: "
      f"pip install 'selfimprove_jax[wandb]', or unset the variable"
    ) from error
  name = "/".join(folder.parts[-3:])
  # One id per folder: an interrupted run goes on in the same curves.
  run_id = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
  local = storage.scratch(folder / "wandb")
  local.mkdir(parents=True, exist_ok=True)
  return wandb.init(id=run_id, name=name, resume="allow", dir=str(local))


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads a `metrics.jsonl`; ignores a last line that a crash cut off."""
  path = storage.path(path)
  if not path.exists():
    return []
  lines = path.read_bytes().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith(b"\n")]
