"""The report of continued pretraining from small artifacts with invented losses."""

import json
import pathlib
import shutil
from typing import Any

import pytest

from configs import cpt_quick
from selfimprove_jax import report as reports
from selfimprove_jax.pipelines import continued_pretraining
from selfimprove_jax.report import page
from selfimprove_jax.report.blocks import Report
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime.config import parse

_CONFIG = parse(
  continued_pretraining.Config, json.loads(json.dumps(cpt_quick.get_config("smoke").to_dict()))
)
_MINUS = "\N{MINUS SIGN}"


def _write(folder: pathlib.Path, name: str, summary: dict[str, Any], **files: list) -> None:
  writer = artifacts.Writer(folder / name, config={}, inputs={})
  for file, records in files.items():
    writer.write_jsonl(f"{file.replace('__', '-')}.jsonl", records)
  writer.finish(summary)


def _losses(per_token: float, *, num_documents: int = 40) -> list[dict[str, Any]]:
  spread = [0.1 if index % 2 else -0.1 for index in range(num_documents)]
  return [
    {"id": f"d{i}", "group": f"g{i}", "nll": 50 * (per_token + s), "tokens": 50, "bytes": 150.0}
    for i, s in enumerate(spread)
  ]


def _write_tuned(
  folder: pathlib.Path, *, replay_after: float, num_documents: int | None = 40
) -> None:
  curve = [{"step": 0, "validation/loss": 4.0}, {"step": 200, "validation/loss": 3.5}]
  curve += [{"step": step, "train/loss": 4.0 - step / 400} for step in range(1, 201)]
  summary = {
    "num_parameters": 51_424,
    "steps_made": 200,
    "tokens": 25_600,
    "flops": 9.2e9,
    "passes": {"new_text": 1.818, "replay": 0.198},
    "num_others": 1,
  }
  after, new_text = _losses(replay_after), {}
  if num_documents is not None:
    for when, loss in (("before", 4.2), ("after", 3.9)):
      new_text[f"{when}__new_text"] = _losses(loss, num_documents=num_documents)
  after[0]["nll"] += 4.0  # the documents do not change alike
  _write(
    folder,
    "tuned",
    summary,
    curve=curve,
    **new_text,
    before__replay=_losses(4.0),
    after__replay=after,
  )


def _write_run(folder: pathlib.Path, *, replay_after: float = 3.95, repeated: int = 0) -> Run:
  for name in ("new_text", "replay"):
    summary = {"documents": 233, "repeated": repeated, "groups": {"test": 8, "train": 45}}
    _write(folder, f"{name}/documents", summary)
    _write(folder, f"{name}/rows", {"unique": {"tokens": 12_039, "records": 99}})
  for name in ("tokenizer", "initial", "export"):
    _write(folder, name, {})
  _write_tuned(folder, replay_after=replay_after)
  return Run(folder, _CONFIG, "a command")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
  return _write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def made(run) -> Report:
  return continued_pretraining.report(run)


def test_the_json_holds_the_losses_before_and_after_and_what_was_trained(made):
  read = json.loads(reports.to_json(made))
  assert read["title"] == _CONFIG.title
  found = read["heldout"]["new_text"]
  assert (found["documents"], found["tokens"]) == (40, 2000)
  assert found["before"]["value"] == pytest.approx(4.2)
  assert found["after"]["value"] == pytest.approx(3.9)
  assert found["difference"]["value"] == pytest.approx(-0.3)
  assert found["difference"]["stderr"] == pytest.approx(0, abs=1e-9)  # paired by document
  assert found["bits_per_byte_before"]["unit"] == "bits per byte"
  assert read["tuned"] == {
    "num_parameters": 51_424,
    "steps_made": 200,
    "tokens": 25_600,
    "flops": 9.2e9,
    "passes": {"new_text": 1.818, "replay": 0.198},
  }
  assert len(read["curve"]) == 202
  assert read["rows"]["replay"]["unique"]["records"] == 99
  assert {stage["name"] for stage in read["stages"]} >= {"tuned", "export", "replay/rows"}


def test_the_table_the_passes_and_the_exported_model_are_printed(made, run):
  printed = reports.to_terminal(made)
  rows = {line.split("  ")[0]: line for line in printed.splitlines()}
  assert f"{_MINUS}0.300 \N{PLUS-MINUS SIGN} 0.000" in rows["new text"]
  assert "4.200 \N{PLUS-MINUS SIGN} 0.016" in rows["new text"]
  assert rows["new text"].split()[-2:] == ["40", "2.00k"]
  assert "200 steps, 25.6k tokens: 1.82 passes over new text, 0.20 passes over replay." in printed
  assert str(run.folder / "export" / "model") in printed
  assert "of one run and one seed" in " ".join(printed.split())


@pytest.mark.parametrize(
  ("replay_after", "words"),
  [
    (3.9, "loss on replay fell from 4.000 to 3.902"),
    (3.998, "loss on replay did not change measurably"),
    (4.1, "loss on replay rose from 4.000 to 4.102"),
  ],
)
def test_the_lead_says_how_each_loss_changed(replay_after, words, tmp_path):
  lead = continued_pretraining.report(_write_run(tmp_path, replay_after=replay_after)).lead
  assert lead.startswith(
    f"The held-out loss on new text fell from 4.200 to 3.900 nats per token ({_MINUS}0.300, 95% "
  )
  assert words in lead


def test_the_page_shows_losses_curves_and_corpora(made):
  html = page.render(made)
  assert html.count('<svg class="plot"') == 2
  unchecked = "Nothing was checked against benchmarks (new text, replay)"
  for words in ("Before and after", "<h3>New text</h3>", "<h3>Replay</h3>", "a command", unchecked):
    assert words in html
  assert "<dt>tokens, unique</dt><dd>12,039</dd>" in html
  assert "<dt>groups, test</dt><dd>8</dd>" in html
  assert "<dt>parameters</dt><dd>51,424</dd>" in html


def test_the_difference_is_the_second_column(made):
  header = made.sections[0].blocks[0].columns[1].header
  assert header == "after \N{MINUS SIGN} before (95%)"


def test_an_unfinished_run_reports_what_is_complete(run, tmp_path):
  (tmp_path / "replay").mkdir()
  (tmp_path / "replay" / "documents").symlink_to(run.folder / "replay" / "documents")
  made = continued_pretraining.report(Run(tmp_path, _CONFIG))
  assert made.lead.startswith("This run is unfinished: 1 of 8 stages are complete")
  assert "heldout" not in made.data
  printed = reports.to_terminal(made, examples=True)
  assert "groups, test" in printed
  assert "Replay" in printed
  assert "New text" not in printed


def test_a_corpus_whose_held_out_documents_are_one_group_has_no_interval(tmp_path):
  _write_tuned(tmp_path, replay_after=4.0, num_documents=1)
  made = continued_pretraining.report(Run(tmp_path, _CONFIG))
  found = json.loads(reports.to_json(made))["heldout"]["new_text"]
  assert found["difference"]["value"] == pytest.approx(-0.3)
  assert (found["difference"]["stderr"], found["groups"]) == (None, 1)
  assert "did not change measurably" in made.lead
  assert "95% interval unknown over 1 group." in made.lead
  assert "unknown" in reports.to_terminal(made)
  assert "inf" not in page.render(made).split("<svg")[0]


def test_a_corpus_of_which_nothing_is_held_out_is_not_measured(run, tmp_path):
  shutil.copytree(run.folder, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / "tuned")
  _write_tuned(tmp_path, replay_after=4.0, num_documents=None)
  made = continued_pretraining.report(Run(tmp_path, _CONFIG))
  assert made.lead.startswith("Nothing of new text was held out, so its loss was not measured. The")
  assert made.data["heldout"].keys() == {"replay"}
  page.render(made)


def test_dropped_repetitions_are_counted_in_the_summary(tmp_path):
  run = _write_run(tmp_path, repeated=12)
  printed = " ".join(reports.to_terminal(continued_pretraining.report(run)).split())
  assert "12 of 233 documents of new text were dropped, since others have the same text." in printed
