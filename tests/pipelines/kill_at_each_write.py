"""Makes stages of a run, killing each once at every file it is about to write: RUN STAGE STAGE ...

Prints the points at which each stage was killed. A program that test_resume.py runs.
"""

import os
import pathlib
import signal
import sys
import traceback

from selfimprove_jax.pipelines import registry
from selfimprove_jax.runs import runner
from selfimprove_jax.runs.stage import Stage, run_stage
from selfimprove_jax.runtime.config import parse
from selfimprove_jax.runtime.progress import Progress


def main() -> None:
  run_folder, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
  values = runner.read_config(run_folder)
  pipeline = registry.load(values["pipeline"])  # imports everything once, before the forks
  by_name = {stage.name: stage for stage in pipeline.stages(parse(pipeline.Config, values))}
  for name in names:
    points: list[str] = []
    while point := _killed_at(by_name[name], run_folder, points):
      points.append(point)
    print(name, *points, flush=True)


def _killed_at(stage: Stage, run_folder: pathlib.Path, points: list[str]) -> str:
  """Runs the stage up to the first point that is not in `points`; returns "" if it finished."""
  read, write = os.pipe()
  child = os.fork()
  if child == 0:
    try:
      _die_at_a_new_point(points, write)
      run_stage(stage, run_folder, Progress(quiet=True))
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
  """Kills this process before it renames a file to a new point, or right after important ones."""
  rename = pathlib.Path.replace

  def pass_by(point: str) -> None:
    if point not in points:
      os.write(pipe, point.encode())
      os.kill(os.getpid(), signal.SIGKILL)

  def replace(self: pathlib.Path, target: pathlib.Path) -> None:
    pass_by(f"before:{target.name}")
    rename(self, target)
    if target.name in ("config.json", "manifest.json"):
      pass_by(f"after:{target.name}")

  pathlib.Path.replace = replace


if __name__ == "__main__":
  main()
