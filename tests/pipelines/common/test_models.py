"""A tiny model is pretrained as a stage, and loaded again."""

import dataclasses
import json
import random
import shutil

import jax
import pytest

from selfimprove_jax.data import corpora
from selfimprove_jax.data.split import SplitConfig
from selfimprove_jax.models.checksums import checksums
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.common import models, text
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs.stage import Stage, run_stage
from selfimprove_jax.runtime.partitioning import LocalMeshConfig, MeshConfig
from selfimprove_jax.runtime.progress import Progress
from selfimprove_jax.training.config import TrainingConfig
from tests.runs import toy

SEQ_LEN, VOCAB_SIZE, NUM_STEPS = 32, 300, 3
MODEL = LlamaConfig(
  vocab_size=VOCAB_SIZE,
  num_layers=1,
  embed_dim=8,
  mlp_dim=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  dtype="float32",
  dropout_rate=0.1,
)
CONFIG = models.PretrainConfig(
  model=MODEL,
  mesh=MeshConfig(data=8),
  training=TrainingConfig(batch_rows=8, peak_lr=1e-2, final_lr=1e-3, num_evaluations=1),
  seq_len=SEQ_LEN,
  total_targets=NUM_STEPS * 8 * (SEQ_LEN - 2),  # about two tokens of a row are none
  mixture={"unique": 1.0},
  weight_decay=0.1,
  evaluation=models.EvaluationConfig(batch_rows=8, max_validation_rows=8),
  seed=0,
)
READS = {"tokens": "tokens", "tokenizer": "tokenizer"}


def _run(stage, folder):
  run_stage(stage, folder, Progress(quiet=True))
  return artifacts.open_artifact(folder / stage.name)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
  """A run with tokens and a pretrained seed model."""
  folder = tmp_path_factory.mktemp("run")
  words = [f"{a}{b}" for a in "bdfgklmn" for b in ("an", "ero", "ist", "ule")]
  lines = (
    json.dumps({"id": f"d{i}", "text": " ".join(random.Random(i).choices(words, k=30))}) + "\n"
    for i in range(120)
  )
  (folder / "corpus.jsonl").write_text("".join(lines))
  corpus = text.CorpusConfig(
    source=corpora.JsonlConfig(paths=(str(folder / "corpus.jsonl"),)),
    split=SplitConfig(
      num_shards=1,
      validation_fraction=0.1,
      test_fraction=0.1,
      max_passage_chars=200,
      min_passage_chars=20,
      order="group",
    ),
  )
  tokens = text.RowsConfig(
    seq_len=SEQ_LEN, unique_tokens=500, batch_documents=50, may_fall_short=True
  )
  documents = {"documents": "documents"}
  for stage in (
    Stage("documents", text.documents, text.DocumentsConfig(corpus=corpus, seed=0)),
    Stage(
      "tokenizer",
      text.tokenizer,
      text.TokenizerStageConfig(vocab_size=VOCAB_SIZE, train_chars=5_000, unique_tokens=500),
      documents,
    ),
    Stage("tokens", text.rows, tokens, documents | {"tokenizer": "tokenizer"}),
    Stage("seed", models.pretrain, CONFIG, READS, uses_devices=True),
  ):
    _run(stage, folder)
  return folder


@pytest.fixture
def seed(run_folder):
  return artifacts.open_artifact(run_folder / "seed")


def test_pretraining_records_its_cost_its_curve_and_the_test_losses(seed):
  summary = seed.summary
  assert (summary["step"], summary["steps_made"]) == (NUM_STEPS, NUM_STEPS)
  assert summary["tokens"] == NUM_STEPS * 8 * SEQ_LEN
  assert summary["flops"] == summary["tokens"] * MODEL.train_flops_per_token(SEQ_LEN)
  curve = [json.loads(line) for line in seed.path("curve.jsonl").read_text().splitlines()]
  assert [r["step"] for r in curve if "train/loss" in r] == [1, 2, 3]
  assert summary["final_validation"] == curve[-1]["validation/loss"]
  losses = [json.loads(line) for line in seed.path("test.jsonl").read_text().splitlines()]
  assert all(r["nll"] > 0 and r["tokens"] > 0 and r["bytes"] > 0 for r in losses)
  trained = sum(r["train/tokens"] for r in curve if "train/tokens" in r)
  assert summary["targets"] == trained < summary["tokens"]
  assert trained == pytest.approx(CONFIG.total_targets, rel=0.1)


def test_losses_are_of_documents_with_the_bytes_of_their_texts(seed, run_folder):
  """However documents are cut to rows."""
  losses = {r["id"]: r for r in seed.read_jsonl("test.jsonl")}
  documents = artifacts.open_artifact(run_folder / "documents")
  texts = {r["id"]: r for r in text.split_records(documents, "test")}
  assert losses.keys() == texts.keys()
  for id_, record in losses.items():
    assert record["group"] == texts[id_]["group"]
    assert record["bytes"] == pytest.approx(len(texts[id_]["text"].encode()), rel=0.1)


def test_a_trained_model_is_loaded_on_another_mesh_without_its_dropout(seed):
  mesh = LocalMeshConfig(data=1, fsdp=4, tensor=1).make(jax.devices()[:4])
  model, params = models.load_model(seed, mesh)
  assert model.c == dataclasses.replace(MODEL, dropout_rate=0.0)
  assert checksums(params) == seed.summary["checksums"]


def test_parameters_that_differ_from_the_manifest_are_refused(seed, run_folder, tmp_path):
  copy = shutil.copytree(run_folder / "seed", tmp_path / "seed")
  summary = seed.summary
  sums = dict(summary["checksums"])
  sums[next(iter(sums))] ^= 1
  toy.write_summary(copy, {**summary, "checksums": sums})
  with pytest.raises(artifacts.ArtifactError, match=r"not those that were saved\. Delete the"):
    models.load_model(artifacts.open_artifact(copy), MeshConfig().make())


@pytest.mark.slow
def test_an_all_in_arm_also_spends_the_flops_of_the_named_inputs(run_folder):
  values = vars(CONFIG) | {"total_targets": 8 * (SEQ_LEN - 2)}
  config = models.PretrainAllInConfig(**values, matched_inputs=("cost_0",))
  stage = Stage(
    "arms/all_in", models.pretrain_all_in, config, READS | {"cost_0": "seed"}, uses_devices=True
  )
  assert _run(stage, run_folder).summary["steps_made"] == 1 + NUM_STEPS


def test_a_model_with_fewer_embeddings_than_tokens_is_refused(run_folder):
  config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vocab_size=64))
  with pytest.raises(ValueError, match=r"model\.vocab_size=64 must be at least the tokenizer's"):
    _run(Stage("small", models.pretrain, config, READS, uses_devices=True), run_folder)
