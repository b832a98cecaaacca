"""Makes stages of a run, killed in turn before and after each of their writes: RUN STAGE STAGE ...

Prints how often each was killed before it was done. Not a test; test_resume.py runs it.
"""

import itertools
import os
import pathlib
import signal
import sys
import traceback

from selfimprove_jax.pipelines import (  # noqa: F401, imported once, before the forks
  pair_stages,
  runner,
  stages,
  synthesis_stages,
  text_stages,
)
from selfimprove_jax.progress import Progress


def main() -> None:
  run_folder, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
  by_name = {stage.name: stage for stage in runner.build(runner.read_config(run_folder))}
  for name in names:
    for attempt in itertools.count():
      if not _is_killed(by_name[name], run_folder, attempt):
        print(name, attempt, flush=True)
        break


def _is_killed(stage, run_folder, attempt) -> bool:
  child = os.fork()
  if child == 0:
    try:
      _kill_at(attempt)
      stages.run_stage(stage, run_folder, Progress(quiet=True))
      os._exit(0)
    except BaseException:
      traceback.print_exc()
      os._exit(1)
  _, status = os.waitpid(child, 0)
  if os.WIFSIGNALED(status):
    return True
  if status:
    sys.exit(f"{stage.name} failed")
  return False


def _kill_at(attempt: int) -> None:
  """From here on, rename number `attempt // 2` is this process's last act, or is not made."""
  count = itertools.count()
  rename = pathlib.Path.replace

  def replace(self, target):
    here = next(count) == attempt // 2
    if here and attempt % 2 == 0:
      os.kill(os.getpid(), signal.SIGKILL)
    rename(self, target)
    if here:
      os.kill(os.getpid(), signal.SIGKILL)

  pathlib.Path.replace = replace


if __name__ == "__main__":
  main()
