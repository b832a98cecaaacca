"""A whole run on two tiny documents: corpora, matched arms, answers, and what was forgotten."""

import itertools
import json
import re
import shutil

import pytest

from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.language_models.transcript import NotInTranscriptError
from selfimprove_jax.pipelines import entigraph
from selfimprove_jax.pipelines.entigraph import corpora
from selfimprove_jax.report import page, to_terminal
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs.artifacts import ArtifactError
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime.config import parse

_SYNTHESIS = ["sources", "generator", "entities", "relations", "rephrasings"]
_CORPORA = [*_SYNTHESIS, *(f"corpora/{name}/documents" for name in ("raw", "entigraph"))]


@pytest.fixture(scope="module")
def made(finished, values):
  return entigraph.report(Run(finished, parse(entigraph.Config, values), "the command"))


@pytest.fixture(scope="module")
def data(made):
  return made.data


def _records(folder, stage):
  return list(artifacts.open_artifact(folder / stage).records())


def _texts(folder, corpus):
  records = artifacts.open_artifact(folder / f"corpora/{corpus}/documents")
  return [record["text"] for record in records.read_jsonl("train-00000-of-00001.jsonl")]


@pytest.mark.slow
def test_every_model_is_asked_every_question_and_compared_with_the_initial_one(data, values):
  answers = data["answers"]
  assert answers["reference"] == "initial"
  assert answers["evals"].keys() == {"initial", *values["arms"]}
  for found in answers["evals"].values():
    assert {"choices/acc", "choices/gold_nats", "short_answers/contains"} <= found.keys()
    assert {estimate["examples"] for estimate in found.values()} == {4}
    assert {estimate["num_groups"] for estimate in found.values()} == {2}
  for arm, differences in answers["differences"].items():
    change = differences["choices/gold_nats"]["value"]
    values = [answers["evals"][name]["choices/gold_nats"]["value"] for name in (arm, "initial")]
    assert change == pytest.approx(values[0] - values[1])
    assert change != 0
  assert data["answers_against_raw"]["reference"] == "raw"
  assert data["open_book"]["reference"] == "initial + passages"


@pytest.mark.slow
def test_forgetting_is_the_change_of_the_loss_on_held_out_groups_of_the_replay(data, finished):
  held_out = artifacts.open_artifact(finished / "replay/documents")
  groups = {r["group"] for r in held_out.read_jsonl("test-00000-of-00001.jsonl")}
  trained = {r["group"] for r in held_out.read_jsonl("train-00000-of-00001.jsonl")}
  assert groups and trained and not groups & trained
  initial = data["replay"]["initial"]
  assert initial["change"] is None
  for arm in data["answers"]["differences"]:
    loss, change = data["replay"][arm]["loss"], data["replay"][arm]["change"]
    assert change["num_groups"] == len(groups)
    assert change["value"] == pytest.approx(loss["value"] - initial["loss"]["value"])
    assert change["value"] != 0


@pytest.mark.slow
def test_arms_are_matched_within_a_step_and_share_their_rows_exactly(data, finished, values):
  step = values["training"]["batch_rows"] * values["seq_len"]
  num_rows = {
    name: artifacts.open_artifact(finished / f"{folder}/rows").summary["unique"]["records"]
    for name, folder in (("replay", "replay"), *((n, f"corpora/{n}") for n in data["corpora"]))
  }
  for name, arm in data["arms"].items():
    assert abs(arm["targets"] - 900) < step
    shares = dict(arm["passes"])
    replayed = shares.pop("replay") * num_rows["replay"]
    ((corpus, passes),) = shares.items()
    share = 0.5 if name == "half/0" else 1
    rows = passes * round(share * num_rows[corpus])
    assert replayed + rows == pytest.approx(2 * arm["steps_made"])
    assert replayed == pytest.approx(0.25 * 2 * arm["steps_made"], abs=1)


@pytest.mark.slow
def test_an_arm_with_early_stopping_keeps_the_step_with_the_lowest_loss_on_its_corpus(
  data, finished
):
  lines = (finished / "arms/stopped/0/metrics.jsonl").read_text().splitlines()
  losses = {
    record["step"]: record["validation/loss"]
    for record in map(json.loads, lines)
    if "validation/loss" in record
  }
  best = min(losses, key=losses.get)
  assert data["arms"]["stopped/0"]["step"] == best < data["arms"]["stopped/0"]["steps_made"]
  assert data["arms"]["raw/0"]["step"] == data["arms"]["raw/0"]["steps_made"]


@pytest.mark.slow
def test_corpora_and_their_repetitions_are_counted(data, finished):
  found = data["corpora"]
  # Two summaries, four pairs and a triplet; one text about a pair is that of another document.
  assert found["entigraph"] | {"tokens": 0} == {
    "texts": 6,
    "repeated": 1,
    "characters": sum(map(len, _texts(finished, "entigraph"))),
    "tokens": 0,
  }
  assert (found["raw"]["texts"], found["raw"]["repeated"]) == (5, 0)
  assert found["rephrase"]["texts"] == 8
  rows = artifacts.open_artifact(finished / "corpora/raw/rows").summary["unique"]
  assert found["raw"]["tokens"] == rows["tokens"] > 250
  assert data["synthesis"]["relations"]["records"] == 5
  assert data["synthesis"]["entities"]["failed"] == 0


@pytest.mark.slow
def test_the_report_says_what_each_arm_gained_and_is_a_page(made):
  assert re.search(r"entigraph: \d+% of the closed-book questions", made.lead)
  assert "1 texts of the corpus entigraph were dropped" in to_terminal(made)
  assert "rephrase" in page.render(made)


def test_a_raw_piece_begins_with_the_title_and_no_text_is_lost(run, values, tmp_path):
  run(values, tmp_path, ["sources", "corpora/raw/documents"])
  for document in _records(tmp_path, "sources"):
    title = f"{document['title']}\n\n"
    found = artifacts.open_artifact(tmp_path / "corpora/raw/documents")
    pieces = sorted((r for r in found.records() if r["group"] == document["id"]), key=_number)
    assert len(pieces) > 1
    assert all(piece["text"].startswith(title) for piece in pieces)
    joined = "\n\n".join(piece["text"].removeprefix(title) for piece in pieces)
    assert joined.split() == document["text"].split()
    for piece, following in itertools.pairwise(pieces):
      first = following["text"].removeprefix(title).split("\n\n")[0]
      assert len(piece["text"]) <= 100 < len(piece["text"]) + 2 + len(first)


def _number(record):
  return int(record["id"].rsplit("/", 1)[1])


def test_a_document_that_is_not_cut_is_one_piece():
  text = "One.\n\nTwo."
  document = SourceDocument("a", "The a", "", "", text, ())
  assert corpora.pieces(document, None) == [f"The a\n\n{text}"]


def test_a_limit_of_tokens_holds_for_all_texts_about_a_document(run, changed, tmp_path):
  run(changed(corpora__max_tokens_per_document=40), tmp_path, _CORPORA)
  written = [*_records(tmp_path, "entities"), *_records(tmp_path, "relations")]
  of_mill = [r for r in written if r["document"] == "mill"]
  sizes = [r["usage"]["completion_tokens"] for r in of_mill]
  assert sizes[0] < 40 <= sum(sizes[:2]) < sum(sizes)
  kept = _texts(tmp_path, "entigraph")
  in_corpus = [(r.get("summary") or r["text"]) in kept for r in of_mill]
  assert in_corpus == [True, True, *[False] * (len(of_mill) - 2)]
  assert len(_texts(tmp_path, "raw")) == 5


def test_every_document_has_an_equal_share_of_a_budget_of_tokens(run, changed, tmp_path):
  folders = tmp_path / "all", tmp_path / "some"
  for folder, tokens in zip(folders, (None, 40)):
    limits = {"max_texts_per_document": None, "max_tokens": tokens, "max_usd": None}
    run(changed(synthesis__relations=limits), folder, _SYNTHESIS[:-1])
  whole, cut = (_records(folder, "relations") for folder in folders)
  for document in ("mill", "moth"):
    tokens = [r["usage"]["completion_tokens"] for r in whole if r["document"] == document]
    expected = next(
      n for n in range(1, len(tokens) + 1) if sum(tokens[:n]) >= 20 or n == len(tokens)
    )
    assert len([r for r in cut if r["document"] == document]) == expected
  assert len(cut) < len(whole)


def test_a_budget_of_texts_counts_those_that_are_recorded(run, changed, niche, tmp_path):
  folder = tmp_path / "niche"
  shutil.copytree(niche, folder)
  path = folder / "mill" / "entigraph.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join([lines[0], *lines[3:]]))  # without the first two pairs
  page = changed(
    generator__folder=str(folder),
    synthesis__relations={"max_texts_per_document": 1, "max_tokens": None, "max_usd": None},
  )
  run(page, tmp_path / "run", _SYNTHESIS)
  found = [(r["document"], r["kind"], r["key"]) for r in _records(tmp_path / "run", "relations")]
  assert found == [
    ("mill", "pair", ["Ada Orn", "the river Tove"]),
    ("moth", "pair", ["the moth", "the lamp"]),
  ]


def test_an_unusable_recorded_text_is_a_failure_and_not_asked_for_again(
  run, changed, niche, tmp_path
):
  folder = tmp_path / "niche"
  shutil.copytree(niche, folder)
  path = folder / "mill" / "entigraph.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  record = json.loads(lines[1]) | {"text": "I'm sorry, but I cannot do that."}
  path.write_text("".join([lines[0], json.dumps(record) + "\n", *lines[2:]]))
  run(changed(generator__folder=str(folder)), tmp_path / "run", _SYNTHESIS)
  failed = [r for r in _records(tmp_path / "run", "relations") if "failure" in r]
  assert [(r["failure"]["reason"], r["failure"]["attempts"]) for r in failed] == [("refusal", 1)]


@pytest.fixture
def transcript(run, values, tmp_path):
  """A transcript of the recorded texts, and the page that replays it."""
  run(values, tmp_path / "recorded", ["sources", "generator"])
  path = tmp_path / "transcript.jsonl"
  shutil.copy(tmp_path / "recorded" / "generator" / "transcript.jsonl", path)
  return path


def test_a_transcript_gives_the_texts_that_were_recorded(run, changed, transcript, tmp_path):
  page = changed(generator={"kind": "transcript", "path": str(transcript)})
  run(page, tmp_path / "run", _SYNTHESIS)
  assert len(_records(tmp_path / "run", "relations")) == 5


def test_a_transcript_that_has_changed_is_refused(run, changed, transcript, tmp_path):
  page = changed(generator={"kind": "transcript", "path": str(transcript)})
  run(page, tmp_path / "run", ["sources", "generator"])
  transcript.write_text("".join(transcript.read_text().splitlines(keepends=True)[:-1]))
  with pytest.raises(ArtifactError, match=r"transcript\.jsonl has changed since the run began"):
    run(page, tmp_path / "run", ["entities"])


def test_a_request_that_a_transcript_lacks_is_named(run, changed, transcript, tmp_path):
  lines = transcript.read_text().splitlines(keepends=True)
  lacking = json.loads(lines[2])["request"]["id"]
  transcript.write_text("".join([*lines[:2], *lines[3:]]))
  page = changed(generator={"kind": "transcript", "path": str(transcript)})
  with pytest.raises(NotInTranscriptError, match=f"request '{lacking}' is not in .*transcript"):
    run(page, tmp_path / "run", _SYNTHESIS)
