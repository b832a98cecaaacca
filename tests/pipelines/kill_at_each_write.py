"""Makes stages of a run, each killed once at every file it is about to write: RUN STAGE STAGE ...

Prints where each was killed before it was done. Not a test; test_resume.py runs it.
"""

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
    points: list[str] = []
    while point := _killed_at(by_name[name], run_folder, points):
      points.append(point)
    print(name, *points, flush=True)


def _killed_at(stage, run_folder, points) -> str:
  """Runs the stage up to the first point that is not among `points`; "" if it came to its end."""
  read, write = os.pipe()
  child = os.fork()
  if child == 0:
    try:
      _die_at_a_new_point(points, write)
      stages.run_stage(stage, run_folder, Progress(quiet=True))
      os._exit(0)
    except BaseException:
      traceback.print_exc()
      os._exit(1)
  os.close(write)
  with os.fdopen(read) as pipe:
    point = pipe.read()
  _, status = os.waitpid(child, 0)
  if not os.WIFSIGNALED(status) and status:
    sys.exit(f"{stage.name} failed")
  return point


def _die_at_a_new_point(points: list[str], pipe: int) -> None:
  """From here on, this process is killed before it renames a file, or after an important one."""
  rename = pathlib.Path.replace

  def pass_by(point):
    if point not in points:
      os.write(pipe, point.encode())
      os.kill(os.getpid(), signal.SIGKILL)

  def replace(self, target):
    pass_by(f"before:{target.name}")
    rename(self, target)
    if target.name in ("config.json", "manifest.json"):
      pass_by(f"after:{target.name}")

  pathlib.Path.replace = replace


if __name__ == "__main__":
  main()
