"""Jobs of several processes: joining them, barriers, broadcasts, and a watchdog for hangs.

Every process of a job runs the same command. Process 0 is the main one: it writes artifacts and
logs. The others take part in what the devices compute.
"""

import atexit
import contextlib
import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

_counter = itertools.count()
# The others wait while the main process does work without devices, such as pairing a corpus. A lost
# process is noticed much sooner, by its missing heartbeats.
_BARRIER_SECONDS = 7 * 86_400
_hang_seconds: int | None = None


def initialize(
  *,
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  connect_seconds: int,
  heartbeat_seconds: int,
  hang_seconds: int,
) -> None:
  """Joins the processes of a job, before any computation; does nothing if there is only one.

  Args:
    coordinator: `host:port` of process 0. If it, `num_processes` and `process_id` are None, JAX
      asks the cluster environment (Cloud TPU, Slurm, Kubernetes, Open MPI).
    connect_seconds: how long to wait for the others.
    heartbeat_seconds: abort the job if a process misses heartbeats for this long.
    hang_seconds: see `watched`.

  Raises:
    ValueError: some of the first three are given, but not all.
    RuntimeError: the others did not connect in time.
  """
  global _hang_seconds
  given = (coordinator, num_processes, process_id)
  if None in given and given != (None, None, None):
    raise ValueError(
      f"coordinator={coordinator!r}, num_processes={num_processes} and process_id={process_id} "
      f"must be given together, or none of them"
    )
  options = dict(
    initialization_timeout=connect_seconds, heartbeat_timeout_seconds=heartbeat_seconds
  )
  if coordinator is None:
    try:
      jax.distributed.initialize(**options)
    except ValueError:  # there is no cluster environment
      return
  else:
    try:
      jax.distributed.initialize(coordinator, num_processes, process_id, **options)
    except RuntimeError as error:
      raise RuntimeError(
        f"process {process_id} of {num_processes} found no job at {coordinator} within "
        f"{connect_seconds} s: {str(error).splitlines()[0]}"
      ) from error
  _hang_seconds = hang_seconds
  if jax.default_backend() == "cpu":
    _drop_lines_of_gloo()


def _drop_lines_of_gloo() -> None:
  """Keeps from standard output what gloo, which connects CPUs, prints there at each connection."""
  shown = os.dup(1)
  read, write = os.pipe()
  sys.stdout.flush()
  encoding, errors = sys.stdout.encoding, sys.stdout.errors
  sys.stdout = os.fdopen(os.dup(shown), "w", buffering=1, encoding=encoding, errors=errors)
  os.dup2(write, 1)
  os.close(write)

  def relay() -> None:
    with os.fdopen(read, "rb") as lines:
      for line in lines:
        if not line.startswith(b"[Gloo] Rank "):
          os.write(shown, line)

  thread = threading.Thread(target=relay, name="standard output", daemon=True)
  thread.start()

  def stop() -> None:
    os.dup2(shown, 1)  # closes the pipe
    thread.join(timeout=5)

  atexit.register(stop)


def is_main() -> bool:
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Returns once every process has called it; with one process at once."""
  if jax.process_count() > 1:
    _client().wait_at_barrier(f"{name}/{next(_counter)}", _BARRIER_SECONDS * 1000)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
  """Lets the main process finish the block before the others enter it."""
  if not is_main():
    barrier(name)
  yield
  if is_main():
    barrier(name)


def from_main(make: Callable[[], Any]) -> Any:
  """Returns the result of `make` in the main process, a JSON value, to every process."""
  if jax.process_count() == 1:
    return make()
  key = f"from_main/{next(_counter)}"
  if is_main():
    _client().key_value_set(key, json.dumps(make()))
  return json.loads(_client().blocking_key_value_get(key, _BARRIER_SECONDS * 1000))


def _client() -> Any:
  # JAX's public barriers are computations, which accelerators abort after minutes.
  from jax._src.distributed import global_state

  return global_state.client


@contextlib.contextmanager
def watched(what: str) -> Iterator[Callable[[], None]]:
  """Aborts the process if the yielded function is not called for `hang_seconds`.

  For work that all processes do together: one that is alive but stuck blocks the others, and its
  heartbeats continue. Prints the stacks of all threads. With one process, nothing is watched.
  """
  if jax.process_count() == 1:
    yield lambda: None
    return
  limit = _hang_seconds
  last = time.monotonic()
  done = threading.Event()

  def beat() -> None:
    nonlocal last
    last = time.monotonic()

  def watch() -> None:
    while not done.wait(min(limit / 10, 5.0)):
      if time.monotonic() - last > limit:
        print(
          f"process {jax.process_index()} of {jax.process_count()}: {what} made no progress for "
          f"{limit} s, so this process exits. Another one hangs or is gone, or --hang_seconds is "
          f"shorter than a step. The same command continues from the last checkpoint",
          file=sys.stderr,
          flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(1)

  thread = threading.Thread(target=watch, name="watchdog", daemon=True)
  thread.start()
  try:
    yield beat
  finally:
    done.set()
    thread.join()
