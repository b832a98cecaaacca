"""Pairs, sampling in shards until there is enough, and rows of samples that pass the filters."""

import dataclasses
import importlib
import random
import shutil

import jax
import numpy as np
import pytest

from selfimprove_jax.data import rows, tokenizer
from selfimprove_jax.data.decontamination import DecontaminationConfig
from selfimprove_jax.models.llama import Llama, LlamaConfig, init_params
from selfimprove_jax.pipelines.sbp.stages import (
  CheckedSyntheticRowsStageConfig,
  ModelEmbeddingsConfig,
  PairsStageConfig,
  RelevanceStageConfig,
  SamplesStageConfig,
  SyntheticRowsStageConfig,
  TfidfEmbeddingsConfig,
  checked_synthetic_rows,
  model_embeddings,
  pairs,
  relevance,
  samples,
  synthetic_rows,
  tfidf_embeddings,
)
from selfimprove_jax.retrieval import embedding
from selfimprove_jax.retrieval.ann import SearchConfig
from selfimprove_jax.retrieval.pairs import PairFilterConfig
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs.stage import Stage, run_stage
from selfimprove_jax.runtime import preemption
from selfimprove_jax.runtime.config import to_json
from selfimprove_jax.runtime.partitioning import LocalMeshConfig, MeshConfig
from selfimprove_jax.runtime.progress import Progress
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import Completion, SamplingConfig
from selfimprove_jax.synthesis import sbp
from selfimprove_jax.synthesis.data_quality import QualityConfig
from selfimprove_jax.synthesis.filters import DocumentFilterConfig

# The package's name `stages` is its function.
_MODULE = importlib.import_module("selfimprove_jax.pipelines.sbp.stages")
_QUIET = Progress(quiet=True)
_WORDS = [f"{a}{b}" for a in "bdfgklmn" for b in ("an", "ero", "ist", "ule")]
_MODEL = LlamaConfig(
  vocab_size=300, num_layers=1, embed_dim=8, mlp_dim=8, num_heads=1, num_kv_heads=1, head_dim=8
)
_SAMPLE = dict(
  target_tokens=100,
  documents_per_shard=4,
  max_shards=10,
  mesh=LocalMeshConfig(data=1, fsdp=-1),
  sampling=SamplingConfig(),
  num_slots=4,
  prompt_buckets=(64,),
  max_new_tokens=20,
  seed=3,
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
  records = ({"id": f"d{i}", "group": f"g{i}", "text": _text(i)} for i in range(5))
  writer.write_jsonl("unique.jsonl", records)
  writer.finish()
  artifacts.Writer(tmp_path / "model", config={}, inputs={}).finish({"model": to_json(_MODEL)})
  return tmp_path


@pytest.fixture
def sampled(monkeypatch):
  """Record numbers that were sampled; each completion is a function of number and prompt."""
  numbers = []

  class FakeEngine(Engine):
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

  monkeypatch.setattr(_MODULE.models, "load_model", lambda artifact, mesh: (None, None))
  monkeypatch.setattr(_MODULE, "Engine", FakeEngine)
  return numbers


def _sample(run_folder, name="samples/sbp", conditional=True, **changes):
  config = SamplesStageConfig(**{**_SAMPLE, "conditional": conditional, **changes})
  inputs = {"tokens": "tokens", "tokenizer": "tokenizer", "model": "model"}
  run_stage(Stage(name, samples, config, inputs, uses_devices=True), run_folder, _QUIET)
  return artifacts.open_artifact(run_folder / name)


def test_sampling_ends_with_the_shard_that_reaches_the_target(run_folder, sampled):
  artifact = _sample(run_folder)
  assert sampled == list(range(12))  # 4 documents hold about 44 tokens
  records = list(artifact.records())
  assert artifact.summary["documents"] == len(records) == 12
  assert artifact.summary["tokens"] == sum(record["num_tokens"] for record in records) >= 100
  assert artifact.summary["finish_reasons"] == {"length": 6, "stop": 6}
  read_and_written = [r["num_prompt_tokens"] + r["num_tokens"] for r in records]
  assert max(read_and_written) < 84  # the longest prompt and completion
  assert artifact.summary["flops"] == sum(
    n * _MODEL.forward_flops_per_token(n) for n in read_and_written
  )


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


def test_sigterm_ends_sampling_within_a_shard_and_keeps_those_before_it(
  run_folder, sampled, monkeypatch
):
  with monkeypatch.context() as patch, pytest.raises(preemption.Preempted, match="143"):
    patch.setattr(preemption, "requested", lambda step: len(sampled) == 6)
    _sample(run_folder)
  assert sampled == list(range(6))
  sampled.clear()
  assert _sample(run_folder).summary["documents"] == 12
  assert sampled == list(range(4, 12))


def test_shards_of_other_processes_are_kept_and_those_beyond_the_target_removed(
  run_folder, sampled
):
  written = _sample(run_folder)
  folder = run_folder / "others"
  folder.mkdir()
  for name in ("00001.jsonl", "00007.jsonl"):  # as a killed job leaves them
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


def test_the_engine_starts_the_next_shard_before_the_last_one_is_whole(run_folder, monkeypatch):
  asked_when_shard_0_appeared = []

  class FakeEngine(Engine):
    def __init__(self, *_, **__):
      pass

    def stats(self):
      return {}

    def stream(self, requests, *, on_tokens):
      asked = list(zip(range(6), requests))  # 6 slots; the first request ends last
      for place, request in (*asked[1:], asked[0]):
        yield place, Completion([20 + request.record_id] * 10, "stop")
      asked_when_shard_0_appeared.append((run_folder / "samples/sbp/00000.jsonl").exists())
      for place, request in enumerate(requests, start=6):
        yield place, Completion([20 + request.record_id] * 10, "stop")

  monkeypatch.setattr(_MODULE.models, "load_model", lambda artifact, mesh: (None, None))
  monkeypatch.setattr(_MODULE, "Engine", FakeEngine)
  artifact = _sample(run_folder)
  assert asked_when_shard_0_appeared == [True]
  assert [r["id"][-2:] for r in artifact.records()] == [f"{i:02d}" for i in range(12)]
  decoder = tokenizer.load_tokenizer(run_folder / "tokenizer" / "tokenizer")
  for number, record in enumerate(artifact.records()):
    assert record["text"] == decoder.decode([20 + number] * 10)


def test_a_finished_sampling_makes_no_engine(run_folder, sampled, monkeypatch):
  artifact = _sample(run_folder)
  (artifact.folder / "manifest.json").unlink()
  monkeypatch.setattr(_MODULE, "Engine", None)
  assert _sample(run_folder).summary == artifact.summary


def _write_samples(run_folder, texts, cut=()):
  writer = artifacts.Writer(run_folder / "samples", config={}, inputs={})
  writer.write_jsonl(
    "00000.jsonl",
    (
      {
        "id": f"s{i}",
        "seed_id": "d0",
        "seed_text": _text(0),
        "text": text,
        "num_tokens": 20,
        "finish_reason": "length" if i in cut else "stop",
      }
      for i, text in enumerate(texts)
    ),
  )
  writer.finish()


def _rows(run_folder, **changes):
  config = SyntheticRowsStageConfig(
    filter=DocumentFilterConfig(min_tokens=4, max_repetition=0.3, max_jaccard=0.5),
    quality=QualityConfig(sample_size=100),
    seq_len=64,
    shingle_size=3,
    seed=0,
    **changes,
  )
  inputs = {"tokens": "tokens", "tokenizer": "tokenizer", "samples": "samples"}
  run_stage(Stage("synthetic/sbp", synthetic_rows, config, inputs), run_folder, _QUIET)
  return artifacts.open_artifact(run_folder / "synthetic/sbp")


def test_rows_hold_what_passed_and_the_dropped_are_kept_with_the_reason(run_folder):
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


def test_a_cut_document_is_trained_on_without_an_end_token_or_not_at_all(run_folder):
  _write_samples(run_folder, [_text(100), _text(101), "ban " * 12], cut=(1, 2))
  artifact = _rows(run_folder)
  assert (artifact.summary["counts"]["kept"], artifact.summary["counts"]["cut"]) == (2, 1)
  end = tokenizer.load_tokenizer(run_folder / "tokenizer" / "tokenizer").eos_id
  (row,) = rows.open_rows(artifact, seq_len=64, prefix="rows.")
  last = {int(segment): row["tokens"][row["segment_ids"] == segment][-1] for segment in (1, 2)}
  assert (last[1] == end, last[2] == end) == (True, False)
  shutil.rmtree(artifact.folder)
  artifact = _rows(run_folder, cut_documents="drop")
  assert (artifact.summary["counts"]["kept"], artifact.summary["counts"]["cut"]) == (1, 1)
  dropped = {r["id"]: r["reason"] for r in artifact.read_jsonl("_dropped.jsonl")}
  assert dropped == {"s1": "cut", "s2": "looping"}


def test_a_character_that_the_cut_has_split_is_left_out(run_folder):
  opened = tokenizer.load_tokenizer(run_folder / "tokenizer" / "tokenizer")
  ids = opened.encode("ban \N{SNOWMAN}")
  options = dict(source="s", seed_document=None, prompt=[1], tokenizer=opened)
  for tokens, reason, text in ((ids, "stop", "ban \N{SNOWMAN}"), (ids[:-1], "length", "ban ")):
    record = sbp.synthetic_record(0, completion=Completion(tokens, reason), **options)
    assert record["text"] == text


@pytest.mark.parametrize("action", ["drop", "mark"])
def test_samples_with_benchmark_items_are_dropped_or_marked_and_counted(
  action, run_folder, tmp_path
):
  folder = tmp_path / "benchmarks"
  folder.mkdir()
  question = " ".join(_text(100).split()[2:9])
  (folder / "quiz.jsonl").write_text(f'{{"question": "{question}"}}\n')
  _write_samples(run_folder, [_text(100), "ban " * 12, _text(101)])
  config = CheckedSyntheticRowsStageConfig(
    filter=DocumentFilterConfig(min_tokens=4, max_repetition=0.3, max_jaccard=0.5),
    quality=QualityConfig(sample_size=100),
    seq_len=64,
    shingle_size=3,
    seed=0,
    decontamination=DecontaminationConfig(data_dir=str(folder), action=action),
  )
  inputs = {"tokens": "tokens", "tokenizer": "tokenizer", "samples": "samples"}
  run_stage(Stage("synthetic/sbp", checked_synthetic_rows, config, inputs), run_folder, _QUIET)
  artifact = artifacts.open_artifact(run_folder / "synthetic/sbp")
  kept = ["s2"] if action == "drop" else ["s0", "s2"]
  assert [r["id"] for r in artifact.read_jsonl("documents.jsonl")] == kept
  assert [r["id"] for r in artifact.read_jsonl("_contaminated.jsonl")] == ["s0"]
  dropped = {r["id"]: r["reason"] for r in artifact.read_jsonl("_dropped.jsonl")}
  assert dropped == {"s1": "looping"} | ({"s0": "benchmark"} if action == "drop" else {})
  counts, found = (artifact.summary[name] for name in ("counts", "decontamination"))
  assert (counts["benchmark"], counts["kept"]) == (1, len(kept))
  assert (found["documents"], found["contaminated"]) == (2, 1)
  assert found["tasks"]["quiz"]["items_hit"] == 1


def test_filters_that_drop_everything_are_an_error(run_folder):
  _write_samples(run_folder, ["ban " * 12, _text(0)])
  with pytest.raises(ValueError, match=r"dropped all 2 documents .*'looping': 1"):
    _rows(run_folder)


def _relevance(tmp_path, *, group_of, method="tfidf_svd"):
  """Measures documents of four topics of their own words; syntheses keep to the topic."""

  def topic(number, seed):
    return " ".join(random.Random(seed).choices(_WORDS[8 * number : 8 * number + 8], k=20))

  writer = artifacts.Writer(tmp_path / "tokens", config={}, inputs={})
  for role, start in (("unique", 0), ("test", 100)):
    records = [
      {
        "id": f"{role}{i}",
        "document": f"{role}{i}",
        "group": group_of(i),
        "text": topic(i % 4, start + i),
      }
      for i in range(40)
    ]
    writer.write_jsonl(f"{role}.jsonl", records)
  writer.finish()
  writer = artifacts.Writer(tmp_path / "pairs", config={}, inputs={})
  # Pairs of the search, which are of different topics.
  writer.write_jsonl("test.jsonl", [{"d1": f"test{i}", "d2": f"test{i + 1}"} for i in range(20)])
  writer.finish()
  artifacts.Writer(tmp_path / "embeddings", config={}, inputs={}).finish({"method": method})
  writer = artifacts.Writer(tmp_path / "synthetic", config={}, inputs={})
  writer.write_jsonl(
    "documents.jsonl",
    [
      {"seed_id": f"unique{i}", "seed_text": topic(i % 4, i), "text": topic(i % 4, 200 + i)}
      for i in range(40)
    ],
  )
  writer.finish()
  config = RelevanceStageConfig(dim=4, sample_size=30, seed=0)
  inputs = {name: name for name in ("tokens", "embeddings", "pairs", "synthetic")}
  run_stage(Stage("relevance", relevance, config, inputs), tmp_path, _QUIET)
  return artifacts.open_artifact(tmp_path / "relevance").summary


def test_relevance_is_measured_against_documents_that_are_related_by_their_group(tmp_path):
  summary = _relevance(tmp_path, group_of=lambda i: f"topic{i % 4}")
  assert summary["real_pairs"] == "two documents of one group"
  assert summary["own"]["value"] > summary["random"]["value"] + 0.3
  assert summary["retained_share"]["value"] == pytest.approx(1.0, abs=0.2)
  assert summary["real"]["num_groups"] == 4


def test_relevance_without_groups_is_not_measured_against_pairs_of_its_own_choice(tmp_path):
  summary = _relevance(tmp_path, group_of=str)
  assert (summary["real"], summary["real_pairs"], summary["retained_share"]) == (None, None, None)
  assert summary["own"]["value"] > summary["random"]["value"]


def test_relevance_without_groups_is_measured_against_pairs_of_another_embedding(tmp_path):
  summary = _relevance(tmp_path, group_of=str, method="seed_model")
  assert summary["real_pairs"] == "neighbors in the run's own embedding"
  assert abs(summary["real"]["value"]) < 0.2


def test_pairs_are_packed_with_each_held_out_d2_in_the_same_place_of_both_gap_files(tmp_path):
  def topic(number, seed):
    return " ".join(random.Random(seed).choices(_WORDS[8 * number : 8 * number + 8], k=12))

  writer = artifacts.Writer(tmp_path / "tokenizer", config={}, inputs={})
  trained = tokenizer.train_bpe([topic(i % 4, i) for i in range(50)], vocab_size=300)
  with writer.shard("tokenizer") as (folder, _):
    trained.save(folder)
  writer.finish({"vocab_size": trained.vocab_size})
  writer = artifacts.Writer(tmp_path / "tokens", config={}, inputs={})
  for start, part in ((0, "unique"), (100, "validation"), (200, "test")):
    texts = [topic(i % 4, start + i) for i in range(24)]
    lengths = [len(trained.encode(text)) for text in texts]
    records = [
      {
        "id": f"{part}{i}",
        "document": f"{part}{i}",
        "group": f"group{i // 8}",
        "text": text,
        "num_tokens": length,
      }
      for i, (text, length) in enumerate(zip(texts, lengths))
    ]
    writer.write_jsonl(f"{part}.jsonl", records)
  writer.finish()
  inputs = {"tokens": "tokens", "tokenizer": "tokenizer"}
  embeddings = Stage("embeddings", tfidf_embeddings, TfidfEmbeddingsConfig(dim=4, seed=0), inputs)
  run_stage(embeddings, tmp_path, _QUIET)
  config = PairsStageConfig(
    search=SearchConfig(num_neighbors=12),
    filters=PairFilterConfig(
      min_similarity=0.5, max_jaccard=0.5, max_uses_per_target=4, max_pairs_per_seed=2
    ),
    recall_sample=10,
    max_gap_pairs=8,
    pair_tokens=128,
    shingle_size=3,
    seed=0,
  )
  stage = Stage("pairs", pairs, config, {**inputs, "embeddings": "embeddings"})
  run_stage(stage, tmp_path, _QUIET)
  artifact = artifacts.open_artifact(tmp_path / "pairs")
  assert artifact.summary["recall"]["unique"]["value"] == 1.0
  nearest = list(artifact.read_jsonl("unique.jsonl"))
  topics = [[int(pair[d][6:]) % 4 for d in ("d1", "d2")] for pair in nearest]
  assert len(nearest) > 20
  assert all(d1 == d2 for d1, d2 in topics)
  groups = [[int(pair[d][6:]) // 8 for d in ("d1", "d2")] for pair in nearest]
  assert all(d1 != d2 for d1, d2 in groups)
  assert artifact.summary["same_group_share"]["unique"] == 0.0
  assert artifact.summary["method"]["unique"] == "exact"
  control = list(artifact.read_jsonl("random-unique.jsonl"))
  assert sorted(pair["d2"] for pair in control) == sorted(pair["d2"] for pair in nearest)

  def targets(prefix):
    found = []
    for row in rows.open_rows(artifact, seq_len=128, prefix=prefix):
      for segment in range(1, int(row["segment_ids"].max()) + 1):
        is_target = row["loss_mask"] & (row["segment_ids"] == segment)
        found.append(row["tokens"][is_target].tolist())
    return found

  true, random_ = targets("gap-true."), targets("gap-random.")
  assert true == random_
  assert 4 <= len(true) <= 8
  assert artifact.summary["gap-true"]["records"] == len(
    rows.open_rows(artifact, seq_len=128, prefix="gap-true.")
  )
  assert np.isfinite(artifact.summary["counts"]["test"]["pairs"])


def test_the_seed_model_embeds_each_document_by_itself(run_folder, monkeypatch, one_device_mesh):
  model = Llama(dataclasses.replace(_MODEL, dtype="float32"))
  params = init_params(model, jax.random.key(0))
  monkeypatch.setattr(_MODULE.models, "load_model", lambda artifact, mesh: (model, params))
  monkeypatch.setattr(MeshConfig, "make", lambda self, devices=None: one_device_mesh)
  writer = artifacts.Writer(run_folder / "tokens-of-all", config={}, inputs={})
  for part, num in (("unique", 5), ("validation", 2), ("test", 1)):
    texts = [_text(i) for i in range(num)]  # the held-out ones repeat unique ones
    records = [{"id": f"{part}{i}", "text": t, "num_tokens": 9} for i, t in enumerate(texts)]
    writer.write_jsonl(f"{part}.jsonl", records)
  writer.finish()
  config = ModelEmbeddingsConfig(mesh=MeshConfig(), batch_size=2, seq_len=64)
  inputs = {"tokens": "tokens-of-all", "tokenizer": "tokenizer", "seed": "model"}
  run_stage(Stage("embeddings", model_embeddings, config, inputs), run_folder, _QUIET)
  artifact = artifacts.open_artifact(run_folder / "embeddings")
  flops = 8 * 10 * model.c.forward_flops_per_token(10)  # 9 tokens and BOS
  assert artifact.summary == {"method": "seed_model", "tokens": 8 * 9, "flops": flops}
  unique_CE, validation_CE, test_CE = (
    np.asarray(embedding.open_embeddings(artifact.path(f"{part}.zarr"))[:].read().result())
    for part in ("unique", "validation", "test")
  )
  assert unique_CE.shape == (5, 8)
  np.testing.assert_allclose(np.linalg.norm(unique_CE, axis=1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(validation_CE, unique_CE[:2], atol=1e-6)
  np.testing.assert_allclose(test_CE, unique_CE[:1], atol=1e-6)
  assert (unique_CE @ unique_CE.T)[0, 1] < 0.999
