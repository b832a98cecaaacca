"""A run that is killed in every stage and continued ends with the bytes of an uninterrupted one."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.slow

_EARLY = ("documents", "tokenizer", "tokens", "embeddings", "pairs")
_LATE = ("synthetic/sbp", "synthetic/unconditional", "relevance")


def _num_lines(path):
  return path.read_bytes().count(b"\n") if path.exists() else 0


def _after_steps(num):
  return lambda folder: _num_lines(folder / "metrics.jsonl") > num


def _is_saving(folder):
  return any("tmp" in path.name for path in (folder / "checkpoints").glob("*"))


def _after_first_shard(folder):
  return (folder / "00000.jsonl").exists()


def _is_well_begun(folder):
  return _after_steps(3)(folder) or _after_first_shard(folder)


@dataclasses.dataclass(frozen=True)
class Moment:
  """When a stage is killed, and how: "run" is the runner, "all" with its workers, or "sigterm"."""

  reached: Callable[[pathlib.Path], bool]
  kill: str = "run"


_MOMENTS = {
  "seed": Moment(_after_steps(5)),
  "arms/baseline": Moment(_is_saving, "all"),
  "synthesizer/nearest": Moment(_after_steps(120)),
  "samples/sbp": Moment(_after_first_shard),
  "samples/unconditional": Moment(_after_first_shard, "all"),
  "arms/oracle": Moment(_after_steps(30), "sigterm"),
  "arms/sbp": Moment(_after_steps(60)),
  "arms/unconditional": Moment(_is_saving, "all"),
  "arms/baseline_all_in": Moment(_is_saving, "all"),
}


@dataclasses.dataclass
class Interrupted:
  """The history of a run that was killed and continued until it ended."""

  folder: pathlib.Path
  killed: set[str] = dataclasses.field(default_factory=set)
  torn_checkpoints: int = 0
  left_alive: list[str] = dataclasses.field(default_factory=list)
  sigterm_code: int | None = None
  sigterm_output: str = ""


@pytest.fixture(scope="module")
def interrupted(smoke, command, subprocess_options, tmp_path_factory) -> Interrupted:
  """The smoke run from its first training on, killed at each of `_MOMENTS`.

  A stage that was well begun when another stage's moment came counts as killed too.
  """
  run = Interrupted(tmp_path_factory.mktemp("interrupted") / "run")
  for name in _EARLY:
    shutil.copytree(smoke.folder / name, run.folder / name)
  # Programs compiled before a kill are not compiled again; the smoke run does not share them.
  cache = {
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  options = subprocess_options | {"env": subprocess_options["env"] | cache}
  log = run.folder.parent / "log"
  pending = dict(_MOMENTS)
  while True:
    with log.open("w") as output:
      process = subprocess.Popen(
        command("--config=configs/sbp_quick.py:smoke", f"--workdir={run.folder}"),
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **options,
      )
    name = _wait_for_moment(process, run.folder, pending)
    if name is None:
      assert process.returncode == 0, log.read_text()
      return run
    killed = _kill(process, pending.pop(name), run, log)
    # Only its own moment tries SIGTERM, so that one stays.
    pending = {
      name: moment
      for name, moment in pending.items()
      if name not in killed or moment.kill == "sigterm"
    }


def _wait_for_moment(process, folder, pending):
  while process.poll() is None:
    for name, moment in pending.items():
      if _is_under_way(folder / name) and moment.reached(folder / name):
        return name
    time.sleep(0.002)
  return None


def _is_under_way(folder):
  return (folder / "config.json").exists() and not (folder / "manifest.json").exists()


def _kill(process, moment, run, log):
  under_way = {name for name in _MOMENTS if _is_under_way(run.folder / name)}
  if moment.kill == "all":
    for pid in _processes_in(run.folder):  # each worker is a session of its own
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
  elif moment.kill == "run":
    process.kill()
  else:
    process.terminate()
  process.wait(timeout=300)
  until = time.monotonic() + 4
  while (alive := _processes_in(run.folder)) and time.monotonic() < until:
    time.sleep(0.05)
  run.left_alive += alive.values()
  if moment.kill == "sigterm":
    run.sigterm_code, run.sigterm_output = process.returncode, log.read_text()
    return set()
  killed = {name for name in under_way if _is_under_way(run.folder / name)}
  run.killed |= killed
  run.torn_checkpoints += sum(_is_saving(run.folder / name) for name in under_way)
  return {name for name in killed if _is_well_begun(run.folder / name)}


def _processes_in(folder):
  """Process id -> command line of the processes that name the folder; needs /proc."""
  found = {}
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      line = path.read_bytes()
    except OSError:  # gone since
      continue
    if str(folder).encode() in line:
      found[int(path.parent.name)] = line.replace(b"\0", b" ").decode()
  return found


def test_every_stage_that_trains_or_samples_was_killed_and_some_within_a_checkpoint(interrupted):
  assert interrupted.killed >= set(_MOMENTS) - {"arms/oracle"}
  assert interrupted.torn_checkpoints > 0


def test_a_killed_run_ends_with_the_bytes_of_an_uninterrupted_one(interrupted, smoke, data_files):
  expected, found = data_files(smoke.folder), data_files(interrupted.folder)
  assert found.keys() == expected.keys()
  assert [name for name in expected if found[name] != expected[name]] == []


def test_what_is_compared_holds_data_loss_curves_and_checksums_of_parameters(smoke, data_files):
  files = data_files(smoke.folder)
  assert {"documents/train-00000-of-00001.jsonl", "arms/sbp/metrics.jsonl"} <= files.keys()
  assert json.loads(files["arms/sbp/manifest.json"])["summary"]["checksums"]


def test_a_killed_run_reports_the_same_numbers(interrupted, smoke):
  one, other = (
    json.loads((folder / "report" / "report.json").read_text())
    for folder in (smoke.folder, interrupted.folder)
  )
  for report in (one, other):
    for arm in report["arms"].values():
      del arm["seconds"]
  for part in ("arms", "comparison", "conditioning", "pairs", "synthesis", "examples", "config"):
    assert one[part] == other[part], part


def test_no_process_of_a_killed_run_is_left(interrupted):
  assert interrupted.left_alive == []


def test_sigterm_saves_the_state_and_exits_with_143(interrupted):
  assert interrupted.sigterm_code == 143
  assert "arms/oracle: stopped at step" in interrupted.sigterm_output
  assert "Traceback" not in interrupted.sigterm_output


def test_stages_killed_at_every_file_that_they_write_end_with_the_same_bytes(
  smoke, data_files, subprocess_options, tmp_path
):
  run_folder = tmp_path / "run"
  run_folder.mkdir()
  shutil.copy(smoke.folder / "config.json", run_folder)
  for name in ("samples", "synthesizer", "seed"):
    shutil.copytree(smoke.folder / name, run_folder / name)
  script = pathlib.Path(__file__).with_name("kill_at_each_write.py")
  process = subprocess.run(
    [sys.executable, str(script), str(run_folder), *_EARLY, *_LATE],
    capture_output=True,
    **subprocess_options,
  )
  assert process.returncode == 0, process.stdout + process.stderr
  kills = {line.split()[0]: set(line.split()[1:]) for line in process.stdout.splitlines()}
  assert kills.keys() == {*_EARLY, *_LATE}
  for name, points in kills.items():
    assert points >= {"before:config.json", "after:config.json", "after:manifest.json"}, name
  expected, found = data_files(smoke.folder), data_files(run_folder)
  assert [name for name in found if found[name] != expected[name]] == []
