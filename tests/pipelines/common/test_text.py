"""Stages from raw text to packed rows, and what bad corpora do to them."""

import dataclasses
import json
import random

import numpy as np
import pytest

from selfimprove_jax.data import corpora, rows
from selfimprove_jax.data.split import SplitConfig
from selfimprove_jax.data.tokenizer import TokenizerConfig
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


def _stages(path, *, on_error="raise", unique_tokens=500, max_document_tokens=40, **options):
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
      TokenizerConfig(vocab_size=300, train_chars=5_000),
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


def test_the_tokenizer_sees_no_more_text_than_it_was_given():
  records = [{"text": "a" * 40}] * 10
  assert len(list(text._first_chars(records, 100))) == 3


def test_an_existing_tokenizer_can_be_taken(corpus, tmp_path):
  first = _stages(corpus)
  _run(tmp_path / "run", first[:2])
  path = tmp_path / "run" / "tokenizer" / "tokenizer"
  config = TokenizerConfig(path=str(path), vocab_size=300, train_chars=1)
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
  assert set(artifact.shards) == {f"{n}.array_record" for n in ("unique", "validation", "test")}
  assert 0 < artifact.summary["unique"]["tokens"] < 50_000
