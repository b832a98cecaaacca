"""SIGTERM asks a run to save and leave; the same command goes on from there."""

import signal
import threading


class Preempted(SystemExit):
  """Raised once the state is saved; the process exits with 143, as if the signal had ended it."""

  def __init__(self, message: str):
    super().__init__(143)
    self.message = message


_requested = threading.Event()


def install() -> None:
  """Lets SIGTERM set a flag that the training loop looks at between steps."""
  signal.signal(signal.SIGTERM, lambda *_: _requested.set())


def requested() -> bool:
  return _requested.is_set()
