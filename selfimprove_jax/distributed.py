"""Several processes as one run: how they find each other, where they meet, and how a hang ends.

Every process of a job runs the same command. Process 0 is the main one: it alone writes artefacts
and logs. All others follow: they take part in what the devices do together.
"""

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
# Processes wait for one another while the main one does what needs no devices: pairing a corpus.
# That one of them is gone is noticed by its missing heartbeats, much sooner.
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
  """Joins the processes of a job; on a machine by itself, does nothing. Before any computation.

  Args:
    coordinator: `host:port` of process 0. Without it, `num_processes` and `process_id`, the cluster
      is asked (Cloud TPU, Slurm, Kubernetes, Open MPI), if there is one.
    connect_seconds: to wait for the others at the start.
    heartbeat_seconds: a process that is silent for so long is gone, and ends the job.
    hang_seconds: see `watched`.

  Raises:
    ValueError: some of the first three are given, but not all.
    RuntimeError: the others did not come in time.
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
    except ValueError:  # no cluster to be found
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


def is_main() -> bool:
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Returns once every process is here. With one process, at once."""
  if jax.process_count() > 1:
    _client().wait_at_barrier(f"{name}/{next(_counter)}", _BARRIER_SECONDS * 1000)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
  """The main process goes through the block before the others enter it."""
  if not is_main():
    barrier(name)
  yield
  if is_main():
    barrier(name)


def from_main(make: Callable[[], Any]) -> Any:
  """What `make` gives in the main process, in every process; JSON-able."""
  if jax.process_count() == 1:
    return make()
  key = f"from_main/{next(_counter)}"
  if is_main():
    _client().key_value_set(key, json.dumps(make()))
  return json.loads(_client().blocking_key_value_get(key, _BARRIER_SECONDS * 1000))


def _client():
  # Public JAX has barriers only as computations, which accelerators give up after minutes.
  from jax._src.distributed import global_state

  return global_state.client


@contextlib.contextmanager
def watched(what: str) -> Iterator[Callable[[], None]]:
  """Ends the process with a message if the function given is not called for `hang_seconds`.

  For work that all processes do together: one that is alive but stuck holds up all the others, and
  no heartbeat tells. Stacks of all threads are printed. Nothing is watched in a job of one process.
  """
  if jax.process_count() == 1:
    yield lambda: None
    return
  limit = _hang_seconds
  last = time.monotonic()
  done = threading.Event()

  def beat():
    nonlocal last
    last = time.monotonic()

  def watch():
    while not done.wait(min(limit / 10, 5.0)):
      if time.monotonic() - last > limit:
        print(
          f"process {jax.process_index()} of {jax.process_count()}: {what} did not go on for "
          f"{limit} s, so this process ends. Another one hangs or is gone, or the limit "
          f"(--hang_seconds) is below what a step takes. The same command goes on from the last "
          f"checkpoint",
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
