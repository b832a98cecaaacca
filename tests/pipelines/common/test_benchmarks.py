"""Benchmarks at the end of training and at its checkpoints, in a tiny run of SBP."""

import dataclasses
import json
import math
import pathlib
import random
import re
import shutil
from typing import Any

import numpy as np
import pytest

from configs import sbp_quick
from selfimprove_jax import report
from selfimprove_jax.data.decontamination import DecontaminationConfig
from selfimprove_jax.evaluation import statistics
from selfimprove_jax.language_models.local import ComputeConfig
from selfimprove_jax.models.checkpoints import saved_steps
from selfimprove_jax.pipelines import sbp
from selfimprove_jax.pipelines.common import benchmarks, checkpoints
from selfimprove_jax.pipelines.common.benchmarks import BenchmarksConfig
from selfimprove_jax.runs import runner, storage
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime.config import parse, to_json
from selfimprove_jax.runtime.partitioning import LocalMeshConfig, MeshConfig
from selfimprove_jax.runtime.progress import Progress
from selfimprove_jax.sampling.engine import EngineConfig

_WORDS = (
  *("the", "a", "of", "sea", "wave", "salt", "tide", "foam", "deep", "blue", "ship", "sail"),
  *("hill", "rock", "pine", "path", "moss", "goat"),
)
_ARMS = ("arms/baseline", "arms/baseline-2", "arms/oracle")
_TASKS = ("arc_easy", "openwebtext")


def _text(seed: int, num_words: int = 30) -> str:
  return " ".join(random.Random(seed).choices(_WORDS, k=num_words))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> pathlib.Path:
  """Two tasks; the first question of one is in a document of the corpus."""
  folder = tmp_path_factory.mktemp("evals")
  arc = [
    {"query": f"Question: {_text(n, 14)}?", "choices": ["sea", "rock"], "gold": n % 2}
    for n in range(1000, 1012)
  ]
  texts = [{"text": _text(n, 12 * n - 23980)} for n in range(2000, 2004)]
  for name, records in zip(_TASKS, (arc, texts)):
    (folder / f"{name}.jsonl.gz").write_bytes(_gzipped(records))
  return folder


def _gzipped(records: list[dict[str, Any]]) -> bytes:
  import gzip

  return gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode())


@pytest.fixture(scope="module")
def values(data_dir, tmp_path_factory) -> dict[str, Any]:
  """The page of the smoke run on another corpus, with two arms, one of them trained twice."""
  corpus = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
  documents = [{"text": _text(n), "group": f"g{n % 40}"} for n in range(400)]
  documents.append({"text": f"Someone asked: {_text(1000, 14)}", "group": "g0"})
  corpus.write_text("".join(json.dumps(document) + "\n" for document in documents))
  c = json.loads(json.dumps(sbp_quick.get_config("smoke").to_dict()))
  c["corpus"]["source"] = {"kind": "jsonl", "paths": [str(corpus)], "group_field": "group"}
  c["corpus"]["split"] |= {"max_passage_chars": 1000, "min_passage_chars": 1, "shingle_size": 8}
  regularization = {"weight_decay": 0.1, "dropout_rate": 0.0}  # one program for all
  c["arms"] = {name: c["arms"][name] | regularization for name in ("baseline", "oracle")}
  c["seed_model"] |= regularization
  c["model"]["num_layers"] = 1
  c["tokenizer"] |= {"vocab_size": 320, "train_chars": 5000}
  c["tokens"] |= {"unique_tokens": 2000, "oracle_tokens": 4500}
  c["training"] |= {"num_checkpoints": 3, "keep": 2, "num_evaluations": 1}
  c["total_tokens"], c["seed_model"]["total_tokens"] = 4000, 1000
  c["benchmarks"] = {
    "tasks": ",".join(_TASKS),
    "data_dir": str(data_dir),
    "num_slots": 4,
    "examples_per_shard": 5,
    "at_checkpoints": True,
  }
  return c


@pytest.fixture(scope="module")
def config(values) -> sbp.Config:
  return parse(sbp.Config, values)


@pytest.fixture(scope="module", autouse=True)
def on_one_device(one_device_mesh):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(MeshConfig, "make", lambda self, devices=None: one_device_mesh)
    yield


def _run(config: sbp.Config, folder: pathlib.Path, only=None) -> None:
  quiet = Progress(quiet=True)
  runner.run(sbp.stages(config), folder, only=only, progress=quiet, config=to_json(config))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> pathlib.Path:
  """The folder of a finished run; nobody may write in it."""
  folder = tmp_path_factory.mktemp("run")
  _run(config, folder)
  return folder


@pytest.fixture(scope="module")
def made(config, finished):
  return sbp.report(Run(finished, config))


def _right(folder: pathlib.Path, arm: str) -> np.ndarray:
  records = Run(folder, None).artifact(f"scores/{arm}/arc_easy").records()
  return np.array([record["prediction"] in record["gold"] for record in records], float)


def test_every_training_of_an_arm_is_scored_on_every_task(config, finished):
  names = [stage.name for stage in sbp.stages(config)]
  assert names[:2] == ["examples/arc_easy", "examples/openwebtext"]
  for arm in _ARMS:
    for task in _TASKS:
      assert {f"scores/{arm}/{task}", f"metrics/{arm}/{task}"} <= set(names)
    assert len(_right(finished, arm)) == 12
  scores = {arm: Run(finished, None).artifact(f"scores/{arm}/arc_easy").records() for arm in _ARMS}
  logprobs = [[record["logprobs"] for record in records] for records in scores.values()]
  assert logprobs[0] != logprobs[1] != logprobs[2]  # each model's own


def test_arms_are_compared_by_example_with_the_mean_of_their_trainings(finished, made):
  compared = made.data["benchmarks"]
  first = (_right(finished, "arms/baseline") + _right(finished, "arms/baseline-2")) / 2
  second = _right(finished, "arms/oracle")
  expected = statistics.mean(second - first, "accuracy", groups=[*map(str, range(12))])
  found = compared["differences"]["oracle"]["arc_easy/acc"]
  assert found["value"] == pytest.approx(expected.value)
  assert found["stderr"] == pytest.approx(expected.stderr)
  assert found["interval"] == pytest.approx(expected.interval95)
  evals = made.data["arms"]["baseline"]["evals"]
  assert evals["arc_easy/acc"]["value"] == pytest.approx(first.mean())
  assert evals["arc_easy/acc"]["chance"] == 0.5
  assert evals.keys() >= {"heldout_nll", "openwebtext/ppl_token"}
  text = " ".join(report.to_terminal(made).split())
  assert "task/metric" in text and "arc_easy/acc_norm" in text


def test_the_table_has_chance_the_baseline_and_differences(made):
  (section,) = [section for section in made.sections if section.title == "Benchmarks"]
  table = section.blocks[0]
  headers = [column.header for column in table.columns]
  assert headers[:4] == [
    "task/metric",
    "chance",
    "repeated",
    "oracle \N{MINUS SIGN} repeated (95%)",
  ]
  rows = {row[0]: row for row in table.rows}
  assert list(rows) == [
    *("arc_easy/acc", "arc_easy/acc_norm", "arc_easy/acc_bytes"),
    *("openwebtext/ppl_token", "openwebtext/bits_per_byte"),
  ]
  found = made.data["benchmarks"]["differences"]["oracle"]["openwebtext/ppl_token"]
  assert rows["openwebtext/ppl_token"][3].lines[0].value == found["value"]
  values = [
    made.data["benchmarks"]["evals"][arm]["openwebtext/ppl_token"]["value"]
    for arm in ("oracle", "baseline")
  ]
  assert found["value"] == pytest.approx(values[0] - values[1])


def test_the_checkpoints_on_disk_are_measured_and_drawn(config, finished, made):
  for arm in _ARMS:
    run = Run(finished, None)
    trained, measured = run.artifact(arm), run.artifact(f"dynamics/{arm}")
    steps = saved_steps(trained.folder)
    assert len(steps) == 2 and steps[-1] == trained.summary["step"]
    assert measured.summary == {"steps": steps[:-1]}
    points = made.data["dynamics"]["openwebtext/ppl_token"][arm]
    assert [point["step"] for point in points] == steps
    final = run.artifact(f"metrics/{arm}/openwebtext").summary["metrics"]["ppl_token"]
    assert points[-1]["value"] == final["value"] != points[0]["value"]
  titles = [section.title for section in made.sections]
  assert "Benchmarks during the first training of each arm" in titles


def test_stages_share_a_model_until_another_is_loaded(finished):
  trained = Run(finished, None).artifact("arms/oracle")
  parts = (LocalMeshConfig(), ComputeConfig(), EngineConfig(num_slots=4, max_length=64))
  steps = saved_steps(trained.folder)
  first = checkpoints.load_model(trained, *parts)
  assert checkpoints.load_model(trained, *parts) is first
  other = checkpoints.load_model(trained, *parts, step=steps[0])
  assert first.engine is None and other.engine is not None


def test_a_dynamics_stage_made_again_has_the_same_bytes(config, finished, tmp_path):
  folder = pathlib.Path(shutil.copytree(finished, tmp_path / "run"))
  measured = folder / "dynamics" / "arms" / "oracle"
  before = {path.name: path.read_bytes() for path in measured.iterdir() if path.is_file()}
  (measured / "manifest.json").unlink()
  (sorted(measured.glob("*.jsonl"))[0]).unlink()
  _run(config, folder, only=["dynamics/arms/oracle"])
  after = {path.name: path.read_bytes() for path in measured.iterdir() if path.is_file()}
  assert {n: b for n, b in after.items() if n[0] != "."} == {
    n: b for n, b in before.items() if n[0] != "."
  }


def test_training_text_is_checked_against_the_tasks_by_default(config, finished, made):
  found = made.data["decontamination"]["documents"]
  assert found["contaminated"] == 1
  assert set(found["tasks"]) == set(_TASKS)
  assert found["worst"][0]["tasks"] == {"arc_easy": 1}


def test_the_check_can_be_directed_and_turned_off(config, data_dir):
  named = config.benchmarks
  default = benchmarks.decontamination(DecontaminationConfig(), named)
  assert default == DecontaminationConfig(data_dir=str(data_dir), tasks=_TASKS)
  marks = DecontaminationConfig(action="mark", tasks=("arc_easy",))
  assert benchmarks.decontamination(marks, named) == dataclasses.replace(
    marks, data_dir=str(data_dir)
  )
  own = DecontaminationConfig(data_dir="elsewhere")
  assert benchmarks.decontamination(own, named) is own
  for off in (DecontaminationConfig(action="off"), dataclasses.replace(own, action="off")):
    assert benchmarks.decontamination(off, named) is None
  assert benchmarks.decontamination(DecontaminationConfig(), BenchmarksConfig()) is None
  hub = dataclasses.replace(named, hub=True)
  assert benchmarks.decontamination(DecontaminationConfig(), hub) is None


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"tasks": "arc_eazy"}, "benchmarks: there is no task 'arc_eazy'; the nearest names are arc_e"),
    ({"tasks": "sciq,sciq"}, "benchmarks: tasks='sciq,sciq' must name no task twice"),
    ({"data_dir": None}, "data_dir must name the folder with the files of tasks='arc_easy,open"),
    ({"max_length": 200}, "benchmarks.max_length=200 must be at most seq_len=128"),
    ({"max_length": 1}, "benchmarks.max_length=1"),
  ],
)
def test_a_section_that_cannot_run_is_refused(values, changes, told):
  with pytest.raises(ValueError, match=re.escape(told)):
    parse(sbp.Config, values | {"benchmarks": values["benchmarks"] | changes})


def test_a_missing_file_is_named_before_anything_is_made(config, tmp_path):
  missing = dataclasses.replace(config.benchmarks, data_dir=str(tmp_path / "nowhere"))
  with pytest.raises(ValueError, match=r"task arc_easy: there is no file .*nowhere"):
    _run(dataclasses.replace(config, benchmarks=missing), tmp_path / "run")
  assert not (tmp_path / "run" / "documents").exists()


def test_perplexities_change_in_their_own_unit(finished, made):
  found = made.data["benchmarks"]["differences"]["oracle"]["openwebtext/ppl_token"]
  assert found["unit"] == "perplexity per token"
  assert math.isfinite(found["stderr"]) and found["stderr"] > 0


@pytest.mark.slow
def test_a_run_in_a_bucket_is_scored_alike(config, finished, bucket):
  arm = "arms/oracle"
  for name in ("tokenizer", "examples/arc_easy", "examples/openwebtext", arm):
    storage.upload(finished / name, bucket / name)
  _run(config, bucket, only=[f"scores/{arm}/arc_easy", f"dynamics/{arm}"])
  for name in (f"scores/{arm}/arc_easy", f"dynamics/{arm}"):
    found, expected = (Run(f, None).artifact(name) for f in (bucket, finished))
    assert list(found.records()) == list(expected.records())
