"""Running one stage: whether its artifact is missing, damaged, complete, or of another config."""

import json
import multiprocessing
import pathlib
import pickle
import time

import pytest

from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs.stage import Context, Run, Stage, is_complete, run_stage
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.progress import Progress

_QUIET = Progress(quiet=True)


@section
class NumbersConfig:
  """Config of `_numbers`."""

  count: int = 3
  fails: bool = False


@section
class TotalConfig:
  """Config of `_total`."""

  scale: int = 2


_calls = []


@pytest.fixture(autouse=True)
def calls():
  """Names of the stages whose functions ran."""
  _calls.clear()
  return _calls


def _numbers(context, config):
  _calls.append(context.name)
  context.writer.write_jsonl("a.jsonl", ({"n": n} for n in range(config.count)))
  if config.fails:
    raise ValueError("this stage fails")
  context.writer.write_jsonl("b.jsonl", ({"n": -n} for n in range(config.count)))
  return {"count": config.count}


def _total(context, config):
  _calls.append(context.name)
  numbers = context.inputs["numbers"]
  return {"total": config.scale * sum(record["n"] for record in numbers.read_jsonl("a.jsonl"))}


def _stages(**options):
  return (
    Stage("numbers", _numbers, NumbersConfig(**options)),
    Stage("sums/total", _total, TotalConfig(), {"numbers": "numbers"}),
  )


def _run(folder, stages):
  for stage in stages:
    run_stage(stage, folder, _QUIET)


def test_a_stage_gives_a_complete_artifact_that_names_its_inputs(tmp_path):
  _run(tmp_path, _stages())
  numbers = artifacts.open_artifact(tmp_path / "numbers")
  assert artifacts.open_artifact(tmp_path / "sums/total").summary == {"total": 6}
  written = json.loads((tmp_path / "sums/total/config.json").read_text())
  assert written == {"config": {"scale": 2}, "inputs": {"numbers": numbers.digest}}


def test_a_complete_stage_is_not_run_again(tmp_path, calls):
  _run(tmp_path, _stages())
  _run(tmp_path, _stages())
  assert calls == ["numbers", "sums/total"]


def test_a_stage_whose_input_is_missing_names_it(tmp_path):
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


def test_a_flipped_byte_is_refused_by_the_reader_and_found_by_repair(tmp_path):
  stages = _stages()
  _run(tmp_path, stages[:1])
  shard = tmp_path / "numbers" / "a.jsonl"
  whole = shard.read_bytes()
  shard.write_bytes(whole.replace(b"2", b"7"))
  with pytest.raises(artifacts.ArtifactError, match=r"a\.jsonl is damaged.*--verify"):
    _run(tmp_path, stages)
  assert artifacts.repair(tmp_path / "numbers") == ["a.jsonl"]
  assert not is_complete(tmp_path / "numbers")
  _run(tmp_path, stages)
  assert shard.read_bytes() == whole
  assert artifacts.repair(tmp_path / "numbers") == []
  assert is_complete(tmp_path / "sums/total")


def test_a_stage_made_from_other_inputs_is_refused(tmp_path):
  _run(tmp_path, _stages())
  other = tmp_path / "other"
  _run(other, _stages(count=5)[:1])
  (tmp_path / "sums/total/manifest.json").unlink()
  for name in ("config.json", "manifest.json", "a.jsonl", "b.jsonl"):
    (tmp_path / "numbers" / name).write_bytes((other / "numbers" / name).read_bytes())
  with pytest.raises(artifacts.ConfigMismatchError, match=r"inputs\.numbers"):
    _run(tmp_path, _stages(count=5))


def test_a_failed_stage_keeps_its_shards_and_is_not_complete(tmp_path):
  with pytest.raises(ValueError, match="this stage fails"):
    _run(tmp_path, _stages(fails=True))
  assert (tmp_path / "numbers" / "a.jsonl").exists()
  assert not is_complete(tmp_path / "numbers")
  assert Run(tmp_path, None).seconds()["numbers"] >= 0


def test_a_run_opens_artifacts_and_sums_seconds_over_commands(tmp_path):
  run = Run(tmp_path, NumbersConfig(), "the command")
  assert not run.has("numbers")
  assert run.seconds() == {}
  with pytest.raises(artifacts.ArtifactError, match="numbers is missing"):
    run.artifact("numbers")
  _run(tmp_path, _stages())
  assert run.has("sums/total")
  assert run.artifact("sums/total").summary == {"total": 6}
  line = json.dumps({"stage": "numbers", "seconds": 7.0})
  with (tmp_path / "timings.jsonl").open("a") as file:
    file.write(line + "\n")
  assert run.seconds()["numbers"] > 7.0


def test_a_journal_that_a_killed_process_left_is_removed(tmp_path):
  _run(tmp_path, _stages())
  journal = tmp_path / "numbers" / "shards.jsonl"
  journal.write_text("left")
  _run(tmp_path, _stages())
  assert not journal.exists()


def test_a_stage_and_its_config_can_be_pickled():
  stage = pickle.loads(pickle.dumps(_stages(count=5)[0]))
  assert stage.config == NumbersConfig(count=5)
  assert stage.function is _numbers


def _slow(context, config):
  with (context.folder.parent / "runs").open("a") as file:
    file.write("x")
  time.sleep(1.0)
  return {}


def _run_slow(folder: pathlib.Path):
  run_stage(Stage("slow", _slow, TotalConfig()), folder, Progress(quiet=True))


@pytest.mark.slow
def test_a_second_process_waits_for_the_first_and_finds_the_stage_done(tmp_path):
  context = multiprocessing.get_context("spawn")
  processes = [context.Process(target=_run_slow, args=(tmp_path,)) for _ in range(2)]
  for process in processes:
    process.start()
  for process in processes:
    process.join(60)
  assert [process.exitcode for process in processes] == [0, 0]
  assert (tmp_path / "runs").read_text() == "x"


def test_a_context_gives_the_folder_of_its_writer(tmp_path):
  writer = artifacts.Writer(tmp_path / "a", config={}, inputs={})
  assert Context("a", writer, {}, _QUIET).folder == tmp_path / "a"


def test_a_damaged_manifest_costs_its_stage_and_no_other(tmp_path, calls, capsys):
  _run(tmp_path, _stages())
  before = {p: p.read_bytes() for p in tmp_path.rglob("*.json*") if p.name != "timings.jsonl"}
  manifest = tmp_path / "numbers" / "manifest.json"
  manifest.write_bytes(manifest.read_bytes().replace(b'"count": 3', b'"count": 4'))
  _run(tmp_path, _stages())
  assert calls == ["numbers", "sums/total", "numbers"]
  assert {path: path.read_bytes() for path in before} == before
  assert f"numbers: {manifest} is damaged: its checksum" in capsys.readouterr().out


def test_a_damaged_config_of_a_complete_stage_is_written_again(tmp_path, calls, capsys):
  _run(tmp_path, _stages())
  config = tmp_path / "numbers" / "config.json"
  whole = config.read_bytes()
  config.write_bytes(whole[:-5])
  _run(tmp_path, _stages())
  assert calls == ["numbers", "sums/total"]
  assert config.read_bytes() == whole
  assert f"{config} is damaged" in capsys.readouterr().out


def test_a_damaged_line_of_the_times_costs_its_seconds(tmp_path):
  _run(tmp_path, _stages())
  with (tmp_path / "timings.jsonl").open("ab") as file:
    file.write(b'{"stage": "sums/total"}\n\xff\n[[\n{"stage": [], "seconds": 1}\n')
  assert Run(tmp_path, None).seconds().keys() == {"numbers", "sums/total"}
