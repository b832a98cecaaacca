"""Records the attempts of work units: one line of JSON when an attempt ends, next to its log.

ROOT/<experiment>/launch/<unit>.jsonl     {"argv": [...], "outcome": "complete", ...}
ROOT/<experiment>/launch/<unit>.log       stdout and stderr; <unit>.1.log of a second process
ROOT/<experiment>/launch/<unit>.lock      locked while the unit runs; holds its launcher's process
"""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import socket
from collections.abc import Iterable, Iterator, Sequence

from selfimprove_jax.launch.experiment import WorkUnit
from selfimprove_jax.launch.resource import count
from selfimprove_jax.runs.processes import End

_REPORTED_LINES = 8


def make_folder(root: str, experiment: str) -> pathlib.Path:
  """Makes the folder of an experiment's records, and checks that it is writable."""
  if "://" in root:
    raise ValueError(
      f"--root={root}: this backend keeps logs and records there and needs a folder of a file "
      f"system; an object store needs --backend=xmanager --executor=kubernetes or vertex"
    )
  folder = pathlib.Path(root) / experiment / "launch"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{os.getpid()}.probe"
    probe.write_text("")
    probe.unlink()
  except OSError as error:
    raise ValueError(f"--root={root}: cannot write in {folder}: {error.strerror}") from error
  return folder


def log_path(folder: pathlib.Path, unit: WorkUnit, process: int = 0) -> pathlib.Path:
  return folder / (f"{unit.name}.{process}.log" if process else f"{unit.name}.log")


def read(folder: pathlib.Path, unit: WorkUnit) -> list[dict]:
  """Reads the attempts that ended, oldest first; skips a line torn by a crash."""
  path = folder / f"{unit.name}.jsonl"
  attempts = []
  for line in path.read_text().splitlines() if path.exists() else []:
    with contextlib.suppress(json.JSONDecodeError):
      attempts.append(json.loads(line))
  return attempts


def append(folder: pathlib.Path, unit: WorkUnit, end: End) -> None:
  """Records how an attempt ended, and prints it."""
  outcome = "stopped" if end.stopped else "failed" if end.returncode else "complete"
  log = log_path(folder, unit, end.process)
  entry = {"argv": unit.argv, "outcome": outcome, "returncode": end.returncode}
  entry |= {"seconds": round(end.seconds, 1), "log": log.name}
  with (folder / f"{unit.name}.jsonl").open("a") as file:
    file.write(json.dumps(entry) + "\n")
    file.flush()
    os.fsync(file.fileno())
  code = f" with exit code {end.returncode}" if outcome == "failed" else ""
  print(f"{unit.name}: {outcome}{code} after {end.seconds:.1f} s; {log}", flush=True)


def is_complete(folder: pathlib.Path, unit: WorkUnit) -> bool:
  """Tells whether the last attempt succeeded with the flags that the unit has now."""
  attempts = read(folder, unit)
  # argv[0] is left out: the interpreter may have moved, and the program is what counts.
  return bool(attempts) and (
    attempts[-1]["outcome"] == "complete" and attempts[-1]["argv"][1:] == list(unit.argv[1:])
  )


@contextlib.contextmanager
def lock(folder: pathlib.Path, units: Iterable[WorkUnit]) -> Iterator[dict[str, int]]:
  """Locks units while the block runs; yields the locks' file descriptors by unit name.

  Uses flock and not `filelock`, since a unit's processes inherit the file descriptor: the lock then
  lasts as long as they do, even if the launcher is killed.

  Raises:
    ValueError: a unit still runs, under another launcher or left over from a killed one.
  """
  with contextlib.ExitStack() as stack:
    held = {}
    for unit in units:
      file = stack.enter_context(_lock_path(folder, unit).open("a+"))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise ValueError(
          f"unit {unit.name} still runs, under another launcher or left over from a killed one: "
          f"wait for it or end it (its files are in {folder})"
        ) from None
      file.truncate(0)
      file.write(f"{socket.gethostname()} {os.getpid()}")
      file.flush()
      held[unit.name] = file.fileno()
    yield held


def stop(folder: pathlib.Path, units: Iterable[WorkUnit]) -> None:
  """Sends SIGTERM to the launchers on this host that run these units, and waits for their end."""
  for wait in (False, True):  # signal all of them before waiting for the first
    for unit in units:
      if not _lock_path(folder, unit).exists():
        continue
      with _lock_path(folder, unit).open("r+") as file:
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
          host, _, pid = file.read().partition(" ")
          if host == socket.gethostname() and wait:
            fcntl.flock(file, fcntl.LOCK_EX)
          elif host == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):
              os.kill(int(pid), signal.SIGTERM)


def _lock_path(folder: pathlib.Path, unit: WorkUnit) -> pathlib.Path:
  return folder / f"{unit.name}.lock"


def report(folder: pathlib.Path, units: Sequence[WorkUnit]) -> str:
  """Formats every unit's state; for failed ones also exit code, log and its last lines."""
  lines = []
  for unit in units:
    attempts = read(folder, unit)
    last = attempts[-1] if attempts else {"outcome": "not run"}
    tries, log_lines = count(len(attempts), "attempt"), []
    match last["outcome"]:
      case "complete" if is_complete(folder, unit):
        state = f"complete, {tries}, {last['seconds']:.0f} s"
      case "complete":
        state = "not run with its present flags"
      case "stopped":
        state = f"stopped after {last['seconds']:.0f} s; the same command continues"
      case "failed":
        log = folder / last["log"]
        state = f"FAILED, {tries}, exit code {last['returncode']}; {log}"
        if log.exists():
          log_lines = log.read_text(errors="replace").splitlines()[-_REPORTED_LINES:]
      case _:
        state = "not run"
    lines += [f"{unit.name}: {state}", *(f"    {line}" for line in log_lines)]
  return "\n".join(lines)
