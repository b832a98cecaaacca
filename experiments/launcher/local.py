"""Runs work units as processes of this machine, several at a time, and tries failing ones again.

SIGINT or SIGTERM to the launcher sends SIGTERM to the units, which save and leave; run again, the
launcher passes over those that are complete and goes on with the others.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from experiments.launcher import records
from experiments.launcher.experiment import WorkUnit, shell
from experiments.launcher.resource import Resource

_POLL_S = 0.05


class Stopped(SystemExit):
  """SIGINT or SIGTERM came and the units have ended; exits as the signal would have."""

  def __init__(self, signum: int):
    super().__init__(128 + signum)


def device_groups(
  resource: Resource, *, devices: Sequence[str] | None, max_parallel: int | None
) -> list[tuple[str, ...]]:
  """One group of device ids for each unit that may run at a time; on CPU the groups are empty.

  Args:
    devices: ids of the GPUs to use, as of `nvidia-smi`; None takes those of CUDA_VISIBLE_DEVICES,
      or all.
    max_parallel: most units at a time; None is 1 on CPU and TPU, and all that fit on GPUs.

  Raises:
    ValueError: one unit wants more than this machine has.
  """
  if resource.hosts > 1:
    raise ValueError(
      f"a unit takes {resource.hosts} hosts, and --backend=local has one: use slurm or xmanager"
    )
  if max_parallel is not None and max_parallel < 1:
    raise ValueError(f"--max_parallel={max_parallel} must be 1 or more")
  if not resource.is_gpu:
    if resource.is_tpu and (max_parallel or 1) > 1:
      raise ValueError("--max_parallel must be 1 on a TPU: one process has all chips of a host")
    return [()] * (max_parallel or 1)
  found = _gpus() if devices is None else list(devices)
  need = resource.total_devices
  if need > len(found):
    raise ValueError(f"a unit takes {need} GPUs, and this machine offers {len(found)}: {found}")
  groups = [tuple(found[i : i + need]) for i in range(0, len(found) - need + 1, need)]
  return groups[:max_parallel]


def _gpus():
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  if visible is not None:
    return [name for name in visible.split(",") if name]
  names = (path.name.removeprefix("nvidia") for path in pathlib.Path("/dev").glob("nvidia*"))
  return sorted((name for name in names if name.isdecimal()), key=int)


def free_port() -> int:
  """A port of this machine that nobody listens on now."""
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]


def commands(unit: WorkUnit, group: Sequence[str]) -> list[tuple[list[str], dict[str, str]]]:
  """Arguments and added environment of each process of a unit on one group of devices."""
  coordinator = f"127.0.0.1:{free_port()}"
  made = []
  for process in range(unit.resource.processes):
    environment = dict(unit.environment)
    if unit.resource.kind == "cpu":
      environment |= cpu_environment(unit)
    elif unit.resource.is_gpu:
      own = group[process * unit.resource.devices :][: unit.resource.devices]
      environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    made.append((unit.process_argv(process, coordinator), environment))
  return made


def cpu_environment(unit: WorkUnit) -> dict[str, str]:
  """What makes JAX see the unit's number of devices on CPU cores."""
  environment = {"JAX_PLATFORMS": "cpu"}
  if unit.resource.devices > 1:
    given = unit.environment.get("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    count = f"--xla_force_host_platform_device_count={unit.resource.devices}"
    environment["XLA_FLAGS"] = f"{given} {count}".strip()
  return environment


def describe(units: Sequence[WorkUnit], groups: Sequence[Sequence[str]]) -> str:
  """The shell commands of every unit, as they would be run on the first group of devices."""
  lines = []
  for unit in units:
    lines.append(f"# {unit.number} {unit.name}")
    made = [shell(argv, environment) for argv, environment in commands(unit, groups[0])]
    lines += made if len(made) == 1 else [*(f"{line} &" for line in made), "wait"]
  return "\n".join(lines)


@dataclasses.dataclass
class _Attempt:
  """One try of a unit: its processes, all of one fate."""

  unit: WorkUnit
  group: tuple[str, ...]
  number: int
  folder: pathlib.Path
  processes: list[subprocess.Popen] = dataclasses.field(default_factory=list)
  began: float = dataclasses.field(default_factory=time.monotonic)
  first_failure: tuple[int, int] | None = None
  terminated_at: float | None = None

  def start(self, lock: IO) -> None:
    for index, (argv, environment) in enumerate(commands(self.unit, self.group)):
      with records.log_path(self.folder, self.unit, index).open("a") as log:
        log.write(f"+ {shell(argv, environment)}\n")
        log.flush()
        try:
          process = subprocess.Popen(
            argv,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
          )
        except OSError as error:
          log.write(f"{argv[0]} cannot be started: {error.strerror}\n")
          self.first_failure = (index, 127)
          self.terminate()
          return
        self.processes.append(process)

  def terminate(self) -> None:
    """Asks every process to save and leave, once."""
    if self.terminated_at is None:
      self.terminated_at = time.monotonic()
      for process in self.processes:
        process.terminate()

  def poll(self, grace_s: float) -> int | None:
    """Exit code of the unit once all its processes have ended; None before.

    One that fails takes the others with it, which would wait for it for ever.
    """
    for index, process in enumerate(self.processes):
      if process.returncode is None and _has_ended(process):
        # What it started and left behind would write in the folder beside the next attempt. As
        # long as the process is not reaped its group's number is no other's.
        self._kill(process)
        if process.wait() and self.first_failure is None:
          self.first_failure = (index, process.returncode)
    running = [process for process in self.processes if process.returncode is None]
    if not running:
      return self.first_failure[1] if self.first_failure else 0
    if self.first_failure:
      self.terminate()
    if self.terminated_at is not None and time.monotonic() - self.terminated_at > grace_s:
      for process in running:
        self._kill(process)
    return None

  @staticmethod
  def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(process.pid, signal.SIGKILL)


def _has_ended(process):
  options = os.WEXITED | os.WNOHANG | os.WNOWAIT
  return os.waitid(os.P_PID, process.pid, options) is not None


def run(
  units: Sequence[WorkUnit],
  folder: pathlib.Path,
  *,
  groups: Sequence[tuple[str, ...]],
  retries: int,
  grace_s: float,
) -> bool:
  """Runs every unit that is not complete; whether all are at the end.

  Args:
    folder: of the records, as `records.make_folder` gives it.
    groups: of devices; as many units run at a time.
    retries: how often a failing unit is started again, with the same command and folder.
    grace_s: seconds from SIGTERM to SIGKILL.

  Raises:
    Stopped: SIGINT or SIGTERM came, and the units have ended.
    ValueError: `retries` is negative, or a unit still runs elsewhere.
  """
  if retries < 0:
    raise ValueError(f"--retries={retries} must be 0 or more")
  todo = [unit for unit in units if not records.is_complete(folder, unit)]
  for unit in units:
    if unit not in todo:
      print(f"{unit.name}: complete already", flush=True)
  locks = records.lock(folder, todo)
  try:
    with _signals() as received:
      _run(todo, folder, groups, retries, grace_s, locks, received)
  finally:
    for lock in locks.values():
      lock.close()
  if received:
    raise Stopped(received[0])
  return all(records.is_complete(folder, unit) for unit in units)


def _run(todo, folder, groups, retries, grace_s, locks, received):
  waiting = collections.deque((unit, 1) for unit in todo)
  free = list(groups)
  running: list[_Attempt] = []
  while waiting or running:
    while waiting and free and not received:
      unit, number = waiting.popleft()
      attempt = _Attempt(unit, free.pop(0), number, folder)
      print(f"{unit.name}: attempt {number} of {retries + 1}", flush=True)
      attempt.start(locks[unit.name])
      running.append(attempt)
    if received:
      waiting.clear()
      for attempt in running:
        attempt.terminate()
    for attempt in list(running):
      # A second signal does not wait for units to save.
      code = attempt.poll(grace_s if len(received) < 2 else 0)
      if code is None:
        continue
      running.remove(attempt)
      free.append(attempt.group)
      _record(attempt, code, bool(received), folder)
      if code and not received and attempt.number <= retries:
        waiting.append((attempt.unit, attempt.number + 1))
    time.sleep(_POLL_S)


def _record(attempt, code, is_stopping, folder):
  outcome = "complete" if code == 0 else "stopped" if is_stopping else "failed"
  seconds = time.monotonic() - attempt.began
  index = attempt.first_failure[0] if attempt.first_failure else 0
  log = records.log_path(folder, attempt.unit, index)
  records.append(folder, attempt.unit, outcome=outcome, returncode=code, seconds=seconds, log=log)
  told = {"complete": "complete", "stopped": "stopped", "failed": f"failed with exit code {code}"}
  print(f"{attempt.unit.name}: {told[outcome]} after {seconds:.1f} s; {log}", flush=True)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """The SIGINTs and SIGTERMs that come while the block runs."""
  received: list[int] = []
  handlers: Mapping = {
    number: signal.signal(number, lambda number, _: received.append(number))
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield received
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
