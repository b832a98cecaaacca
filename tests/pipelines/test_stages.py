"""What running a stage does with artefacts that are there, damaged, or of another config."""

import inspect
import json
import multiprocessing
import sys
import time
import types

import pytest

from selfimprove_jax import artifacts
from selfimprove_jax.pipelines import stages
from selfimprove_jax.pipelines.stages import Stage
from selfimprove_jax.progress import Progress

_QUIET = Progress(quiet=True)


def _numbers(context, *, count, fails=False):
  context.writer.write_jsonl("a.jsonl", ({"n": n} for n in range(count)))
  if fails:
    raise ValueError("this stage fails")
  context.writer.write_jsonl("b.jsonl", ({"n": -n} for n in range(count)))
  return {"count": count}


def _total(context, *, scale):
  numbers = context.inputs["numbers"]
  return {"total": scale * sum(record["n"] for record in numbers.read_jsonl("a.jsonl"))}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
  """Names of the stage functions that ran; they stand in a module of the pipelines."""
  made = []
  module = types.ModuleType("toy")

  def counted(function):
    def call(context, **options):
      made.append(context.name)
      return function(context, **options)

    call.__signature__ = inspect.signature(function)
    return call

  module.numbers, module.total = counted(_numbers), counted(_total)
  monkeypatch.setitem(sys.modules, "selfimprove_jax.pipelines.toy", module)
  return made


def _stages(count=3, scale=2, **options):
  return (
    Stage("numbers", "toy:numbers", {"count": count, **options}),
    Stage("sums/total", "toy:total", {"scale": scale}, {"numbers": "numbers"}),
  )


def _run(folder, made):
  for stage in made:
    stages.run_stage(stage, folder, _QUIET)


def test_a_stage_gives_a_complete_artefact_that_names_its_inputs(tmp_path):
  _run(tmp_path, _stages())
  numbers = artifacts.open_artifact(tmp_path / "numbers")
  assert artifacts.open_artifact(tmp_path / "sums/total").summary == {"total": 6}
  written = json.loads((tmp_path / "sums/total/config.json").read_text())
  assert written == {"config": {"scale": 2}, "inputs": {"numbers": numbers.digest}}


def test_a_complete_stage_is_not_run_again(tmp_path, calls):
  _run(tmp_path, _stages())
  _run(tmp_path, _stages())
  assert calls == ["numbers", "sums/total"]


def test_a_stage_whose_input_is_not_there_says_which(tmp_path):
  with pytest.raises(artifacts.ArtifactError, match=r"numbers is missing: run the stage"):
    _run(tmp_path, _stages()[1:])


def test_a_truncated_shard_is_made_again_and_nothing_that_reads_it_is(tmp_path, calls, capsys):
  _run(tmp_path, _stages())
  before = {p: p.read_bytes() for p in tmp_path.rglob("*.json*") if p.name != "timings.jsonl"}
  shard = tmp_path / "numbers" / "b.jsonl"
  shard.write_bytes(shard.read_bytes()[:-3])
  _run(tmp_path, _stages())
  assert calls == ["numbers", "sums/total", "numbers"]
  assert {path: path.read_bytes() for path in before} == before
  assert "b.jsonl is damaged and is made again" in capsys.readouterr().out


def test_a_flipped_byte_is_refused_by_the_reader_and_found_by_verify(tmp_path, calls):
  made = _stages()
  _run(tmp_path, made[:1])
  shard = tmp_path / "numbers" / "a.jsonl"
  whole = shard.read_bytes()
  shard.write_bytes(whole.replace(b"2", b"7"))
  with pytest.raises(artifacts.ArtifactError, match=r"a\.jsonl is damaged.*--verify"):
    _run(tmp_path, made)
  stages.verify(made[0], tmp_path)
  assert not stages.is_complete(made[0], tmp_path)
  _run(tmp_path, made)
  assert shard.read_bytes() == whole
  assert stages.is_complete(made[1], tmp_path)


def test_verify_leaves_what_is_whole(tmp_path):
  made = _stages()
  _run(tmp_path, made)
  for stage in made:
    stages.verify(stage, tmp_path)
  assert all(stages.is_complete(stage, tmp_path) for stage in made)


def test_another_config_is_refused_with_every_difference_and_nothing_written(tmp_path):
  _run(tmp_path, _stages())
  other = _stages(count=4)[0]
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(artifacts.ConfigMismatchError, match=r"count: 3 -> 4"):
    stages.check_config(other, tmp_path)
  assert sorted(tmp_path.rglob("*")) == before
  stages.check_config(_stages()[0], tmp_path)


def test_a_stage_made_from_other_inputs_is_refused(tmp_path):
  _run(tmp_path, _stages())
  other = tmp_path / "other"
  _run(other, _stages(count=5)[:1])
  (tmp_path / "sums/total/manifest.json").unlink()
  for name in ("config.json", "manifest.json", "a.jsonl", "b.jsonl"):
    (tmp_path / "numbers" / name).write_bytes((other / "numbers" / name).read_bytes())
  with pytest.raises(artifacts.ConfigMismatchError, match=r"inputs\.numbers"):
    _run(tmp_path, _stages(count=5))


def test_a_failed_stage_keeps_its_shards_and_is_not_complete(tmp_path, calls):
  made = _stages(fails=True)
  with pytest.raises(ValueError, match="this stage fails"):
    _run(tmp_path, made)
  assert (tmp_path / "numbers" / "a.jsonl").exists()
  assert not stages.is_complete(made[0], tmp_path)
  assert stages.seconds_spent(tmp_path)["numbers"] >= 0


def test_seconds_are_summed_over_runs(tmp_path):
  assert stages.seconds_spent(tmp_path) == {}
  for seconds in (1.5, 2.0):
    stages.record_seconds(tmp_path, "a", seconds)
  stages.record_seconds(tmp_path, "b", 1.0)
  assert stages.seconds_spent(tmp_path) == {"a": 3.5, "b": 1.0}


@pytest.mark.parametrize("options", [{"count": 1, "colour": 2}, {}])
def test_a_config_that_does_not_fit_the_function_is_refused_before_it_runs(tmp_path, options):
  stage = Stage("numbers", "toy:numbers", options)
  with pytest.raises(TypeError, match=r"'numbers' does not fit toy:numbers: .*(colour|count)"):
    stage.load()
  with pytest.raises(TypeError):
    stages.run_stage(stage, tmp_path, _QUIET)
  assert list(tmp_path.iterdir()) == []


def test_what_a_kill_in_the_last_act_left_is_removed(tmp_path):
  made = _stages()
  _run(tmp_path, made)
  journal = tmp_path / "numbers" / "shards.jsonl"
  journal.write_text("left")
  _run(tmp_path, made)
  assert not journal.exists()


def test_a_second_process_waits_for_the_first_and_finds_the_stage_done(tmp_path):
  # Both write the same shard, slowly; without the lock the second would write it again.
  context = multiprocessing.get_context("spawn")
  processes = [context.Process(target=_slow, args=(tmp_path,)) for _ in range(2)]
  for process in processes:
    process.start()
  for process in processes:
    process.join(60)
  assert [process.exitcode for process in processes] == [0, 0]
  assert (tmp_path / "runs").read_text() == "x"


def _slow(folder):
  module = types.ModuleType("toy")

  def slow(context):
    with (folder / "runs").open("a") as file:
      file.write("x")
    time.sleep(1.0)
    return {}

  module.slow = slow
  sys.modules["selfimprove_jax.pipelines.toy"] = module
  stages.run_stage(Stage("slow", "toy:slow", {}), folder, Progress(quiet=True))
