"""In which order stages are run, which are chosen, and what is refused before any is."""

import json
import sys
import time
import types

import pytest

from selfimprove_jax import artifacts
from selfimprove_jax.pipelines import runner
from selfimprove_jax.pipelines.stages import Stage
from selfimprove_jax.progress import Progress

_QUIET = Progress(quiet=True)
_CONFIG = {"pipeline": "toy", "runtime": {"parallel_stages": 1}}


def _stage(name, *inputs):
  return Stage(name, "toy:make", {"value": name}, {input_: input_ for input_ in inputs})


_STAGES = [_stage("a"), _stage("b/one", "a"), _stage("b/two", "a"), _stage("c", "b/one", "b/two")]


@pytest.fixture(autouse=True)
def made(monkeypatch):
  """Names of the stages that ran, of a pipeline of four."""
  names = []

  def make(context, *, value):
    names.append(context.name)
    context.writer.write_json("value.json", value)
    return {}

  module = types.ModuleType("toy")
  module.make = make
  monkeypatch.setitem(sys.modules, "selfimprove_jax.pipelines.toy", module)
  monkeypatch.setattr(runner, "check", lambda config: None)
  monkeypatch.setattr(runner, "build", lambda config: _STAGES)
  return names


def _run(folder, only=None, verify=False, config=_CONFIG):
  runner.run(config, folder, only=only, verify=verify, progress=_QUIET)


def test_stages_run_in_order_and_once(tmp_path, made, capsys):
  _run(tmp_path)
  assert made == ["a", "b/one", "b/two", "c"]
  capsys.readouterr()
  _run(tmp_path)
  assert made == ["a", "b/one", "b/two", "c"]
  assert capsys.readouterr().out.splitlines() == [f"{name}: complete" for name in made]


@pytest.mark.parametrize(
  ("only", "chosen"),
  [
    (["b"], ["b/one", "b/two"]),
    (["b/two"], ["b/two"]),
    (["c", "a"], ["a", "c"]),
    (None, ["a", "b/one", "b/two", "c"]),
  ],
)
def test_stages_are_chosen_by_name_or_first_part_in_the_pipelines_order(only, chosen):
  assert [stage.name for stage in runner.select(_STAGES, only)] == chosen


@pytest.mark.parametrize("name", ["b/on", "", "d"])
def test_an_unknown_stage_is_refused_with_those_there_are(name):
  with pytest.raises(ValueError, match=rf"no stage '{name}'; there are \['a', 'b/one'"):
    runner.select(_STAGES, [name])


def test_another_config_is_refused_before_anything_is_written(tmp_path, made):
  _run(tmp_path, only=["a"])
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(artifacts.ConfigMismatchError, match=r"runtime\.parallel_stages: 1 -> 2"):
    _run(tmp_path, config={"pipeline": "toy", "runtime": {"parallel_stages": 2}})
  assert sorted(tmp_path.rglob("*")) == before
  assert made == ["a"]


def test_verify_makes_again_what_is_damaged_and_nothing_else(tmp_path, made):
  _run(tmp_path)
  shard = tmp_path / "b/one" / "value.json"
  whole = shard.read_bytes()
  shard.write_bytes(whole[::-1])
  _run(tmp_path)
  assert made[4:] == []  # as long as before: only --verify sees it
  _run(tmp_path, verify=True)
  assert made[4:] == ["b/one"]
  assert shard.read_bytes() == whole


def _process_run(monkeypatch, tmp_path, codes, parallel=2):
  """Runs with processes that only sleep and exit; gives (event, stage), in order."""
  events = []

  class Process:
    def __init__(self, name):
      self.name, self.until, self.ended = name, time.monotonic() + 0.3, None
      events.append(("start", name))

    def poll(self):
      if self.ended is None and time.monotonic() > self.until:
        self.ended = codes.get(self.name, 0)
        events.append(("end", self.name))
      self.returncode = self.ended
      return self.ended

    def terminate(self):
      events.append(("terminate", self.name))
      self.until, self.ended = 0.0, None

    def kill(self):
      events.append(("kill", self.name))

  relay = types.SimpleNamespace(join=lambda: None)
  monkeypatch.setattr(runner, "_start", lambda stage, folder: (Process(stage.name), relay))
  config = {"pipeline": "toy", "runtime": {"parallel_stages": parallel}}
  try:
    _run(tmp_path, config=config)
  except runner.StageError as error:
    events.append(("error", str(error)))
  return events


def test_processes_wait_for_what_they_read_and_run_beside_what_they_do_not(monkeypatch, tmp_path):
  events = _process_run(monkeypatch, tmp_path, {})
  assert events[:4] == [("start", "a"), ("end", "a"), ("start", "b/one"), ("start", "b/two")]
  assert {events[4], events[5]} == {("end", "b/one"), ("end", "b/two")}
  assert events[6:] == [("start", "c"), ("end", "c")]


def test_a_failure_asks_the_others_to_leave_and_starts_no_more(monkeypatch, tmp_path):
  events = _process_run(monkeypatch, tmp_path, {"b/one": 1, "b/two": 143})
  assert ("terminate", "b/two") in events
  assert ("start", "c") not in events
  assert events[-1][0] == "error"
  assert "stage b/one ended with exit code 1" in events[-1][1]
  assert str(runner.log_path(tmp_path, "b/one")) in events[-1][1]


def test_no_more_processes_run_at_once_than_were_asked_for(monkeypatch, tmp_path):
  monkeypatch.setattr(runner, "build", lambda config: [_stage(name) for name in "abcde"])
  running, most = 0, 0
  for event, _ in _process_run(monkeypatch, tmp_path, {}, parallel=3):
    running += {"start": 1, "end": -1}[event]
    most = max(most, running)
  assert most == 3


def test_the_config_of_a_run_is_kept_in_its_folder(tmp_path):
  _run(tmp_path, only=["a"])
  assert runner.read_config(tmp_path) == json.loads(json.dumps(_CONFIG))
