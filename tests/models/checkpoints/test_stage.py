"""Trained stages of a run, opened as checkpoints."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.language_models import ScoreRequest, TextRequest, local
from selfimprove_jax.models.checkpoints import open_checkpoint
from selfimprove_jax.models.checksums import DamagedCheckpointError, checksums
from selfimprove_jax.models.llama import Llama, LlamaConfig, abstract_params, init_params
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.runtime.config import to_json
from selfimprove_jax.training.checkpoint import Checkpoints
from selfimprove_jax.training.train_step import TrainState
from tests.runs import toy

CONFIG = LlamaConfig(
  vocab_size=264,
  num_layers=1,
  embed_dim=16,
  mlp_dim=16,
  num_heads=2,
  num_kv_heads=2,
  head_dim=8,
  dropout_rate=0.1,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run folder whose stage arms/a saved the steps 1 and 2, of which 2 was chosen."""
  folder = tmp_path_factory.mktemp("run")
  writer = artifacts.Writer(folder / "tokenizer", config={}, inputs={})
  with writer.shard("tokenizer") as (path, counts):
    tokenizers.train_bpe(["some words"], vocab_size=262).save(path)
    counts["records"] = 262
  writer.finish({})
  writer = artifacts.Writer(folder / "arms" / "a", config={"seq_len": 48}, inputs={})
  params = {}
  with Checkpoints(folder / "arms" / "a" / "checkpoints", keep=2) as saved:
    for step in (1, 2):
      params[step] = nn.unbox(init_params(Llama(CONFIG), jax.random.key(step)))
      saved.save(TrainState(step=jnp.int32(step), params=params[step], opt_state={}))
  writer.finish({"model": to_json(CONFIG), "step": 2, "checksums": checksums(params[2])})
  return folder, params


@pytest.mark.parametrize("step", [None, 1])
def test_a_step_of_a_stage_is_loaded_onto_a_mesh(step, run):
  folder, params = run
  checkpoint = open_checkpoint(folder / "arms" / "a", step=step)
  assert (checkpoint.kind, checkpoint.max_positions, checkpoint.step) == ("stage", 48, step or 2)
  assert checkpoint.config == dataclasses.replace(CONFIG, dropout_rate=0.0)
  config = checkpoint.compute_config({"param_dtype": "bfloat16"})
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
  loaded = checkpoint.load_params(mesh, config)

  def compare(x, leaf, saved):
    assert (x.dtype, x.sharding) == (leaf.dtype, leaf.sharding)
    np.testing.assert_array_equal(x, saved.astype("bfloat16"))

  jax.tree.map(compare, loaded, abstract_params(Llama(config), mesh), params[step or 2])


def test_a_relative_path_is_loaded_too(run, one_device_mesh, monkeypatch):
  folder, params = run
  monkeypatch.chdir(folder)
  checkpoint = open_checkpoint("arms/a")
  loaded = checkpoint.load_params(one_device_mesh, checkpoint.config)
  assert checksums(loaded) == checksums(params[2])


def test_the_tokenizer_is_the_run_s_and_texts_begin_with_bos(run, tmp_path):
  checkpoint = open_checkpoint(run[0] / "arms" / "a")
  files = checkpoint.tokenizer_files()
  assert (files.prefix_ids, files.eos_ids) == ((1,), (3,))
  assert checkpoint.generation == {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
  checkpoint.copy_tokenizer(tmp_path)
  assert tokenizers.load_tokenizer(tmp_path).vocab_size == 262


def test_logs_of_a_stage_do_not_count_for_its_digest(run):
  folder = run[0] / "arms" / "a"
  before = open_checkpoint(folder).digest
  (folder / "speed.jsonl").write_text("{}\n")
  assert open_checkpoint(folder).digest == before != open_checkpoint(folder, step=1).digest


def test_what_is_no_trained_stage_is_refused(run, tmp_path):
  with pytest.raises(ValueError, match="has no checkpoint of step 7; it has \\[1, 2\\]"):
    open_checkpoint(run[0] / "arms" / "a", step=7)
  with pytest.raises(ValueError, match="trained no model"):
    open_checkpoint(run[0] / "tokenizer")
  artifacts.Writer(tmp_path / "begun", config={}, inputs={})
  (tmp_path / "begun" / "checkpoints").mkdir()
  with pytest.raises(artifacts.ArtifactError, match="unfinished"):
    open_checkpoint(tmp_path / "begun")


def test_parameters_that_are_not_those_of_the_manifest_are_refused(run, one_device_mesh):
  manifest = run[0] / "arms" / "a" / "manifest.json"
  whole = manifest.read_text()
  summary = json.loads(whole)["summary"]
  summary["checksums"]["['embedding_VD']"] ^= 1
  toy.write_summary(manifest.parent, summary)
  try:
    with pytest.raises(DamagedCheckpointError, match="checksums are not those that were saved"):
      open_checkpoint(manifest.parent).load_params(one_device_mesh, CONFIG)
  finally:
    manifest.write_text(whole)


def test_a_trained_stage_generates_chooses_scores_and_chats_as_it_is(run):
  folder, _ = run
  model = local.load(folder / "arms" / "a", chat_template="plain")
  messages = [{"role": "user", "content": "some"}]
  requests = [
    TextRequest(prompt="some", max_tokens=4),
    TextRequest(prompt=messages, max_tokens=4),
    TextRequest(prompt="some", max_tokens=4, choices=["words", "word"]),
  ]
  replies = list(model.generate(requests))
  assert [reply.error for reply in replies] == [None] * 3
  assert replies[2].text in ("words", "word")
  [score] = model.score([ScoreRequest(context="some", continuation=" words")])
  assert score.logprob < 0
  assert (model.name, model.max_length) == ("a", 48)
