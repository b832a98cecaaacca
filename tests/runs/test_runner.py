"""The order in which stages run, which ones are chosen, and what is refused before any runs."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from selfimprove_jax.runs import artifacts, processes, runner, storage
from selfimprove_jax.runs.stage import is_complete
from selfimprove_jax.runtime.config import section, to_json
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.runtime.progress import Progress
from tests.runs.toy import stage

_QUIET = Progress(quiet=True)


@pytest.fixture
def calls(tmp_path):
  folder = tmp_path / "calls"
  folder.mkdir()
  return folder


@pytest.fixture
def stages(calls):
  """Four stages; b/one and b/two read a, and c reads both."""
  inputs = {"a": [], "b/one": ["a"], "b/two": ["a"], "c": ["b/one", "b/two"]}
  return [stage(name, *reads, calls=str(calls)) for name, reads in inputs.items()]


def _called(calls):
  names = sorted((path.name for path in calls.iterdir()), key=lambda name: int(name.split()[0]))
  return [name.split()[1] for name in names]


def _run(stages, folder, **options):
  runner.run(stages, folder, progress=_QUIET, **options)


def test_stages_run_in_order_and_once(tmp_path, stages, calls, capsys):
  _run(stages, tmp_path / "run")
  assert _called(calls) == ["a", "b-one", "b-two", "c"]
  assert artifacts.open_artifact(tmp_path / "run" / "c").summary == {"total": 5}
  capsys.readouterr()
  _run(stages, tmp_path / "run")
  assert len(_called(calls)) == 4
  assert capsys.readouterr().out.splitlines() == [f"{s.name}: complete" for s in stages]


@pytest.mark.parametrize(
  ("only", "chosen"),
  [
    (["b"], ["b/one", "b/two"]),
    (["b/two"], ["b/two"]),
    (["c", "a"], ["a", "c"]),
    (None, ["a", "b/one", "b/two", "c"]),
  ],
)
def test_stages_are_chosen_by_name_or_first_part_in_the_pipelines_order(stages, only, chosen):
  assert [stage.name for stage in runner.select(stages, only)] == chosen


@pytest.mark.parametrize(
  ("name", "told"), [("b/on", "did you mean 'b/one'?"), ("", "there are"), ("d", "there are")]
)
def test_an_unknown_stage_is_refused_with_the_nearest_and_all(stages, name, told):
  with pytest.raises(ValueError, match=rf"--stages={name}: there is no such stage; ") as error:
    runner.select(stages, [name])
  assert told in str(error.value)
  assert "['a', 'b/one', 'b/two', 'c']" in str(error.value)


def test_another_config_of_a_complete_run_is_refused_with_every_difference(tmp_path, calls):
  _run([stage("a"), stage("b", "a")], tmp_path)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
  others = [stage("a", value=3), stage("b", "a", calls=str(calls))]
  with pytest.raises(artifacts.ConfigMismatchError, match="use another --workdir") as error:
    _run(others, tmp_path, config={"title": "new"})
  assert str(error.value).splitlines()[-2:] == [
    "  a: value: 1 -> 3",
    f"  b: calls: '' -> '{calls}'",
  ]
  assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_without_a_complete_artifact_is_begun_again_with_another_config(tmp_path, capsys):
  with pytest.raises(ValueError, match="value=1 fails"):
    _run([stage("a", fails=True), stage("b", "a")], tmp_path)
  assert (tmp_path / "a" / "first.json").exists()
  _run([stage("a", value=3), stage("b", "a")], tmp_path)
  (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("a: ")]
  assert "begun again" in line
  assert artifacts.open_artifact(tmp_path / "b").summary == {"total": 4}


def test_a_begun_stage_is_refused_another_config_once_another_stage_is_complete(tmp_path):
  with pytest.raises(ValueError, match="value=1 fails"):
    _run([stage("a"), stage("b", "a", fails=True)], tmp_path)
  with pytest.raises(artifacts.ConfigMismatchError, match=r"b: value: 1 -> 2"):
    _run([stage("a"), stage("b", "a", value=2, fails=True)], tmp_path)


def test_another_config_waits_for_a_running_command_and_is_refused_if_it_completes(tmp_path):
  begun = stage("a")
  writer = artifacts.Writer(tmp_path / "a", config=to_json(begun.config), inputs={})
  held = threading.Event()

  def complete():
    with storage.lock(tmp_path / "a"):
      held.set()
      time.sleep(0.5)
      writer.finish({"total": 1})

  other = threading.Thread(target=complete)
  other.start()
  held.wait()
  with pytest.raises(artifacts.ConfigMismatchError, match=r"a: value: 1 -> 2"):
    _run([stage("a", value=2)], tmp_path)
  other.join()
  assert artifacts.open_artifact(tmp_path / "a").summary == {"total": 1}


def test_a_change_that_no_stage_has_in_its_config_is_recorded_and_refuses_nothing(tmp_path, stages):
  _run(stages, tmp_path / "run", config={"title": "old"})
  before = artifacts.open_artifact(tmp_path / "run" / "c").digest
  _run(stages, tmp_path / "run", config={"title": "new", "runtime": {"parallel_stages": 4}})
  assert runner.read_config(tmp_path / "run")["title"] == "new"
  assert artifacts.open_artifact(tmp_path / "run" / "c").digest == before


def test_a_folder_without_a_run_has_no_config(tmp_path):
  with pytest.raises(ValueError, match="holds no run"):
    runner.read_config(tmp_path)


@section
class MeshStageConfig:
  """Config of a stage that makes a mesh."""

  mesh: MeshConfig = MeshConfig(data=3)


def test_a_mesh_that_does_not_fit_the_devices_is_refused_before_a_stage_runs(tmp_path, calls):
  changes = {"config": MeshStageConfig(), "uses_devices": True}
  stages = [stage("a", calls=str(calls)), stage("b", "a", changes=changes)]
  with pytest.raises(ValueError, match=r"stage b\.mesh: data=3 needs 3 devices, and there are 8"):
    _run(stages, tmp_path)
  assert _called(calls) == []
  _run(stages, tmp_path, only=["a"])


def test_verify_makes_again_what_is_damaged_and_nothing_else(tmp_path, stages, calls, capsys):
  _run(stages, tmp_path / "run")
  shard = tmp_path / "run" / "b/one" / "value.json"
  whole = shard.read_bytes()
  shard.write_bytes(whole[::-1])
  _run(stages, tmp_path / "run")
  assert len(_called(calls)) == 4  # the size is right: only --verify sees it
  _run(stages, tmp_path / "run", verify=True)
  assert _called(calls)[4:] == ["b-one"]
  assert shard.read_bytes() == whole
  assert "b/one: value.json is damaged and will be made again" in capsys.readouterr().out


def test_verify_names_an_edited_manifest_and_makes_its_stage_again(tmp_path, stages, calls, capsys):
  _run(stages, tmp_path / "run")
  config = tmp_path / "run" / "c" / "config.json"
  manifest = tmp_path / "run" / "b/one" / "manifest.json"
  whole = [config.read_bytes(), manifest.read_bytes()]
  config.write_bytes(whole[0].replace(b'b/one": "', b'b/one": "0'))
  manifest.write_bytes(whole[1].replace(b'"total": 2', b'"total": 3'))
  _run(stages, tmp_path / "run", verify=True)
  told = capsys.readouterr().out
  assert f"b/one: {manifest} is damaged: its checksum" in told
  assert "c: " in told
  assert _called(calls)[4:] == ["b-one"]  # a config that fits the manifest is written again
  assert [config.read_bytes(), manifest.read_bytes()] == whole


def test_a_damaged_config_of_a_run_is_named(tmp_path):
  _run([stage("a")], tmp_path, config={"title": "toy"})
  (tmp_path / "config.json").write_bytes(b"{")
  with pytest.raises(artifacts.ArtifactError, match=r"config\.json is damaged.*writes it again"):
    runner.read_config(tmp_path)
  _run([stage("a")], tmp_path, config={"title": "toy"})
  assert runner.read_config(tmp_path) == {"title": "toy"}


@pytest.fixture
def scheduled(monkeypatch):
  """The tasks that the runner gives to the scheduler, which runs none of them."""
  given = {}

  def run(tasks, *, slots, stop_on_failure):
    given.update(tasks=tasks, slots=slots, stop_on_failure=stop_on_failure)
    return given.get("ends", [])

  monkeypatch.setattr(processes, "run", run)
  return given


def _end(task, returncode, stopped=False):
  return processes.End(
    task=task, attempt=1, returncode=returncode, process=0, seconds=0.0, stopped=stopped
  )


def test_parallel_stages_wait_for_those_that_they_read_and_are_not_complete(
  tmp_path, stages, scheduled
):
  _run(stages, tmp_path, only=["a"])
  _run(stages, tmp_path, parallel=3)
  after = {task.name: task.after for task in scheduled["tasks"]}
  assert after == {"b/one": set(), "b/two": set(), "c": {"b/one", "b/two"}}
  assert len(scheduled["slots"]) == 3
  assert scheduled["stop_on_failure"]


def test_a_worker_has_one_thread_and_a_command_line_that_names_the_run(tmp_path, stages, scheduled):
  _run(stages, tmp_path, parallel=2)
  (process,) = scheduled["tasks"][0].make(0)
  assert process.argv[-2:] == [str(tmp_path), str(os.getpid())]
  assert "intra_op_parallelism_threads=1" in process.environment["XLA_FLAGS"]
  assert process.environment["OMP_NUM_THREADS"] == "1"


def test_the_stage_that_failed_is_named_not_those_it_stopped(tmp_path, stages, scheduled):
  scheduled["ends"] = [_end("b/one", 143, stopped=True), _end("b/two", 1), _end("a", 0)]
  with pytest.raises(runner.StageError, match="stage b/two ended with exit code 1"):
    _run(stages, tmp_path, parallel=2)


_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
_PARALLEL = """
import pathlib, sys
from selfimprove_jax.runs import runner
from selfimprove_jax.runtime.config import section, to_json
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.runtime.progress import Progress
from tests.runs.toy import stage
folder = pathlib.Path(sys.argv[1])
stages = [stage("a"), stage("b", "a", seconds=float(sys.argv[2])), stage("d", "a", fails={fails})]
runner.run(stages, folder, parallel=2, progress=Progress(quiet=True))
"""


def _start(folder, *, fails, seconds):
  return subprocess.Popen(
    [sys.executable, "-c", _PARALLEL.format(fails=fails), str(folder), str(seconds)],
    env=_ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_parallel_stages_run_in_processes_and_a_failure_leaves_its_traceback(tmp_path):
  process = _start(tmp_path, fails=True, seconds=0)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 1
  assert "d: ValueError: value=1 fails\n" in output
  assert "StageError: stage d ended with exit code 1" in output
  assert f"with the traceback in {tmp_path / 'logs' / 'd.log'}" in output
  assert "Traceback" in (tmp_path / "logs" / "d.log").read_text()
  assert artifacts.open_artifact(tmp_path / "a").summary == {"total": 1}
  assert not is_complete(tmp_path / "d")
  json.loads((tmp_path / "timings.jsonl").read_text().splitlines()[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_leave_with_the_run(tmp_path, number):
  process = _start(tmp_path, fails=False, seconds=8)
  output = []

  def read():
    with process.stdout as stream:
      output.append(stream.read())

  reader = threading.Thread(target=read, daemon=True)
  reader.start()
  deadline = time.monotonic() + 60
  while not (tmp_path / "b" / "first.json").exists():
    assert time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(number)
  assert process.wait(60) == (143 if number == signal.SIGTERM else -number)
  reader.join(10)  # ends once no worker holds the pipe
  assert not reader.is_alive()


_START_WITH_ANOTHER = """
import pathlib, sys
from selfimprove_jax.runs import runner
from selfimprove_jax.runtime.progress import Progress
from tests.runs.toy import stage
stages = [stage("a"), stage("b", "a")]
for line in sys.stdin:
  runner.run(stages, pathlib.Path(line.strip()), progress=Progress(quiet=True), config={})
  print("done", flush=True)
"""


@pytest.mark.slow
def test_two_commands_started_at_once_in_a_new_folder_make_one_run(tmp_path):
  command = [sys.executable, "-c", _START_WITH_ANOTHER]
  root = pathlib.Path(__file__).parents[2]
  pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  two = [subprocess.Popen(command, cwd=root, **pipes) for _ in range(2)]
  for index in range(50):
    folder = tmp_path / str(index) / "run"
    for process in two:
      process.stdin.write(f"{folder}\n")
      process.stdin.flush()
    for process in two:
      lines = iter(process.stdout.readline, "")
      assert "done\n" in lines, process.communicate()[1]
    assert artifacts.open_artifact(folder / "b").summary == {"total": 2}
    assert not [path for path in folder.rglob("*") if storage.is_temporary(path)]
  for process in two:
    process.communicate()
  assert [process.returncode for process in two] == [0, 0]
