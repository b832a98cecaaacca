"""Sampling in shards until there is enough, and rows of what passes the filters."""

import random
import shutil

import pytest

from selfimprove_jax import artifacts
from selfimprove_jax.data import rows, tokenizer
from selfimprove_jax.pipelines import stages, synthesis_stages
from selfimprove_jax.pipelines.stages import Stage
from selfimprove_jax.progress import Progress
from selfimprove_jax.sampling.requests import Completion
from selfimprove_jax.training import preemption

_WORDS = [f"{a}{b}" for a in "bdfgklmn" for b in ("an", "ero", "ist", "ule")]
_MODEL = dict(
  vocab_size=300, num_layers=1, embed_dim=8, mlp_dim=8, num_heads=1, num_kv_heads=1, head_dim=8
)
_SAMPLE = dict(
  target_tokens=100,
  documents_per_shard=4,
  max_shards=10,
  mesh=dict(data=1, fsdp=-1, tensor=1),
  sampling=dict(temperature=1.0, top_k=0, top_p=1.0),
  num_slots=4,
  prompt_buckets=[64],
  max_new_tokens=20,
  seed=3,
)
_ROWS = dict(
  seq_len=64,
  filter=dict(min_tokens=4, max_repetition=0.3, max_jaccard=0.5, shingle_size=3),
  quality=dict(sample_size=100),
  seed=0,
)


def _text(seed, num_words=12):
  return " ".join(random.Random(seed).choices(_WORDS, k=num_words))


@pytest.fixture
def run_folder(tmp_path):
  """A run with a tokenizer, unique documents, and a model that is only described."""
  writer = artifacts.Writer(tmp_path / "tokenizer", config={}, inputs={})
  trained = tokenizer.train_bpe([_text(i) for i in range(50)], vocab_size=300)
  with writer.shard("tokenizer") as (folder, _):
    trained.save(folder)
  writer.finish({"vocab_size": trained.vocab_size})
  writer = artifacts.Writer(tmp_path / "tokens", config={}, inputs={})
  writer.write_jsonl("unique.jsonl", ({"id": f"d{i}", "text": _text(i)} for i in range(5)))
  writer.finish()
  artifacts.Writer(tmp_path / "model", config={}, inputs={}).finish({"model": _MODEL})
  return tmp_path


@pytest.fixture
def sampled(monkeypatch):
  """Record numbers that were sampled; each completion is a function of number and prompt."""
  numbers = []

  class Engine:
    def __init__(self, *_, **__):
      pass

    def stats(self):
      return {"stop": 1}

    def stream(self, requests, *, on_tokens):
      for place, request in enumerate(requests):
        number, length = request.record_id, len(request.prompt)
        numbers.append(number)
        tokens = [20 + (number * 7 + i + length) % 200 for i in range(10 + number % 3)]
        on_tokens(len(tokens))
        yield place, Completion(tokens, "stop" if number % 2 else "length")

  monkeypatch.setattr(synthesis_stages, "load_model", lambda artifact, mesh: (None, None))
  monkeypatch.setattr(synthesis_stages, "Engine", Engine)
  return numbers


def _sample(run_folder, name="samples/sbp", conditional=True, **changes):
  stage = Stage(
    name,
    "synthesis_stages:sample",
    {"conditional": conditional, **_SAMPLE, **changes},
    {"tokens": "tokens", "tokenizer": "tokenizer", "model": "model"},
  )
  stages.run_stage(stage, run_folder, Progress(quiet=True))
  return artifacts.open_artifact(run_folder / name)


def test_sampling_ends_with_the_shard_that_reaches_the_target(run_folder, sampled):
  artifact = _sample(run_folder)
  assert sampled == list(range(12))  # 4 documents hold about 44 tokens
  records = list(artifact.records())
  assert artifact.summary["documents"] == len(records) == 12
  assert artifact.summary["tokens"] == sum(record["num_tokens"] for record in records) >= 100
  assert artifact.summary["finish_reasons"] == {"length": 6, "stop": 6}
  assert artifact.summary["flops"] > 0


def test_a_record_names_its_seed_document_and_does_not_depend_on_the_shards(run_folder, sampled):
  few = list(_sample(run_folder, "few").records())
  many = list(_sample(run_folder, "many", documents_per_shard=6).records())
  assert [{**r, "id": ""} for r in few] == [{**r, "id": ""} for r in many]
  assert [record["id"] for record in few[:2]] == ["few-000000000", "few-000000001"]
  documents = {
    r["id"]: r["text"]
    for r in artifacts.open_artifact(run_folder / "tokens").read_jsonl("unique.jsonl")
  }
  assert all(record["seed_text"] == documents[record["seed_id"]] for record in few)
  assert len({record["seed_id"] for record in few}) > 2


def test_unconditional_samples_have_no_seed_document(run_folder, sampled):
  for record in _sample(run_folder, conditional=False).records():
    assert record["seed_id"] is None
    assert record["seed_text"] is None
    assert record["num_prompt_tokens"] == 1


def test_shards_that_are_there_are_not_sampled_again(run_folder, sampled):
  artifact = _sample(run_folder)
  whole = {path.name: path.read_bytes() for path in artifact.folder.glob("*.jsonl")}
  (artifact.folder / "00001.jsonl").write_bytes(b"")
  sampled.clear()
  _sample(run_folder)
  assert sampled == [4, 5, 6, 7]
  assert {path.name: path.read_bytes() for path in artifact.folder.glob("*.jsonl")} == whole


def test_sigterm_ends_sampling_within_a_shard_and_those_before_it_are_kept(
  run_folder, sampled, monkeypatch
):
  with monkeypatch.context() as patch, pytest.raises(preemption.Preempted, match="143"):
    patch.setattr(preemption, "requested", lambda step: len(sampled) == 6)
    _sample(run_folder)
  assert sampled == list(range(6))
  sampled.clear()
  assert _sample(run_folder).summary["documents"] == 12
  assert sampled == list(range(4, 12))


def test_shards_of_other_processes_are_taken_in_and_those_beyond_the_target_removed(
  run_folder, sampled
):
  written = _sample(run_folder)
  folder = run_folder / "others"
  folder.mkdir()
  for name in ("00001.jsonl", "00007.jsonl"):  # as they lie there when the job is killed
    shutil.copy(written.folder / "00001.jsonl", folder / name)
  sampled.clear()
  artifact = _sample(run_folder, "others")
  assert sampled == [0, 1, 2, 3, 8, 9, 10, 11]
  assert artifact.summary == written.summary
  assert sorted(artifact.shards) == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
  assert not (folder / "00007.jsonl").exists()


def test_too_few_shards_for_the_target_are_refused_with_what_there_is(run_folder, sampled):
  with pytest.raises(ValueError, match=r"2 shards \(8 documents\) hold 87 tokens.*max_shards"):
    _sample(run_folder, max_shards=2)


def _write_samples(run_folder, texts):
  writer = artifacts.Writer(run_folder / "samples", config={}, inputs={})
  writer.write_jsonl(
    "00000.jsonl",
    (
      {"id": f"s{i}", "seed_id": "d0", "seed_text": _text(0), "text": text, "num_tokens": 20}
      for i, text in enumerate(texts)
    ),
  )
  writer.finish()


def _rows(run_folder):
  stage = Stage(
    "synthetic/sbp",
    "synthesis_stages:synthetic_rows",
    _ROWS,
    {"tokens": "tokens", "tokenizer": "tokenizer", "samples": "samples"},
  )
  stages.run_stage(stage, run_folder, Progress(quiet=True))
  return artifacts.open_artifact(run_folder / "synthetic/sbp")


def test_rows_hold_what_passed_and_the_dropped_stay_beside_with_the_reason(run_folder):
  _write_samples(run_folder, [_text(100), _text(0), "ban " * 12, _text(101)])
  artifact = _rows(run_folder)
  assert artifact.summary["counts"]["kept"] == 2
  assert [r["id"] for r in artifact.records()] == ["s0", "s3"]
  dropped = {r["id"]: r["reason"] for r in artifact.read_jsonl("_dropped.jsonl")}
  assert dropped == {"s1": "near_duplicate", "s2": "looping"}
  assert artifact.summary["quality"]["pair_copying"]["value"] == 0.25
  source = rows.open_rows(artifact, seq_len=64, prefix="rows.")
  segments = sum(int(row["segment_ids"].max()) for row in source)
  assert (len(source), segments) == (artifact.summary["rows"]["records"], 2)


def test_filters_that_drop_everything_are_told_of(run_folder):
  _write_samples(run_folder, ["ban " * 12, _text(0)])
  with pytest.raises(ValueError, match=r"dropped all 2 documents .*'looping': 1"):
    _rows(run_folder)


def test_relevance_tells_syntheses_of_the_seed_from_syntheses_of_anything(tmp_path):
  # Documents of four topics of their own words; pairs and syntheses keep to the topic.
  def topic(number, seed):
    return " ".join(random.Random(seed).choices(_WORDS[8 * number : 8 * number + 8], k=20))

  writer = artifacts.Writer(tmp_path / "tokens", config={}, inputs={})
  for role, start in (("unique", 0), ("test", 100)):
    records = [{"id": f"{role}{i}", "text": topic(i % 4, start + i)} for i in range(40)]
    writer.write_jsonl(f"{role}.jsonl", records)
  writer.finish()
  writer = artifacts.Writer(tmp_path / "pairs", config={}, inputs={})
  writer.write_jsonl("test.jsonl", [{"d1": f"test{i}", "d2": f"test{i + 4}"} for i in range(20)])
  writer.finish()
  writer = artifacts.Writer(tmp_path / "synthetic", config={}, inputs={})
  writer.write_jsonl(
    "documents.jsonl",
    [{"seed_text": topic(i % 4, i), "text": topic(i % 4, 200 + i)} for i in range(40)],
  )
  writer.finish()
  stage = Stage(
    "relevance",
    "synthesis_stages:relevance",
    dict(dim=4, sample_size=30, seed=0),
    {"tokens": "tokens", "pairs": "pairs", "synthetic": "synthetic"},
  )
  stages.run_stage(stage, tmp_path, Progress(quiet=True))
  summary = artifacts.open_artifact(tmp_path / "relevance").summary
  assert summary["own"]["value"] > summary["random"]["value"] + 0.3
  assert summary["retained_share"] == pytest.approx(1.0, abs=0.2)
