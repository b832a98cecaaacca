"""A whole small evaluation: records, resumption, the report, the dry run, bad input."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from selfimprove_jax import report
from selfimprove_jax.evaluation import scoring
from selfimprove_jax.pipelines import evaluation
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime.config import parse


def _records(folder, task):
  return list(Run(folder, None).artifact(f"scores/{task}").records())


def test_every_example_has_a_record_that_says_what_was_asked_and_found(finished):
  choices = _records(finished, "arc_easy")
  assert [record["id"] for record in choices] == [f"arc_easy:{n}" for n in range(1, 8)]
  for record in choices:
    assert record["prompts"][0].endswith("\nAnswer:")
    best = max(range(2), key=lambda index: record["logprobs"][index])
    assert record["prediction"] == best
    assert record["truncated"] == 0
  for record in [*_records(finished, "triviaqa"), *_records(finished, "gsm8k")]:
    assert isinstance(record["generation"], str) and record["correct"] in (True, False)
  assert len(_records(finished, "gsm8k")) == 8
  assert [record["equal_choices"] for record in _records(finished, "mine")] == [1] * 7


def test_metrics_are_named_by_their_formulation(config, finished):
  made = evaluation.report(Run(finished, config))
  evals = made.data["evals"]
  assert sorted(evals) == [
    *("arc_easy/acc", "arc_easy/acc_bytes", "arc_easy/acc_norm"),
    *("gsm8k/number_match", "mine/acc", "openwebtext/bits_per_byte", "openwebtext/ppl_token"),
    "triviaqa/exact_match",
  ]
  right = [r["prediction"] in r["gold"] for r in _records(finished, "arc_easy")]
  assert evals["arc_easy/acc"]["value"] == pytest.approx(sum(right) / len(right))
  assert evals["arc_easy/acc"]["chance"] == 0.5
  assert evals["openwebtext/ppl_token"]["chance"] is None
  assert evals["openwebtext/ppl_token"]["num_groups"] == 3


def test_the_report_shows_chance_raw_generations_and_the_papers_columns(config, finished, tmp_path):
  made = evaluation.report(Run(finished, config))
  page = pathlib.Path(report.write(made, tmp_path / "report")).read_text()
  for record in _records(finished, "triviaqa")[:5]:  # lm-eval #1239: seen, not only counted
    assert record["id"] in page
  assert "raw generation" in page and "worst: " in page and "best: " in page
  assert "68.94 (SBP +2.65, oracle +4.29)" in page
  assert "mean of 6 accuracies" in page
  assert "arc_easy/acc_norm" in report.to_terminal(made)


def test_a_killed_run_scores_the_missing_shards_only(
  config, run, finished, tmp_path, monkeypatch, data_files
):
  """lm-eval #2533: results only at the end, and a cache bound to the number of processes."""
  only = ["checkpoint", "examples/arc_easy", "scores/arc_easy"]
  scored = []
  original = scoring.run

  def killed_in_the_second_shard(model, examples):
    if scored:
      raise KeyboardInterrupt
    return counted(model, examples)

  def counted(model, examples):
    scored.extend(example.id for example in examples)
    return original(model, examples)

  monkeypatch.setattr(scoring, "run", killed_in_the_second_shard)
  with pytest.raises(KeyboardInterrupt):
    run(config, tmp_path / "run", only=only)
  assert len(scored) == 3
  monkeypatch.setattr(scoring, "run", counted)
  run(config, tmp_path / "run", only=only)
  assert scored == [f"arc_easy:{number}" for number in range(1, 8)]
  files = {n: b for n, b in data_files(finished).items() if n.startswith("scores/arc_easy/")}
  assert {
    n: b for n, b in data_files(tmp_path / "run").items() if n.startswith("scores/arc_easy/")
  } == files


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"tasks": "arc_eazy"}, "no task 'arc_eazy'; the nearest names are arc_easy"),
    ({"tasks": "arc_easy,arc_easy"}, "must name no task twice"),
    ({"tasks": ""}, "at least one task"),
    ({"checkpoint": "http://127.0.0.1/v1"}, "endpoint.model must name its model"),
  ],
)
def test_a_config_that_cannot_run_is_refused(values, changes, told):
  with pytest.raises(ValueError, match=told):
    parse(evaluation.Config, values | changes)


def test_a_missing_file_is_named_with_its_shape(config, run, tmp_path):
  missing = dataclasses.replace(config, tasks="sciq")
  with pytest.raises(
    ValueError,
    match=r"sciq: there is no file .*sciq.jsonl.gz; it has JSON lines with the fields que",
  ):
    run(missing, tmp_path / "run")


def test_a_damaged_line_is_named(config, run, data_dir, tmp_path):
  folder = pathlib.Path(shutil.copytree(data_dir, tmp_path / "data"))
  (folder / "mine.jsonl").write_text('{"q": "1?", "options": ["a"], "right": 0}\n{"q"\n')
  changed = dataclasses.replace(config, data_dir=str(folder), tasks=f"{folder}/mine.yaml")
  with pytest.raises(ValueError, match=r"mine.jsonl, line 2: "):
    run(changed, tmp_path / "run")
  (folder / "mine.jsonl").write_text("[]\n")
  with pytest.raises(ValueError, match=r"line 1: .* a line must be a JSON object"):
    run(changed, tmp_path / "run")
  (folder / "mine.jsonl").write_text("")
  with pytest.raises(ValueError, match="has 0 examples"):
    run(changed, tmp_path / "run")


def test_the_dry_run_prints_whole_prompts_with_tokens_and_flops(config, checkpoint):
  shown = evaluation.preview(config)
  assert "== arc_easy: 7 examples, 14 requests, at most " in shown
  assert "-- arc_easy:3\nQuestion: what is 2 and 2?\nAnswer:\n[right] ' 2'\n[choice] ' 4'" in shown
  assert "arc_easy:4" not in shown
  assert "generates at most 24 tokens" in shown
  assert "FLOPs" in shown


@pytest.mark.slow
def test_stages_killed_at_every_file_that_they_write_end_with_the_same_bytes(
  finished, data_files, subprocess_options, tmp_path
):
  folder = tmp_path / "run"
  folder.mkdir()
  shutil.copy(finished / "config.json", folder)
  for name in ("checkpoint", "examples/arc_easy"):
    shutil.copytree(finished / name, folder / name)
  script = pathlib.Path(__file__).parents[1] / "kill_at_each_write.py"
  stages = ("scores/arc_easy", "metrics/arc_easy")
  process = subprocess.run(
    [sys.executable, str(script), str(folder), *stages], capture_output=True, **subprocess_options
  )
  assert process.returncode == 0, process.stdout + process.stderr
  kills = {line.split()[0]: line.split()[1:] for line in process.stdout.splitlines()}
  assert sum("before:000" in point for point in kills["scores/arc_easy"]) == 3  # shards
  expected = data_files(finished)
  for name, content in data_files(folder).items():
    if name.startswith(stages):
      assert content == expected[name], name


def test_the_whole_command(run_command, values, tmp_path, finished, data_files):
  command = [
    "--config=configs/evaluation.py",
    *(f"--config.{name}={values[name]}" for name in ("checkpoint", "tasks", "data_dir")),
    *("--config.examples_per_shard=3", "--config.engine.max_length=512"),
    "--config.engine.num_slots=4",
  ]
  dry = run_command(*command, "--dry_run")
  assert dry.returncode == 0, dry.stderr
  assert "== gsm8k: 8 examples" in dry.stdout
  process = run_command(*command, f"--workdir={tmp_path}/run")
  assert process.returncode == 0, process.stderr
  assert "arc_easy/acc_norm" in process.stdout
  told = json.loads((tmp_path / "run/report/report.json").read_text())
  assert told["evals"]["arc_easy/acc"]["chance"] == 0.5
