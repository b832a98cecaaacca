"""Stages from raw text to packed rows, and what bad corpora do to them."""

import dataclasses
import io
import json
import random

import numpy as np
import pytest

from selfimprove_jax.data import corpora, rows
from selfimprove_jax.data import tokenizer as tokenizer_lib
from selfimprove_jax.data.decontamination import DecontaminationConfig
from selfimprove_jax.data.split import SplitConfig
from selfimprove_jax.pipelines.common import text
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs import stage as stages
from selfimprove_jax.runs.stage import Stage
from selfimprove_jax.runtime.progress import Progress

_SPLIT = SplitConfig(
  num_shards=2,
  validation_fraction=0.1,
  test_fraction=0.1,
  max_passage_chars=200,
  min_passage_chars=20,
  order="group",
)


def _text(seed):
  words = [f"{a}{b}" for a in "bdfgklmn" for b in ("an", "ero", "ist", "ule")]
  return " ".join(random.Random(seed).choices(words, k=30))


def _write(path, num):
  path.write_text("".join(json.dumps({"id": f"d{i}", "text": _text(i)}) + "\n" for i in range(num)))


def _stages(
  path,
  *,
  on_error="raise",
  unique_tokens=500,
  max_document_tokens=40,
  train_chars=5_000,
  **options,
):
  if path.suffix == ".jsonl":
    source = corpora.JsonlConfig(paths=(str(path),))
  else:
    source = corpora.TextFolderConfig(folder=str(path))
  corpus = text.CorpusConfig(source=source, on_error=on_error, split=_SPLIT)
  rows_config = text.RowsConfig(
    seq_len=64,
    unique_tokens=unique_tokens,
    oracle_tokens=4 * unique_tokens,
    max_document_tokens=max_document_tokens,
    batch_documents=7,
  )
  return [
    Stage("documents", text.documents, text.DocumentsConfig(corpus=corpus, seed=0)),
    Stage(
      "tokenizer",
      text.tokenizer,
      text.TokenizerStageConfig(
        vocab_size=300, train_chars=train_chars, unique_tokens=unique_tokens
      ),
      {"documents": "documents"},
    ),
    Stage(
      "tokens",
      text.rows,
      dataclasses.replace(rows_config, **options),
      {"documents": "documents", "tokenizer": "tokenizer"},
    ),
  ]


def _run(folder, made):
  for stage in made:
    stages.run_stage(stage, folder, Progress(quiet=True))


@pytest.fixture
def corpus(tmp_path):
  path = tmp_path / "corpus.jsonl"
  _write(path, 150)
  return path


def test_oracle_data_begin_with_the_unique_data_and_the_budgets_hold(corpus, tmp_path):
  _run(tmp_path / "run", _stages(corpus))
  artifact = artifacts.open_artifact(tmp_path / "run" / "tokens")
  assert 500 <= artifact.summary["unique"]["tokens"] < 700
  assert 2000 <= artifact.summary["oracle"]["tokens"] < 2200
  tokenizer = text.open_tokenizer(artifacts.open_artifact(tmp_path / "run" / "tokenizer"))
  documents = artifacts.open_artifact(tmp_path / "run" / "documents")
  train = [
    (tokenizer.bos_id, *tokenizer.encode(record["text"]), tokenizer.eos_id)
    for record in text.split_records(documents, "train")
  ]
  unique, oracle = _packed_documents(artifact, "unique"), _packed_documents(artifact, "oracle")
  assert unique == set(train[: len(unique)])
  assert oracle == set(train[: len(oracle)])


def _packed_documents(artifact, part):
  found = set()
  for row in rows.open_rows(artifact, seq_len=64, prefix=f"{part}."):
    for segment in set(row["segment_ids"].tolist()) - {0}:
      found.add(tuple(row["tokens"][row["segment_ids"] == segment].tolist()))
  return found


def test_every_held_out_document_is_packed_and_none_is_trained_on(corpus, tmp_path):
  _run(tmp_path / "run", _stages(corpus, unique_tokens=2000, max_document_tokens=10_000))
  artifact = artifacts.open_artifact(tmp_path / "run" / "tokens")
  documents = artifacts.open_artifact(tmp_path / "run" / "documents")
  ids = {
    part: {record["id"] for record in artifact.read_jsonl(f"{part}.jsonl")}
    for part in ("unique", "validation", "test")
  }
  for name in ("validation", "test"):
    assert ids[name] == {r["id"] for r in text.split_records(documents, name)}
    assert not ids[name] & ids["unique"]


def test_documents_too_long_to_pair_are_trained_on_all_the_same(corpus, tmp_path):
  _run(tmp_path / "run", _stages(corpus, max_document_tokens=36))
  artifact = artifacts.open_artifact(tmp_path / "run" / "tokens")
  counts = [record["num_tokens"] for record in artifact.read_jsonl("unique.jsonl")]
  assert max(counts) <= 36
  assert sum(counts) < artifact.summary["unique"]["tokens"] - 100


@pytest.mark.parametrize("train_chars", [1_000, 100_000])
def test_the_tokenizer_sees_only_unique_documents_and_as_many_as_it_was_given(
  corpus, tmp_path, monkeypatch, train_chars
):
  trained_on = []

  def train_bpe(texts, **options):
    trained_on.append(list(texts))
    return tokenizer_lib.train_bpe(trained_on[-1], **options)

  monkeypatch.setattr(text, "train_bpe", train_bpe)
  made = _stages(corpus, train_chars=train_chars, max_document_tokens=10_000)
  _run(tmp_path / "run", made)
  artifact = artifacts.open_artifact(tmp_path / "run" / "tokens")
  unique = [record["text"] for record in artifact.read_jsonl("unique.jsonl")]
  seen = trained_on[-1]
  assert seen == unique[: len(seen)]
  if train_chars == 1_000:
    assert sum(map(len, seen[:-1])) < 1_000 <= sum(map(len, seen))
  else:
    assert len(unique) - len(seen) <= 1  # the last training may need a little fewer tokens
  summary = artifacts.open_artifact(tmp_path / "run" / "tokenizer").summary
  assert summary["train_documents"] == len(seen)
  assert summary["train_characters"] == sum(map(len, seen))


def test_an_existing_tokenizer_can_be_taken(corpus, tmp_path):
  first = _stages(corpus)
  _run(tmp_path / "run", first[:2])
  path = tmp_path / "run" / "tokenizer" / "tokenizer"
  config = text.TokenizerStageConfig(path=str(path), vocab_size=300, train_chars=1, unique_tokens=1)
  taken = Stage("taken", text.tokenizer, config)
  _run(tmp_path / "run", [taken])
  artifact = artifacts.open_artifact(tmp_path / "run" / "taken")
  assert artifact.summary["trained"] is False
  one, other = (
    text.open_tokenizer(artifacts.open_artifact(tmp_path / "run" / name))
    for name in ("tokenizer", "taken")
  )
  np.testing.assert_array_equal(one.encode(_text(3)), other.encode(_text(3)))


def test_an_empty_corpus_is_refused_and_the_run_goes_on_once_there_is_text(tmp_path):
  path = tmp_path / "corpus.jsonl"
  path.touch()
  made = _stages(path)
  with pytest.raises(ValueError, match="the corpus is empty: jsonl gave no document"):
    _run(tmp_path / "run", made)
  _write(path, 150)
  _run(tmp_path / "run", made)


def test_too_few_groups_of_test_documents_are_refused_before_anything_is_trained(corpus, tmp_path):
  first, *_ = _stages(corpus)
  config = dataclasses.replace(first.config, min_test_groups=99)
  told = r"for testing, and errors over groups need 99: raise corpus\.split\.test_fraction=0\.1"
  with pytest.raises(ValueError, match=told):
    _run(tmp_path, [dataclasses.replace(first, config=config)])


def test_a_line_that_does_not_parse_is_named_and_the_run_goes_on_once_it_is_mended(
  corpus, tmp_path
):
  lines = corpus.read_text().splitlines(keepends=True)
  corpus.write_text("".join([*lines[:40], '{"id": "d40", "te\n', *lines[41:]]))
  made = _stages(corpus)
  with pytest.raises(ValueError, match=r"corpus\.jsonl, line 41: not JSON"):
    _run(tmp_path / "run", made)
  corpus.write_text("".join(lines))
  _run(tmp_path / "run", made)
  whole = tmp_path / "whole"
  _run(whole, made)
  for name in ("documents", "tokens"):
    one, other = (artifacts.open_artifact(folder / name) for folder in (tmp_path / "run", whole))
    assert one.digest == other.digest


def test_a_document_that_is_not_utf8_is_named_or_left_out_and_kept_count_of(tmp_path):
  folder = tmp_path / "texts"
  for i in range(150):
    (folder / f"g{i % 30}").mkdir(parents=True, exist_ok=True)
    (folder / f"g{i % 30}" / f"{i}.txt").write_text(_text(i))
  bad = folder / "g3" / "3.txt"
  bad.write_bytes(b"caf\xe9 " * 20)
  with pytest.raises(ValueError, match=r"g3/3\.txt: not UTF-8 at byte 3 \(0xe9\)"):
    _run(tmp_path / "run", _stages(folder)[:1])
  _run(tmp_path / "skipping", _stages(folder, on_error="skip")[:1])
  artifact = artifacts.open_artifact(tmp_path / "skipping" / "documents")
  assert artifact.summary["rejected"] == 1
  (rejected,) = artifact.read_jsonl("_rejected.jsonl")
  assert "3.txt: not UTF-8" in rejected["message"]
  bad.write_text(_text(3))
  _run(tmp_path / "run", _stages(folder)[:1])


def test_rejected_and_repeated_documents_are_mentioned(tmp_path):
  path = tmp_path / "corpus.jsonl"
  _write(path, 150)
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join([*lines, *lines[:7], "{\n", "[" * 5_000 + "\n"]))
  said = io.StringIO()
  [made] = _stages(path, on_error="skip")[:1]
  stages.run_stage(made, tmp_path / "run", Progress(stream=said))
  assert "records skipped, because they are not documents: 2; `_rejected" in said.getvalue()
  assert f"The first: {path}, line 158: not JSON" in said.getvalue()
  assert "documents dropped, because others have the same text: 7 of 157" in said.getvalue()
  summary = artifacts.open_artifact(tmp_path / "run" / "documents").summary
  assert (summary["rejected"], summary["repeated"]) == (2, 7)


def test_a_corpus_smaller_than_the_unique_tokens_is_refused_with_what_there_is(corpus, tmp_path):
  with pytest.raises(ValueError, match=r"unique_tokens=50000, and the train documents hold \d+"):
    _run(tmp_path / "run", _stages(corpus, unique_tokens=50_000))


def test_a_corpus_smaller_than_the_oracle_asks_gives_all_it_has_and_says_so(corpus, tmp_path):
  _run(tmp_path / "run", _stages(corpus, unique_tokens=2_500))
  summary = artifacts.open_artifact(tmp_path / "run" / "tokens").summary
  assert 2_500 <= summary["unique"]["tokens"] < summary["oracle"]["tokens"] < 10_000


def test_a_corpus_may_fall_short_and_neither_oracle_nor_lists_be_asked_for(corpus, tmp_path):
  options = dict(may_fall_short=True, oracle_tokens=0, max_document_tokens=0)
  _run(tmp_path / "run", _stages(corpus, unique_tokens=50_000, **options))
  artifact = artifacts.open_artifact(tmp_path / "run" / "tokens")
  packed = {f"{n}.array_record" for n in ("unique", "validation", "test")}
  assert set(artifact.shards) == packed | {"validation.segments.jsonl", "test.segments.jsonl"}
  assert 0 < artifact.summary["unique"]["tokens"] < 50_000


@pytest.fixture
def benchmarks(tmp_path):
  """Benchmarks whose items are 4 documents of the corpus, two of them by a short question."""
  folder = tmp_path / "benchmarks"
  folder.mkdir()
  long = [{"question": f"Is it so? {_text(i)}", "answer": "no"} for i in (3, 60)]
  short = [{"question": " ".join(_text(i).split()[4:11]).upper()} for i in (99, 120)]
  for name, records in (("long", long), ("short", [*short, {"question": "Who?"}])):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  return folder


def _checked(corpus, folder, benchmarks, action):
  unchecked = _stages(corpus)[0]
  config = DecontaminationConfig(data_dir=str(benchmarks), action=action)
  _run(folder, [text.documents_stage("documents", unchecked.config, config)])
  return artifacts.open_artifact(folder / "documents")


def _ids(artifact):
  return {
    r["document"]
    for name in ("train", "validation", "test")
    for r in text.split_records(artifact, name)
  }


@pytest.mark.parametrize("action", ["drop", "mark"])
def test_documents_with_benchmark_items_are_dropped_or_marked_and_counted(
  action, corpus, benchmarks, tmp_path
):
  artifact = _checked(corpus, tmp_path / "run", benchmarks, action)
  found = artifact.summary["decontamination"]
  assert (found["documents"], found["contaminated"]) == (150, 4)
  assert found["tasks"] == {
    "long": {"items": 2, "unchecked": 0, "items_hit": 2, "documents_hit": 2},
    "short": {"items": 3, "unchecked": 1, "items_hit": 2, "documents_hit": 2},
  }
  hit = {f"corpus.jsonl:{line}" for line in (4, 61, 100, 121)}
  assert {r["id"] for r in artifact.read_jsonl("_contaminated.jsonl")} == hit
  assert {r["id"] for r in found["worst"]} == hit
  assert artifact.summary["documents"] == (146 if action == "drop" else 150)
  _run(tmp_path / "plain", _stages(corpus)[:1])
  everything = _ids(artifacts.open_artifact(tmp_path / "plain" / "documents"))
  assert everything >= hit
  assert _ids(artifact) == (everything - hit if action == "drop" else everything)


def test_without_benchmarks_the_stage_is_what_it_was(corpus):
  unchecked = _stages(corpus)[0]
  made = text.documents_stage("documents", unchecked.config, None)
  assert (made.function, made.config) == (unchecked.function, unchecked.config)
