"""Benchmarks before and after continued pretraining, and during it, in a tiny run."""

import json
import pathlib
import random
import re
from typing import Any

import pytest

from configs import cpt_quick
from selfimprove_jax import report
from selfimprove_jax.pipelines import continued_pretraining as cpt
from selfimprove_jax.report import page
from selfimprove_jax.runs import runner
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime.config import parse, to_json
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.runtime.progress import Progress

_WORDS = ("the", "a", "of", "sea", "wave", "salt", "tide", "hill", "rock", "pine", "path", "moss")


def _text(seed: int, num_words: int = 20) -> str:
  return " ".join(random.Random(seed).choices(_WORDS, k=num_words))


def _write(file: pathlib.Path, records: list[dict[str, Any]]) -> None:
  file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, Any]:
  """The page of the smoke run with a task of a YAML file; both corpora hold its first question."""
  folder = tmp_path_factory.mktemp("data")
  questions = [
    {"q": f"{_text(1000 + n, 15)}?", "options": ["sea", "rock"], "right": n % 2} for n in range(8)
  ]
  _write(folder / "mine.jsonl", questions)
  (folder / "mine.yaml").write_text(
    "task: mine\nfile: mine.jsonl\nprompt: '{{ q }}'\nchoices: options\ngold: right\n"
    "metrics: [acc, ppl_choices]\n"
  )
  c = json.loads(json.dumps(cpt_quick.get_config("smoke").to_dict()))
  for number, name in enumerate(("new_text", "replay")):
    documents = [{"text": _text(n)} for n in range(100 * number, 100 * number + 80)]
    _write(folder / f"{name}.jsonl", [*documents, {"text": f"{questions[0]['q']} {number}"}])
    paths = [str(folder / f"{name}.jsonl")]
    c[name]["source"] = {"kind": "jsonl", "paths": paths, "id_field": None}
    c[name]["split"] |= {"max_passage_chars": 10_000, "min_passage_chars": 1}
  c["initial"]["tokenizer"] |= {"vocab_size": 300}
  c["initial"]["total_tokens"] = 1000
  c["tokens"] |= {"new_text_tokens": 4000, "replay_tokens": 4000}
  c["model"]["num_layers"] = 1
  c["training"] |= {"num_evaluations": 1, "num_checkpoints": 2, "peak_lr": 1e-2}
  c["benchmarks"] = {
    "tasks": f"{folder}/mine.yaml",
    "data_dir": str(folder),
    "num_slots": 4,
    "at_checkpoints": True,
  }
  return c


@pytest.fixture(scope="module")
def finished(values, one_device_mesh, tmp_path_factory) -> Run:
  config = parse(cpt.Config, values)
  folder = tmp_path_factory.mktemp("run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(MeshConfig, "make", lambda self, devices=None: one_device_mesh)
    quiet = Progress(quiet=True)
    runner.run(cpt.stages(config), folder, progress=quiet, config=to_json(config))
  return Run(folder, config)


def test_the_change_of_every_metric_is_paired_by_question(finished):
  compared = cpt.report(finished).data["benchmarks"]
  assert compared["reference"] == "initial"
  found, right = compared["differences"]["tuned"], {}
  for model in ("initial", "tuned"):
    records = finished.artifact(f"scores/{model}/mine").records()
    right[model] = [record["prediction"] in record["gold"] for record in records]
    assert compared["evals"][model]["mine/acc"]["value"] == sum(right[model]) / 8
  assert found["mine/acc"]["value"] == (sum(right["tuned"]) - sum(right["initial"])) / 8
  assert found["mine/ppl_choices"]["value"] != 0


def test_the_report_shows_before_after_and_the_course_of_training(finished):
  made = cpt.report(finished)
  printed = " ".join(report.to_terminal(made).split())
  assert "task/metric chance before" in printed and "mine/ppl_choices" in printed
  points = made.data["dynamics"]["mine/acc"]["tuned"]
  steps = finished.artifact("dynamics/tuned").summary["steps"]
  last = finished.artifact("tuned").summary["step"]
  assert [point["step"] for point in points] == [0, *steps, last]
  assert len(steps) == 1
  evals = made.data["benchmarks"]["evals"]
  assert points[0]["value"] == evals["initial"]["mine/acc"]["value"]
  assert points[-1]["value"] == evals["tuned"]["mine/acc"]["value"]
  assert "Benchmarks during continued pretraining" in page.render(made)


def test_both_corpora_are_checked_against_the_task_by_default(finished):
  found = cpt.report(finished).data["decontamination"]
  for name in ("new_text", "replay"):
    assert found[name]["contaminated"] == 1
    assert list(found[name]["tasks"]) == ["mine"]


def test_a_checkpoint_is_scored_before_and_after_like_a_pretrained_model(values):
  checkpoint = {"kind": "checkpoint", "path": "/models/x"}
  for changes in ({}, {"initial": checkpoint}):
    names = [s.name for s in cpt.stages(parse(cpt.Config, values | changes))]
    assert names[0] == "examples/mine"
    after = names[names.index("export") + 1 :]
    assert [name for name in after if not name.startswith("metrics/")] == [
      *("scores/initial/mine", "scores/tuned/mine", "dynamics/tuned")
    ]


def test_a_window_longer_than_the_rows_is_refused(values):
  changed = values | {"benchmarks": values["benchmarks"] | {"max_length": 129}}
  told = "benchmarks.max_length=129 must be at most seq_len=128"
  with pytest.raises(ValueError, match=re.escape(told)):
    parse(cpt.Config, changed)
