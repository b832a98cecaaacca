"""SIGTERM asks a run to save and leave; the same command goes on from there."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preempted(SystemExit):
  """Raised once the state is saved; the process exits with 143, as if the signal had ended it."""

  def __init__(self, message: str):
    super().__init__(143)
    self.message = message


_requested = threading.Event()


def install() -> None:
  """Lets SIGTERM set a flag that the training loop looks at between steps.

  In a job of several processes JAX has its own handler, which tells the others.
  """
  if jax.process_count() == 1:
    signal.signal(signal.SIGTERM, lambda *_: _requested.set())


def requested(step: int) -> bool:
  """Whether to save and leave after this step: True at the same step in every process of a job.

  To be asked once at every step. SIGTERM to any one process is enough.
  """
  if jax.process_count() > 1:
    return multihost_utils.reached_preemption_sync_point(step)
  return _requested.is_set()
