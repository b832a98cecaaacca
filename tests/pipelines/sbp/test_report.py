"""The report of SBP from small artifacts with invented numbers, and from the smoke run."""

import dataclasses
import json
import math
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import pytest

from configs import sbp_quick
from selfimprove_jax import report as reports
from selfimprove_jax.pipelines import sbp
from selfimprove_jax.pipelines.sbp.report import result_sections
from selfimprove_jax.report import formatting, page
from selfimprove_jax.report.blocks import Figure, Report, Section
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime.config import parse
from selfimprove_jax.training.metrics_log import read_metrics

_ARMS = {  # name -> held-out loss, optimizer steps
  "oracle": (3.362, 1540),
  "baseline": (4.061, 1540),
  "sbp": (3.992, 1540),
  "unconditional": (3.981, 1540),
  "baseline_all_in": (4.028, 4075),
}
_COSTS = {  # stage -> FLOPs
  "seed": 1.77e12,
  "embeddings": 2e9,
  "synthesizer/nearest": 2.9e12,
  "samples/sbp": 3.4e12,
  "samples/unconditional": 1.9e12,
}
_STEP_FLOPS = 4.9e12 / 1540
_SEED_TEXT = "numpy.linalg.lstsq: Return the least-squares solution to a linear equation."
_SYNTHESIS = 'Solve the problem for a triangular matrix, if <a> & "b" are given. ' + "x" * 1600
_CONFIG = parse(sbp.Config, json.loads(json.dumps(sbp_quick.get_config("smoke").to_dict())))


def _write(folder: pathlib.Path, name: str, summary: dict[str, Any], **files: list) -> None:
  writer = artifacts.Writer(folder / name, config={}, inputs={})
  for file, records in files.items():
    writer.write_jsonl(f"{file}.jsonl", records)
  writer.finish(summary)


def _estimate(value, stderr, unit="share"):
  return {"value": value, "stderr": stderr, "unit": unit, "num_groups": 40}


def _write_arms(folder: pathlib.Path) -> None:
  random = np.random.default_rng(0)
  tokens = random.integers(60, 250, size=240)
  hardness = random.normal(0, 0.55, size=240)
  for name, (loss, steps) in _ARMS.items():
    nll = (loss + hardness + random.normal(0, 0.08, size=240)) * tokens
    test = [
      {"id": f"t{i}", "group": f"g{i % 40}", "nll": x, "tokens": n, "bytes": 3.0 * n}
      for i, (x, n) in enumerate(zip(nll.tolist(), tokens.tolist()))
    ]
    curve = [{"step": 0, "validation/loss": 6.9}, {"step": steps, "validation/loss": loss + 0.02}]
    curve += [{"step": step, "train/loss": 6.9 - step / steps} for step in range(1, steps + 1)]
    summary = {
      "tokens": steps * 1024,
      "targets": steps * 900,
      "steps_made": steps,
      "num_parameters": 50_000,
      "flops": steps * _STEP_FLOPS,
      "best_validation": loss + 0.02,
      "final_validation": loss + (0.06 if name == "baseline" else 0.02),
      "passes": {"unique": 10.2, **({name: 0.97} if name in ("sbp", "unconditional") else {})},
    }
    _write(folder, f"arms/{name}", summary, test=test, curve=curve)
    if name in ("baseline", "sbp"):
      again = [{**record, "nll": record["nll"] + 0.01 * record["tokens"]} for record in test]
      _write(folder, f"arms/{name}-2", summary, test=again, curve=curve)


def _write_synthesis(folder: pathlib.Path, source: str) -> None:
  finish_reasons = {"stop": 7644, "length": 476}
  _write(
    folder,
    f"samples/{source}",
    {"flops": _COSTS[f"samples/{source}"]} | {"finish_reasons": finish_reasons},
  )
  document = {
    "seed_id": "numpy/linalg#lstsq" if source == "sbp" else None,
    "seed_text": _SEED_TEXT if source == "sbp" else None,
    "text": _SYNTHESIS,
    "finish_reason": "stop",
    "further": 1,
  }
  quality = {"repeated_3_word_runs": _estimate(0.009, 0.0006)}
  counts = {"sampled": 8120, "kept": 7894, "too_short": 201, "cut": 476}
  summary = {"counts": counts, "quality": quality}
  _write(folder, f"synthetic/{source}", summary, documents=[document] * 8)


def _write_run(folder: pathlib.Path) -> None:
  splits = {"test": 240, "train": 20_414}
  _write(folder, "documents", {"documents": 22_780, "groups": splits})
  _write(folder, "tokenizer", {"vocab_size": 1024, "trained": True})
  texts = [{"id": f"d{i}", "text": f"{_SEED_TEXT} {i}"} for i in range(20)]
  _write(folder, "tokens", {"unique": {"tokens": 77_700}}, unique=texts)
  _write(folder, "seed", {"flops": _COSTS["seed"], "tokens": 788_480})
  _write(folder, "embeddings", {"flops": _COSTS["embeddings"]})
  pairs = [{"d1": f"d{i}", "d2": f"d{i + 1}", "similarity": 0.3 + i / 40} for i in range(18)]
  summary = {"counts": {"candidates": 4312, "too_long": 301}, "recall": _estimate(0.984, 0.0042)}
  summary |= {"method": "exact", "same_group_share": 0.0}
  _write(folder, "pairs", {key: {"unique": value} for key, value in summary.items()}, unique=pairs)
  conditioning = {
    "true_nll": 4.121,
    "random_nll": 4.139,
    "gap": _estimate(0.018, 0.0031, "nats per token"),
    "gate": 0.05,
    "num_pairs": 212,
  }
  flops = _COSTS["synthesizer/nearest"]
  untuned = {**conditioning, "gap": _estimate(0.033, 0.0042, "nats per token")}
  tuned = {"step": 0, "steps_made": 128, "best_validation": 4.65}
  tuned |= {"untuned": {"validation": 4.65, "conditioning": untuned}}
  _write(folder, "synthesizer/nearest", {"flops": flops, "conditioning": conditioning, **tuned})
  for source in ("sbp", "unconditional"):
    _write_synthesis(folder, source)
  relevance = {
    "own": _estimate(0.033, 0.004),
    "random": _estimate(0.017, 0.002),
    "real": _estimate(0.23, 0.009),
    "unrelated": _estimate(0.02, 0.009),
    "real_pairs": "two documents of one group",
    "retained_share": _estimate(0.075, 0.011),
  }
  _write(folder, "relevance", relevance)
  _write_arms(folder)
  (folder / "timings.jsonl").write_text('{"stage": "arms/sbp", "seconds": 402.9}\n')


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
  folder = tmp_path_factory.mktemp("run")
  _write_run(folder)
  return Run(folder, _CONFIG, "python -m selfimprove_jax.main --config=configs/sbp_quick.py:smoke")


@pytest.fixture(scope="module")
def made(run) -> Report:
  return sbp.report(run)


@pytest.fixture(scope="module")
def data(made) -> dict[str, Any]:
  return made.data


@pytest.fixture(scope="module")
def html(made) -> str:
  return page.render(made)


def _text(html: str) -> str:
  return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def _without_figures(sections: tuple[Section, ...]) -> tuple[Section, ...]:
  """Keeps tables, facts and texts; drawing the figures takes most of the time."""

  def keep(blocks):
    for block in blocks:
      inner = getattr(block, "blocks", None)
      if not isinstance(block, Figure):
        yield block if inner is None else dataclasses.replace(block, blocks=tuple(keep(inner)))

  return tuple(keep(sections))


def _render(data) -> str:
  return page.render(
    Report("title", "", "", sections=_without_figures(result_sections(data)), data=data)
  )


def test_the_json_has_the_keys_that_readers_of_runs_rely_on(made, data):
  read = json.loads(reports.to_json(made))
  assert list(read)[:3] == ["title", "command", "config"]
  assert read.keys() >= {"commit", "versions", "hardware", "stages", "comparison", "examples"}
  for name, (loss, steps) in _ARMS.items():
    arm = read["arms"][name]
    assert arm["label"] == _CONFIG.arms[name].label
    assert arm["train_tokens"] == steps * 1024
    found = arm["evals"]["heldout_nll"]
    assert found["value"] == pytest.approx(loss, abs=0.1)
    assert found["stderr"] > 0
    assert found["unit"] == "nats per token"
    assert arm["evals"]["bits_per_byte"]["value"] == pytest.approx(found["value"] / math.log(8))
  assert read["config"]["arms"]["sbp"]["label"] == "SBP"
  assert next(s for s in read["stages"] if s["name"] == "arms/sbp")["seconds"] == 402.9


def test_all_in_flops_are_the_sum_of_their_parts(data):
  for arm in data["arms"].values():
    assert arm["all_in_flops"] == pytest.approx(sum(arm["flops_parts"].values()))
  parts = data["arms"]["sbp"]["flops_parts"]
  assert parts == {
    "seed": _COSTS["seed"],
    "embedding": _COSTS["embeddings"],
    "tuning": _COSTS["synthesizer/nearest"],
    "sampling": _COSTS["samples/sbp"],
    "arm": 4.9e12,
  }


def test_the_curve_holds_every_evaluation_and_averages_of_the_training_loss(data):
  curve = data["arms"]["sbp"]["curve"]
  assert [p["validation_loss"] for p in curve if p["validation_loss"]] == [6.9, 3.992 + 0.02]
  trained = [p for p in curve if p["train_loss"] is not None]
  assert 60 <= len(trained) <= 120
  assert [p["step"] for p in curve] == sorted(p["step"] for p in curve)
  assert curve[-1]["tokens"] == 1540 * 1024


def test_every_arm_is_on_the_page_with_its_numbers(html, data):
  text = _text(html)
  for name, arm in data["arms"].items():
    assert formatting.text(arm["label"]).replace("'", "&#39;") in text
    for found in arm["evals"].values():
      assert f"{formatting.fixed(found['value'])} {formatting.plus_minus(found['stderr'])}" in text
    assert formatting.fixed(arm["best_validation"]) in text
    assert formatting.short(arm["all_in_flops"]) in text
    if name in data["comparison"]["differences"]:
      difference = data["comparison"]["differences"][name]
      assert formatting.signed(difference["value"]) in text
      assert formatting.interval(difference["interval"]) in text
  assert "sbp 0.97" in text
  assert "unique 10.2" in text


def test_the_noise_of_the_seeds_the_groups_and_what_tuning_did_are_shown(html, data):
  noise = data["comparison"]["seed_noise"]
  assert (noise["degrees"], noise["num_trainings"]) == (2, 4)
  assert noise["stderr"] == pytest.approx(0.01 / math.sqrt(2))
  text = _text(html)
  assert "240 held-out documents in 40 groups" in text
  assert "measured on 4 trainings (repeated, SBP) with 2 degrees of freedom" in text
  assert "That is the seed model itself: tuning did not lower the loss." in text
  assert "untuned 4.650 0.033 \N{PLUS-MINUS SIGN} 0.004" in text
  assert "of the similarity of two documents of one group" in text
  assert "of one group 0%" in text
  assert "cut 476 476" in text


def test_no_claim_stands_twice_on_the_page(html, data):
  for claim in data["comparison"]["claims"]:
    assert html.count(claim["sentence"].replace("'", "&#39;")) == 1


def test_the_difference_is_the_second_column_of_the_arms(made):
  table = made.sections[0].blocks[1]
  assert [column.header for column in table.columns][:2] == [
    "arm",
    "difference to the baseline (95%)",
  ]
  assert [row[0].text for row in table.rows][:2] == ["repeated", "SBP"]  # fixed order


def test_the_verdict_every_claim_and_every_caveat_are_on_the_page_and_printed(made, html, data):
  compared = data["comparison"]
  assert {claim["holds"] for claim in compared["claims"]} == {True, False, None}
  printed = " ".join(reports.to_terminal(made).split())
  text = _text(html)
  for sentence in [compared["verdict"], *(claim["sentence"] for claim in compared["claims"])]:
    assert sentence.replace("'", "&#39;") in text
    assert sentence in printed
  for caveat in compared["caveats"]:
    assert caveat.replace("'", "&#39;") in text


def test_the_printed_table_has_every_arm_in_a_hundred_columns(made, data):
  printed = reports.to_terminal(made)
  assert max(len(line) for line in printed.splitlines()) <= 100
  for arm in data["arms"].values():
    assert formatting.fixed(arm["evals"]["heldout_nll"]["value"]) in printed
    assert all(formatting.fixed(loss) in printed for loss in arm["losses"])
    assert formatting.short(arm["all_in_flops"]) in printed


def test_examples_show_pairs_and_samples_next_to_their_seeds(made):
  printed = reports.to_terminal(made, examples=True)
  lines = printed.splitlines()
  assert sum(line.startswith("--- d1  d") for line in lines) == 6
  assert sum(" similarity 0." in line for line in lines) == 6
  assert sum(line.startswith("--- Synthesis  sbp") for line in lines) == 6
  assert sum(line == "--- Seed  numpy/linalg#lstsq" for line in lines) == 6  # of SBP alone
  assert sum(line == "--- Seed  none: sampled unconditionally" for line in lines) == 6


_PARTS = {  # a stage -> words that are in the report only if its artifact is complete
  "documents": "<h3>Documents</h3>",
  "tokenizer": "<h3>Tokenizer</h3>",
  "synthesizer/nearest": "Does the synthesizer use d1?",
  "relevance": "Is a sample about its seed?",
  "pairs": "<dt>candidates</dt>",
  "arms/oracle": "</span>oracle</td>",
}


@pytest.mark.parametrize("stage", _PARTS)
def test_an_unfinished_run_reports_what_is_complete(stage, run, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(run.folder, folder)
  (folder / stage / "manifest.json").unlink()
  made = sbp.report(dataclasses.replace(run, folder=folder))
  assert made.lead.startswith("This run is unfinished: ")
  html = page.render(dataclasses.replace(made, sections=_without_figures(made.sections)))
  for other, words in _PARTS.items():
    assert (words in html) == (other != stage), other


def test_a_run_that_has_made_nothing_yet_is_reported(run, tmp_path):
  made = sbp.report(dataclasses.replace(run, folder=tmp_path))
  assert made.lead == "This run is unfinished: 0 of 22 stages are complete, documents is not."
  assert made.claims == ()
  assert "The arms" not in reports.to_terminal(made, examples=True)


def test_arms_are_shown_without_the_controls_that_were_not_run(data):
  alone = {key: data[key] for key in ("arms", "comparison")} | {"synthesis": {}, "examples": []}
  alone["arms"] = {name: arm for name, arm in data["arms"].items() if name != "baseline_all_in"}
  alone["comparison"] = alone["comparison"] | {"claims": [], "versus": {}, "recovered": {}}
  html = _render(alone)
  assert "The arms" in html
  assert "No arm of equal all-in FLOPs was trained." in html
  assert "Pairs" not in html
  assert "Synthetic documents" not in html


def test_a_small_conditioning_gap_is_warned_about_and_a_large_one_is_not(data):
  controls = {key: data[key] for key in ("conditioning", "tuning")} | {"synthesis": {}}
  assert 'class="warning"' in _render(controls)
  gap = data["conditioning"]["gap"] | {"value": 0.12}
  controls["conditioning"] = data["conditioning"] | {"gap": gap}
  assert 'class="warning"' not in _render(controls)


def test_an_arm_of_another_name_gets_a_row_and_a_color(data):
  arms = data["arms"] | {"rephrased": data["arms"]["sbp"] | {"label": "Rephrased"}}
  html = _render({"arms": arms, "comparison": data["comparison"], "synthesis": {}})
  assert re.search(r'color:var\(--purple\)" aria-hidden="true">.</span>Rephrased</td>', html)


@pytest.mark.slow
def test_the_smoke_run_wrote_the_report_that_its_artifacts_give(smoke):
  made = sbp.report(Run(smoke.folder, _CONFIG, "it"))
  written = json.loads((smoke.folder / "report" / "report.json").read_text())
  again = json.loads(reports.to_json(made))
  for part in ("arms", "comparison", "pairs", "synthesis", "examples", "stages"):
    assert again[part] == written[part], part
  assert again["command"] == "it"
  for name in ("oracle", "unconditional"):
    losses = list(artifacts.open_artifact(smoke.folder / "arms" / name).read_jsonl("test.jsonl"))
    nats = sum(record["nll"] for record in losses) / sum(record["tokens"] for record in losses)
    assert again["arms"][name]["evals"]["heldout_nll"]["value"] == pytest.approx(nats)


@pytest.mark.slow
def test_the_curve_of_the_smoke_run_is_that_of_its_metrics(smoke):
  made = sbp.report(Run(smoke.folder, _CONFIG))
  curve = made.data["arms"]["sbp"]["curve"]
  metrics = read_metrics(smoke.folder / "arms/sbp/metrics.jsonl")
  evaluated = [p["validation_loss"] for p in curve if p["validation_loss"] is not None]
  assert evaluated == [m["validation/loss"] for m in metrics if "validation/loss" in m]
  trained = [p["train_loss"] for p in curve if p["train_loss"] is not None]
  losses = [m["train/loss"] for m in metrics if "train/loss" in m]
  assert min(losses) <= min(trained) <= max(trained) <= max(losses)


@pytest.mark.slow
def test_the_smoke_run_costs_what_its_parts_cost_and_repeats_no_synthetic_document(smoke):
  arms = sbp.report(Run(smoke.folder, _CONFIG)).data["arms"]
  assert arms["baseline_all_in"]["all_in_flops"] == pytest.approx(
    arms["sbp"]["all_in_flops"], rel=0.02
  )
  assert arms["sbp"]["flops_parts"].keys() == {"arm", "seed", "embedding", "tuning", "sampling"}
  assert arms["sbp"]["passes"]["sbp"] <= 1
  assert arms["sbp"]["passes"]["unique"] > 1


@pytest.mark.slow
def test_the_smoke_run_has_real_texts_with_their_syntheses(smoke):
  data = sbp.report(Run(smoke.folder, _CONFIG)).data
  assert {example["source"] for example in data["examples"]} == {"sbp", "unconditional"}
  for example in data["examples"]:
    assert example["text"].strip()
    assert (example["seed_text"] is None) == (example["source"] == "unconditional")
  assert len(data["pair_examples"]) == 6
