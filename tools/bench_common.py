"""What the bench programs share: the machine's description, a check that it is quiet, progress."""

import argparse
import os
import pathlib
import platform
import sys
import time
from types import TracebackType
from typing import Any, Self

QUIET = 0.05  # CPUs that other processes and the host's other guests may use
_began = time.monotonic()


def add_flag(parser: argparse.ArgumentParser) -> None:
  """Adds the flag `--wait_seconds`."""
  parser.add_argument(
    "--wait_seconds", type=float, default=30.0, help="how long to wait for a quiet machine"
  )


def begin(wait_seconds: float) -> dict[str, Any]:
  """Waits for a quiet machine; prints and returns its description."""
  sys.stdout.reconfigure(line_buffering=True)  # rows appear when known, through a pipe too
  deadline = time.monotonic() + wait_seconds
  while True:
    with Others() as others:
      time.sleep(1)
    if others.cpus <= QUIET:
      break
    if time.monotonic() > deadline:
      print(f"unreliable: other processes use {others.cpus:.2f} CPUs and do not end")
      break
  found = machine() | {"others_cpus_before": others.cpus}
  print(f"{found['cpu']}, {found['cores']} cores{', AVX-512' if found['avx512'] else ''}")
  return found


def machine() -> dict[str, Any]:
  """Describes the processor and the system."""
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  text = cpuinfo.read_text() if cpuinfo.exists() else ""
  names = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("model name")]
  return {
    "cpu": names[0] if names else platform.processor() or "unknown processor",
    "avx512": "avx512f" in text,
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    "platform": platform.platform(),
    "python": platform.python_version(),
  }


def note(text: str) -> None:
  """Prints a line of progress, with the time since the start, to standard error."""
  print(f"  [{time.monotonic() - _began:.0f} s] {text}", file=sys.stderr, flush=True)


class Others:
  """Measures how many CPUs other processes, and other guests of the host, used in a context.

  Attributes:
    cpus: the mean over the context; 0 where the system does not report it.
  """

  cpus = 0.0

  def __enter__(self) -> Self:
    self._began, self._before = time.perf_counter(), _others_seconds()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    seconds = time.perf_counter() - self._began
    self.cpus = max(_others_seconds() - self._before, 0.0) / max(seconds, 1e-9)

  def warn(self) -> None:
    """Says so if the numbers measured in the context can't be relied on."""
    if self.cpus > QUIET:
      # PyTorch's threads wait for each other after each operation: with one of two cores busy they
      # were 20 times slower, the engine 1.8 times.
      print(f"  unreliable: others used {self.cpus:.2f} CPUs meanwhile")


def _others_seconds() -> float:
  stat = pathlib.Path("/proc/stat")
  if not stat.exists():
    return 0.0
  ticks = list(map(int, stat.read_text().split()[1:9]))
  user, nice, system, _idle, _iowait, irq, soft, steal = ticks
  used = user + nice + system + irq + soft + steal
  return used / os.sysconf("SC_CLK_TCK") - time.process_time()
