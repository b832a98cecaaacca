"""Schedules operating-system processes: dependencies, slots, retries, signals and logs.

A task is one or more processes; if one fails, the others are terminated.
"""

import contextlib
import dataclasses
import graphlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import TextIOWrapper
from typing import Any

_POLL_SECONDS = 0.05
_NOT_STARTED = 127  # the exit code by which a shell reports a command that it cannot execute


class Stopped(SystemExit):
  """Exits as SIGINT or SIGTERM would, after the signal has stopped all tasks."""

  def __init__(self, signum: int) -> None:
    super().__init__(128 + signum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
  """Describes one process of a task.

  Attributes:
    environment: variables set on top of this process's environment.
    log: file to which stdout and stderr are appended; None relays them to our stdout by line.
  """

  argv: Sequence[str]
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
  stdin: bytes = b""
  log: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """Describes processes that start together.

  Attributes:
    make: slot -> the processes of one attempt; called when the attempt starts.
    after: names of tasks that must succeed first; if one does not, this task does not run.
    retries: how often a failing attempt is repeated.
    pass_fds: file descriptors that the processes inherit, such as that of a lock.
  """

  name: str
  make: Callable[[Any], Sequence[Process]]
  after: frozenset[str] = frozenset()
  retries: int = 0
  pass_fds: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
  """Describes how one attempt of a task ended.

  Attributes:
    attempt: counts from 1.
    process: index of the process that failed first; 0 if none did.
    returncode: 0, or that of `process`: -N for signal N, 127 if it could not be started.
    stopped: we terminated the attempt, because of a signal to us or because another task failed.
  """

  task: str
  attempt: int
  returncode: int
  process: int
  seconds: float
  stopped: bool


def run(
  tasks: Sequence[Task],
  *,
  slots: Sequence[Any],
  grace_seconds: float = 120.0,
  stop_on_failure: bool = False,
  on_start: Callable[[Task, int], None] = lambda task, attempt: None,
  on_end: Callable[[End], None] = lambda end: None,
) -> list[End]:
  """Runs every task, at most one per slot at a time, in the given order as far as `after` allows.

  In the main thread, SIGINT or SIGTERM starts no more tasks and sends SIGTERM to the running ones,
  so that they can save; a second signal kills them at once.

  Args:
    slots: passed to `Task.make`, each to one running attempt at a time: groups of device ids, or
      just `range(n)`.
    grace_seconds: time from SIGTERM to SIGKILL.
    stop_on_failure: once a task has used up its retries, terminate the others and start no more.
    on_start: called with the task and the number of the attempt before its processes start.
    on_end: called when an attempt has ended, before a retry.

  Returns:
    The last attempt of every task that ran, in the order of their ends.

  Raises:
    Stopped: a signal came, and all processes have ended.
    ValueError: there is no slot, two tasks share a name, or `after` has a cycle or unknown names.
  """
  _check(tasks, slots)
  waiting = [(task, 1) for task in tasks]
  free = list(slots)
  running: list[_Attempt] = []
  ends: list[End] = []
  unsuccessful = {task.name for task in tasks}
  with _receiving_signals() as received:
    try:
      while waiting or running:
        failed = any(end.returncode for end in ends)
        stopping = bool(received) or (stop_on_failure and failed)
        if stopping:
          waiting = []
          for attempt in running:
            attempt.terminate()
        # Drop tasks after one that cannot succeed any more; the next round drops those after them.
        pending = {task.name for task, _ in waiting} | {attempt.task.name for attempt in running}
        waiting = [item for item in waiting if not (item[0].after & unsuccessful) - pending]
        for task, number in list(waiting):
          if free and not task.after & unsuccessful:
            waiting.remove((task, number))
            on_start(task, number)
            running.append(_Attempt(task, number, free.pop(0)))
            running[-1].start()
        for attempt in list(running):
          end = attempt.poll(grace_seconds if len(received) < 2 else 0.0, stopping)
          if end is None:
            continue
          running.remove(attempt)
          free.append(attempt.slot)
          on_end(end)
          if end.returncode and not stopping and attempt.number <= attempt.task.retries:
            waiting.append((attempt.task, attempt.number + 1))
            continue
          ends.append(end)
          if end.returncode == 0:
            unsuccessful.remove(end.task)
        time.sleep(_POLL_SECONDS)
    finally:
      for attempt in running:  # empty unless a callback raised
        attempt.kill()
        attempt.wait()
  if received:
    raise Stopped(received[0])
  return ends


def _check(tasks: Sequence[Task], slots: Sequence[Any]) -> None:
  names = [task.name for task in tasks]
  if not slots:
    raise ValueError("there is no slot to run tasks in")
  if repeated := [name for name in names if names.count(name) > 1]:
    raise ValueError(f"two tasks are named {repeated[0]!r}")
  for task in tasks:
    if unknown := sorted(task.after.difference(names)):
      raise ValueError(f"task {task.name!r} runs after {unknown[0]!r}, which is not among {names}")
  graphlib.TopologicalSorter({task.name: task.after for task in tasks}).prepare()


class _Attempt:
  """Runs one attempt of a task."""

  def __init__(self, task: Task, number: int, slot: Any) -> None:
    self.task, self.number, self.slot = task, number, slot
    self._processes: list[subprocess.Popen[str]] = []
    self._relays: list[threading.Thread] = []
    self._first_failure: tuple[int, int] | None = None
    self._began = time.monotonic()
    self._terminated_at: float | None = None

  def start(self) -> None:
    for index, described in enumerate(self.task.make(self.slot)):
      with contextlib.ExitStack() as files:
        log = None if described.log is None else files.enter_context(described.log.open("a"))
        try:
          process = _start(described, log, self.task.pass_fds)
        except OSError as error:
          line = f"{described.argv[0]} cannot be started: {error.strerror}"
          print(line, file=log or sys.stdout, flush=True)
          self._first_failure = (index, _NOT_STARTED)
          self.terminate()
          return
      self._processes.append(process)
      if process.stdout is not None:
        relay = threading.Thread(target=_relay, args=(process.stdout,), daemon=True)
        relay.start()
        self._relays.append(relay)

  def terminate(self) -> None:
    """Sends SIGTERM to every process, once."""
    if self._terminated_at is None:
      self._terminated_at = time.monotonic()
      for process in self._processes:
        process.terminate()

  def kill(self) -> None:
    for process in self._processes:
      if process.returncode is None:
        _kill_group(process)

  def wait(self) -> None:
    for process in self._processes:
      process.wait()
    for relay in self._relays:
      relay.join(timeout=5)  # the pipe stays open if a daemon, which left the group, holds it

  def poll(self, grace_seconds: float, stopping: bool) -> End | None:
    """Returns how the attempt ended once all its processes have; None before that."""
    for index, process in enumerate(self._processes):
      if process.returncode is None and _has_exited(process):
        # Its orphans would write in the same folder as the next attempt. Kill the group before
        # reaping its leader: until then the group's number cannot be reused.
        _kill_group(process)
        if process.wait() and self._first_failure is None:
          self._first_failure = (index, process.returncode)
    if all(process.returncode is not None for process in self._processes):
      self.wait()
      index, code = self._first_failure or (0, 0)
      return End(
        task=self.task.name,
        attempt=self.number,
        returncode=code,
        process=index,
        seconds=time.monotonic() - self._began,
        stopped=stopping and code != 0,
      )
    if self._first_failure:
      self.terminate()  # a job's other processes would wait for the lost one forever
    if self._terminated_at is not None and time.monotonic() - self._terminated_at > grace_seconds:
      self.kill()
    return None


def _start(
  process: Process, log: TextIOWrapper | None, pass_fds: tuple[int, ...]
) -> subprocess.Popen:
  with tempfile.TemporaryFile() as stdin:
    # A file and not a pipe: writing to a pipe would block until the child reads it.
    stdin.write(process.stdin)
    stdin.seek(0)
    return subprocess.Popen(
      process.argv,
      env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(process.environment),
      stdin=stdin,
      stdout=subprocess.PIPE if log is None else log,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      # In its own session, Ctrl-C in a terminal reaches only us, so we decide who gets SIGTERM;
      # and one killpg reaches everything that the process started.
      start_new_session=True,
      pass_fds=pass_fds,
    )


def _relay(lines: TextIOWrapper) -> None:
  with lines:
    for line in lines:
      print(line, end="", flush=True)


def _has_exited(process: subprocess.Popen) -> bool:
  if not hasattr(os, "waitid"):  # macOS before Python 3.13: reaps, and may miss a reused group
    return process.poll() is not None
  return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_group(process: subprocess.Popen) -> None:
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _receiving_signals() -> Iterator[list[int]]:
  """Yields a list that collects the SIGINTs and SIGTERMs that arrive while the block runs."""
  received: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield received  # Python lets only the main thread set handlers
    return
  before = {
    signum: signal.signal(signum, lambda signum, _: received.append(signum))
    for signum in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield received
  finally:
    for signum, handler in before.items():
      signal.signal(signum, handler)
