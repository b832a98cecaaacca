"""Passages before questions, curves of arms, and test questions inside synthetic texts."""

import json
import math

import pytest

from selfimprove_jax.evaluation import qa
from selfimprove_jax.pipelines import entigraph
from selfimprove_jax.pipelines.entigraph import corpora
from selfimprove_jax.pipelines.entigraph.sources import read_documents
from selfimprove_jax.report import blocks, to_terminal
from selfimprove_jax.retrieval import rag
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime.config import parse


def _records(folder, stage):
  return list(artifacts.open_artifact(folder / stage).records())


@pytest.fixture(scope="module")
def asked(changed, run, tmp_path_factory):
  """A folder with the closed-book and open-book questions, three passages each."""
  folder = tmp_path_factory.mktemp("asked")
  page = changed(open_book__num_passages=3, open_book__num_candidates=4)
  books = ("questions", "open_questions")
  stages = ["sources", "passages"]
  stages += [f"{book}/{name}" for book in books for name in ("choices", "short_answers")]
  run(page, folder, only=stages)
  return folder


def test_the_best_passage_is_nearest_to_the_question(asked, changed):
  found = {record["question"]: record["passages"] for record in _records(asked, "passages")}
  assert len(found) == 4
  assert all(len(passages) == 3 for passages in found.values())
  documents = read_documents(artifacts.open_artifact(asked / "sources"))
  config = parse(entigraph.Config, changed()).open_book
  queries = [qa.retrieval_query(documents[1], documents[1].questions[0])]
  [best] = rag.build_index(documents, config.rag, seed=0).retrieve(queries, 3)
  assert found["moth-0"] == [one.chunk.text for one in reversed(best)]
  [example] = [r for r in _records(asked, "open_questions/choices") if r["id"] == "moth-0"]
  prompt = example["item"]["contexts"][0]
  places = [prompt.index(passage) for passage in found["moth-0"]]
  assert places == sorted(places)
  assert places[-1] < prompt.index("How long does it live")


def test_only_open_book_questions_have_passages(asked):
  for name in ("choices", "short_answers"):
    closed, opened = (_records(asked, f"{book}/{name}") for book in ("questions", "open_questions"))
    assert [r["id"] for r in closed] == [r["id"] for r in opened]
    assert not any("whale nut" in json.dumps(record) for record in closed)
    assert any("whale nut" in json.dumps(record) for record in opened)


def test_recall_is_that_of_the_document_and_of_its_answers(asked):
  summary = artifacts.open_artifact(asked / "passages").summary
  assert summary["questions"] == 4
  assert summary["recall_at_k"]["8"] == 1.0
  assert summary["answered_at_k"]["8"] == 1.0
  assert summary["answered_at_k"]["1"] <= summary["answered_at_k"]["2"]


def test_without_passages_nobody_is_asked_open_book(changed):
  stages = entigraph.stages(parse(entigraph.Config, changed(open_book__num_passages=0)))
  assert not any("open" in stage.name or stage.name == "passages" for stage in stages)


def test_more_passages_than_candidates_are_refused(changed):
  page = changed(open_book__num_passages=3, open_book__num_candidates=2)
  with pytest.raises(ValueError, match="num_passages=3 must be at most num_candidates=2"):
    parse(entigraph.Config, page)


def test_a_text_with_a_test_question_is_left_out(changed, run, niche, tmp_path):
  lines = (niche / "moth" / "questions.jsonl").read_text().splitlines()
  questions = [json.loads(line) for line in lines]
  quoted = "Which of the four wings of the moth is the one that is burned by the lamp"
  questions[0]["question"] = f"{quoted}?"
  folder = tmp_path / "niche"
  for document in ("mill", "moth"):
    (folder / document).mkdir(parents=True)
    for path in (niche / document).glob("*.jsonl"):
      (folder / document / path.name).write_text(path.read_text())
  (folder / "moth" / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
  path = folder / "moth" / "entigraph.jsonl"
  records = [json.loads(line) for line in path.read_text().splitlines()]
  records[-1]["text"] = f"They ask: {quoted.upper()}? And nobody knows."
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  page = changed(generator__folder=str(folder), sources__documents__folder=str(folder))
  steps = ["sources", "generator", "entities", "relations", "corpora/entigraph/documents"]
  run(page, tmp_path / "run", only=steps)
  artifact = artifacts.open_artifact(tmp_path / "run" / "corpora/entigraph/documents")
  texts = [r["text"] for r in artifact.read_jsonl("train-00000-of-00001.jsonl")]
  assert not any(quoted.upper() in text for text in texts)
  assert artifact.summary["decontamination"]["contaminated"] == 1
  [found] = artifact.read_jsonl("_contaminated.jsonl")
  assert found["tasks"] == {"source questions": 1}


@pytest.mark.slow
def test_the_report_has_four_cells_and_a_curve(finished, values):
  made = entigraph.report(Run(finished, parse(entigraph.Config, values), "the command"))
  cells = made.data["open_book"]["evals"]
  assert {"initial", "initial + passages", "raw", "raw + passages"} <= cells.keys()
  claims = [
    block.text
    for section in made.sections
    for block in section.blocks
    if isinstance(block, blocks.Text) and "> passages alone" in block.text
  ]
  assert len(claims) == len(values["arms"])
  [scaling] = [section for section in made.sections if section.title == "Scaling"]
  [figure] = [block for block in scaling.blocks if isinstance(block, blocks.Figure)]
  curve = figure.plot.lines[0]
  tokens = made.data["corpora"]["entigraph"]["tokens"]
  assert curve.x == pytest.approx([math.log10(tokens / 2), math.log10(tokens)])
  evals = made.data["answers"]["evals"]
  key = "short_answers/contains"
  assert curve.y == pytest.approx([evals[name][key]["value"] for name in ("half", "entigraph")])
  to_terminal(made)


def test_too_few_texts_for_the_embedding_leave_out_its_distances(
  changed, run, tmp_path, monkeypatch
):
  monkeypatch.setattr(corpora, "_LEAST_WORDS", 10)
  page = changed(open_book__rag__embedding={"method": "tfidf_svd", "dim": 500})
  steps = ["sources", "generator", "entities", "relations", "rephrasings"]
  steps += [f"corpora/{name}/documents" for name in ("entigraph", "rephrase")]
  run(page, tmp_path, only=[*steps, "diversity"])
  found = artifacts.open_artifact(tmp_path / "diversity").summary["corpora"]
  assert found.keys() == {"entigraph", "rephrase"}
  assert "distinct_4grams" in found["entigraph"]
  assert "embedding_distance" not in found["entigraph"]
