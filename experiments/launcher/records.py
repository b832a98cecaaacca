"""What is known of each unit's attempts: a line of JSON for each that ended, beside its log.

ROOT/<experiment>/launch/<unit>.jsonl     {"argv": [...], "outcome": "complete", ...}
ROOT/<experiment>/launch/<unit>.log       what it printed; <unit>.1.log of a second process
ROOT/<experiment>/launch/<unit>.lock      held while the unit runs; its launcher's process id
"""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
from collections.abc import Iterable, Sequence
from typing import IO

from experiments.launcher.experiment import WorkUnit


def make_folder(root: str, experiment: str) -> pathlib.Path:
  """The folder of records of an experiment.

  Raises:
    ValueError: it is in an object store, or nothing can be written there.
  """
  if "://" in root:
    raise ValueError(
      f"--root={root}: this backend keeps logs and records there, which takes a folder of a file "
      f"system; an object store goes with --backend=xmanager --executor=kubernetes or vertex"
    )
  folder = pathlib.Path(root) / experiment / "launch"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{os.getpid()}.probe"
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise ValueError(
      f"--root={root}: cannot write in {folder}: {error.strerror or error}"
    ) from error
  return folder


def record_path(folder: pathlib.Path, unit: WorkUnit) -> pathlib.Path:
  return folder / f"{unit.name}.jsonl"


def log_path(folder: pathlib.Path, unit: WorkUnit, process: int = 0) -> pathlib.Path:
  return folder / (f"{unit.name}.{process}.log" if process else f"{unit.name}.log")


def read(folder: pathlib.Path, unit: WorkUnit) -> list[dict]:
  """The attempts that ended, oldest first; a line torn by a crash is passed over."""
  path = record_path(folder, unit)
  attempts = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      attempts.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return attempts


def append(
  folder: pathlib.Path,
  unit: WorkUnit,
  *,
  outcome: str,
  returncode: int,
  seconds: float,
  log: pathlib.Path,
) -> None:
  """Writes that an attempt ended.

  Args:
    outcome: `complete`, `failed`, or `stopped` where the launcher ended it.
    returncode: negative where a signal ended it, as of `subprocess`.
    log: of the process that failed first.
  """
  entry = dict(
    argv=unit.argv,
    outcome=outcome,
    returncode=returncode,
    seconds=round(seconds, 1),
    log=log.name,
  )
  with record_path(folder, unit).open("a") as file:
    file.write(json.dumps(entry) + "\n")
    file.flush()
    os.fsync(file.fileno())


def is_complete(folder: pathlib.Path, unit: WorkUnit) -> bool:
  """Whether the last attempt ended well, with the flags that the unit has now."""
  attempts = read(folder, unit)
  # The interpreter, argv[0], may have moved; what it runs is what counts.
  return bool(attempts) and (
    attempts[-1]["outcome"] == "complete" and attempts[-1]["argv"][1:] == unit.argv[1:]
  )


def last_lines(path: pathlib.Path, number: int) -> list[str]:
  """Of a log, which may be absent."""
  if not path.exists():
    return []
  return path.read_text(errors="replace").splitlines()[-number:]


def lock(folder: pathlib.Path, units: Iterable[WorkUnit]) -> dict[str, IO]:
  """Unit -> open file whose lock its processes inherit, so that it lasts as long as they do.

  Raises:
    ValueError: a unit still runs, by another launcher or left over from one that was killed.
  """
  held: dict[str, IO] = {}
  for unit in units:
    file = _lock_path(folder, unit).open("a+")
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      for other in (*held.values(), file):
        other.close()
      raise ValueError(
        f"unit {unit.name} still runs, by another launcher or after one that was killed: wait for "
        f"it or end it (its files are in {folder})"
      ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    held[unit.name] = file
  return held


def stop(folder: pathlib.Path, units: Iterable[WorkUnit]) -> None:
  """Tells the launchers that run these units to end them, and waits until they have."""
  waiting = []
  for unit in units:
    if not _lock_path(folder, unit).exists():
      continue
    file = _lock_path(folder, unit).open("a+")
    waiting.append(file)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      with contextlib.suppress(ProcessLookupError):
        os.kill(int(file.read()), signal.SIGTERM)
  for file in waiting:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.close()


def _lock_path(folder, unit):
  return folder / f"{unit.name}.lock"


def report(folder: pathlib.Path, units: Sequence[WorkUnit], *, num_lines: int = 8) -> str:
  """Every unit's state; of those that failed, exit code, log and its last lines."""
  lines = []
  for unit in units:
    attempts = read(folder, unit)
    tries = f"{len(attempts)} attempt{'' if len(attempts) == 1 else 's'}"
    if is_complete(folder, unit):
      lines.append(f"{unit.name}: complete, {tries}, {attempts[-1]['seconds']:.0f} s")
    elif not attempts:
      lines.append(f"{unit.name}: not run")
    elif attempts[-1]["outcome"] == "stopped":
      lines.append(
        f"{unit.name}: stopped after {attempts[-1]['seconds']:.0f} s; run again, it goes on"
      )
    elif attempts[-1]["outcome"] == "complete":
      lines.append(f"{unit.name}: not run with the flags it has now")
    else:
      log = folder / attempts[-1]["log"]
      lines.append(f"{unit.name}: FAILED, {tries}, exit code {attempts[-1]['returncode']}; {log}")
      lines += [f"    {line}" for line in last_lines(log, num_lines)]
  return "\n".join(lines)
