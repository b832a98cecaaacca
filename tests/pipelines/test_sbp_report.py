"""The report's numbers are those of the artefacts."""

import json
import shutil

import pytest

from selfimprove_jax import artifacts
from selfimprove_jax.pipelines import runner, sbp_report
from selfimprove_jax.training.metrics_log import read_metrics


@pytest.fixture(scope="module")
def report(smoke):
  return sbp_report.make_report(runner.read_config(smoke.folder), smoke.folder, command="it")


def test_the_same_artefacts_give_the_numbers_that_the_run_wrote(report, smoke):
  written = json.loads((smoke.folder / "report" / "report.json").read_text())
  made = json.loads(json.dumps(report))
  for part in ("arms", "comparison", "pairs", "synthesis", "examples", "stages"):
    assert made[part] == written[part], part
  assert made["command"] == "it"


def test_losses_are_those_of_the_test_documents(report, smoke):
  for name in ("baseline", "oracle"):
    artifact = artifacts.open_artifact(smoke.folder / "arms" / name)
    losses = list(artifact.read_jsonl("test.jsonl"))
    nats = sum(record["nll"] for record in losses) / sum(record["tokens"] for record in losses)
    per_token = report["arms"][name]["evals"]["heldout_nll"]
    assert per_token["value"] == pytest.approx(nats)


def test_all_in_flops_are_the_sum_of_their_parts(report):
  for arm in report["arms"].values():
    assert arm["all_in_flops"] == pytest.approx(sum(arm["flops_parts"].values()))
  parts = report["arms"]["sbp"]["flops_parts"]
  assert parts.keys() == {"arm", "seed", "embedding", "tuning", "sampling"}
  all_in = report["arms"]["baseline_all_in"]["all_in_flops"]
  assert all_in == pytest.approx(report["arms"]["sbp"]["all_in_flops"], rel=0.02)


def test_the_curve_holds_every_evaluation_and_averages_of_the_training_loss(report, smoke):
  curve = report["arms"]["sbp"]["curve"]
  metrics = read_metrics(smoke.folder / "arms/sbp/metrics.jsonl")
  evaluated = [p["validation_loss"] for p in curve if p["validation_loss"] is not None]
  assert evaluated == [m["validation/loss"] for m in metrics if "validation/loss" in m]
  trained = [p["train_loss"] for p in curve if p["train_loss"] is not None]
  losses = [m["train/loss"] for m in metrics if "train/loss" in m]
  assert min(losses) <= min(trained) <= max(trained) <= max(losses)
  assert [p["step"] for p in curve] == sorted(p["step"] for p in curve)


def test_synthetic_documents_are_never_repeated(report):
  passes = report["arms"]["sbp"]["passes"]
  assert passes["sbp"] <= 1
  assert passes["unique"] > 1


def test_examples_are_real_texts_with_their_syntheses(report):
  sources = {example["source"] for example in report["examples"]}
  assert sources == {"sbp", "unconditional"}
  for example in report["examples"]:
    assert example["text"].strip()
    assert (example["seed_text"] is None) == (example["source"] == "unconditional")
  assert len(report["pair_examples"]) == 6


def test_a_report_of_an_unfinished_run_is_refused_with_the_stage(smoke, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(smoke.folder, folder)
  (folder / "arms" / "oracle" / "manifest.json").unlink()
  with pytest.raises(artifacts.ArtifactError, match=r"arms/oracle is unfinished"):
    sbp_report.make_report(runner.read_config(folder), folder, command="it")
