"""One stage in a process of its own: `python -m selfimprove_jax.pipelines.worker RUN STAGE PARENT`.

PARENT is the process id of the run that started it.
"""

import os
import sys
import threading
import time
import traceback

from selfimprove_jax import storage
from selfimprove_jax.pipelines import runner, stages
from selfimprove_jax.progress import Progress
from selfimprove_jax.training import preemption


def main() -> int:
  run_folder, name = storage.path(sys.argv[1]), sys.argv[2]
  _die_with(int(sys.argv[3]))
  preemption.install()
  (stage,) = [s for s in runner.build(runner.read_config(run_folder)) if s.name == name]
  try:
    stages.run_stage(stage, run_folder, Progress())
  except preemption.Preempted as stop:
    print(stop.message, flush=True)
    return 143
  except Exception as error:
    log = runner.log_path(run_folder, name)
    log.parent.mkdir(exist_ok=True)
    storage.write_atomic(log, traceback.format_exc().encode())
    print(f"{name}: {type(error).__name__}: {error}", flush=True)
    return 1
  return 0


def _die_with(parent: int) -> None:
  """Leaves at once when the run is killed, so that nobody writes behind the next run's back."""

  def watch():
    while os.getppid() == parent:
      time.sleep(0.2)
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
  sys.exit(main())
