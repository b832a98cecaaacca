"""Preemption: after SIGTERM a run saves its state and exits; the same command continues it."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preempted(SystemExit):
  """Raised once the state is saved; the process exits with 143, as if SIGTERM had killed it."""

  def __init__(self, message: str):
    super().__init__(143)
    self.message = message


_requested = threading.Event()


def install() -> None:
  """Makes SIGTERM set a flag that `requested` reads.

  In a job of several processes JAX installs its own handler, which also informs the others.
  """
  if jax.process_count() == 1:
    signal.signal(signal.SIGTERM, lambda *_: _requested.set())


def requested(step: int) -> bool:
  """Tells whether to save and exit after this step; all processes of a job agree on the step.

  Call it once at every step. SIGTERM to any one process is enough.
  """
  if jax.process_count() > 1:
    return multihost_utils.reached_preemption_sync_point(step)
  return _requested.is_set()
