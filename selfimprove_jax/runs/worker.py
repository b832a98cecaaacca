"""Runs one stage in a process of its own: `python -m selfimprove_jax.runs.worker RUN PARENT`.

The pickled stage comes on standard input. PARENT is the process id of the run that started it.
"""

import os
import pickle
import sys
import threading
import time
import traceback

from selfimprove_jax.runs import runner, storage
from selfimprove_jax.runs.stage import Stage, run_stage
from selfimprove_jax.runtime import preemption
from selfimprove_jax.runtime.progress import Progress


def main() -> int:
  run_folder, parent = storage.path(sys.argv[1]), int(sys.argv[2])
  _die_with(parent)
  preemption.install()
  stage: Stage = pickle.load(sys.stdin.buffer)
  try:
    run_stage(stage, run_folder, Progress())
  except preemption.Preempted as stop:
    print(stop.message, flush=True)
    return 143
  except Exception as error:
    log = runner.log_path(run_folder, stage.name)
    log.parent.mkdir(exist_ok=True)
    storage.write_atomic(log, traceback.format_exc().encode())
    print(f"{stage.name}: {type(error).__name__}: {error}", flush=True)
    return 1
  return 0


def _die_with(parent: int) -> None:
  """Exits when the parent has been killed, before a new run writes in the same folder."""

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(0.2)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
  sys.exit(main())
