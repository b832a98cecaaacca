"""Synthesizes twice, once undisturbed and once killed at many places: PAGE WHOLE KILLED.

Prints a JSON object: `points` at which it was killed; `repeated`, the calls that were made again
after they had been recorded; and `calls`, the number of calls of the undisturbed run. A program
that test_resume.py runs.
"""

import collections
import json
import os
import pathlib
import re
import signal
import sys
import traceback

import openai  # noqa: F401, imported once before the forks

from selfimprove_jax.pipelines import entigraph
from selfimprove_jax.runs import storage
from selfimprove_jax.runs.stage import run_stage
from selfimprove_jax.runtime.config import parse
from selfimprove_jax.runtime.progress import Progress
from tests.language_models.conftest import Server
from tests.pipelines.entigraph import writer


def main() -> None:
  values, whole, killed = json.loads(pathlib.Path(sys.argv[1]).read_text()), *sys.argv[2:]
  server, cache = Server(), pathlib.Path(sys.argv[1]).with_name("calls.sqlite")
  server.behave = lambda call: writer.behave(call, lambda call: int(writer.tag(call), 16) % 3 == 0)
  page = writer.page(values, server.url, str(cache))
  config = parse(entigraph.Config, page)
  assert _killed_at(config, pathlib.Path(whole), None, cache) == ""
  num_calls = len(server.calls)
  server.calls.clear()
  points, repeated = [], []
  recorded: dict[str, int] = {}  # tag -> calls when it was first seen in a record
  while True:
    point = _killed_at(config, pathlib.Path(killed), points, cache)
    counts = collections.Counter(writer.tag(call) for call in server.calls)
    repeated += [tag for tag, number in recorded.items() if counts[tag] != number]
    if not point:
      break
    points.append(point)
    recorded = {tag: counts[tag] for tag in _tags(pathlib.Path(killed))}
  server.close()
  print(json.dumps({"points": points, "repeated": repeated, "calls": num_calls}))


def _tags(folder: pathlib.Path) -> set[str]:
  """Returns the tags in all whole records."""
  found = set()
  for path in folder.glob("*/*.jsonl*"), folder.glob("*/.*.unfinished"):
    for file in path:
      for line in file.read_text().split("\n")[:-1]:
        found |= set(re.findall(r"\b[0-9a-f]{12}\b(?=\.|\")", line))
  return found


def _killed_at(
  config: entigraph.Config, folder: pathlib.Path, points: list[str] | None, cache: pathlib.Path
) -> str:
  """Runs the stages up to the first point that is not in `points`; returns "" if they ended."""
  storage.remove(cache)  # so that only the records can tell what was answered
  read, write = os.pipe()
  child = os.fork()
  if child == 0:
    try:
      if points is not None:
        _die_at_a_new_point(points, write)
      stages = {stage.name: stage for stage in entigraph.stages(config)}
      for name in writer.STAGES:
        run_stage(stages[name], folder, Progress(quiet=True))
      os._exit(0)
    except BaseException:
      traceback.print_exc()
      os._exit(1)
  os.close(write)
  with os.fdopen(read) as pipe:
    point = pipe.read()
  _, status = os.waitpid(child, 0)
  if not os.WIFSIGNALED(status) and status:
    sys.exit("the synthesis failed")
  return point


def _die_at_a_new_point(points: list[str], pipe: int) -> None:
  """Kills this process before, within or after the writing of a record, or around a rename."""
  write_line, rename = storage.LineLog.write, pathlib.Path.rename
  replace = pathlib.Path.replace

  def pass_by(point: str) -> None:
    if point not in points:
      os.write(pipe, point.encode())
      os.kill(os.getpid(), signal.SIGKILL)

  def write(self, line: str) -> None:
    id_ = json.loads(line)["id"]
    where = ("before", "within", "after")[int(id_, 16) % 3]
    if where == "before":
      pass_by(f"before:{id_}")
    if where == "within" and f"within:{id_}" not in points:
      write_line(self, line[: len(line) // 2])
      pass_by(f"within:{id_}")
    write_line(self, line)
    if where == "after":
      pass_by(f"after:{id_}")

  def renamed(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    pass_by(f"before:{target.parent.name}/{target.name}")
    made = rename(self, target)
    pass_by(f"after:{target.parent.name}/{target.name}")
    return made

  def replaced(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    if target.name == "manifest.json":
      pass_by(f"before:{target.parent.name}/{target.name}")
    return replace(self, target)

  storage.LineLog.write = write
  pathlib.Path.rename = renamed
  pathlib.Path.replace = replaced


if __name__ == "__main__":
  main()
