"""Continued pretraining of a checkpoint that transformers made, to one that transformers reads."""

import copy
import functools
import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from configs import cpt_quick
from selfimprove_jax import artifacts, partitioning
from selfimprove_jax.data import tokenizer as tokenizer_lib
from selfimprove_jax.pipelines import continued_pretraining_report, runner
from selfimprove_jax.progress import Progress
from selfimprove_jax.training import preemption

_QUIET = Progress(quiet=True)
_SPECIAL = {
  "bos_token": "<|begin_of_text|>",
  "eos_token": "<|end_of_text|>",
  "sep_token": "<|reserved_special_token_0|>",
  "pad_token": "<|end_of_text|>",
}
_MODEL = dict(
  vocab_size=320,
  num_layers=2,
  embed_dim=32,
  mlp_dim=64,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  qk_norm=False,
  tie_embeddings=False,
  rope_theta=10_000.0,
  norm_eps=1e-5,
  dtype="float32",
)


def _write_corpus(path, *, words, num_documents, seed):
  """Documents of 10 to 22 words, drawn from a few."""
  rng = np.random.default_rng(seed)
  with path.open("w") as file:
    for _ in range(num_documents):
      text = " ".join(rng.choice(words, rng.integers(10, 22)))
      file.write(json.dumps({"text": text}) + "\n")


@pytest.fixture(scope="module", autouse=True)
def on_one_device(one_device_mesh):
  """What runs on a mesh is tested where it is made; on one device it compiles faster."""
  with pytest.MonkeyPatch.context() as patch:
    make = functools.wraps(partitioning.make_mesh)(lambda **_: one_device_mesh)
    patch.setattr(partitioning, "make_mesh", make)
    yield


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("corpora")
  seas = ["the", "a", "sea", "wave", "salt", "tide", "of", "foam", "deep", "blue", "ship", "sail"]
  hills = ["the", "a", "hill", "rock", "pine", "path", "of", "moss", "high", "grey", "goat", "bell"]
  _write_corpus(folder / "new_text.jsonl", words=seas, num_documents=160, seed=0)
  _write_corpus(folder / "replay.jsonl", words=hills, num_documents=120, seed=1)
  return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  """A Llama of random weights with a tokenizer whose special tokens are named as Llama 3's."""
  folder = tmp_path_factory.mktemp("checkpoint")
  special = list(dict.fromkeys(_SPECIAL.values()))
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=special,
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(["the sea of the hill, a wave of a path"] * 9, trainer)
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token=_SPECIAL["bos_token"], eos_token=_SPECIAL["eos_token"]
  ).save_pretrained(folder)
  torch.manual_seed(0)
  transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=320,
      hidden_size=32,
      intermediate_size=64,
      num_hidden_layers=2,
      num_attention_heads=4,
      num_key_value_heads=2,
      head_dim=8,
      rms_norm_eps=1e-5,
      rope_theta=10_000.0,
      max_position_embeddings=512,
      tie_word_embeddings=False,
    )
  ).save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def config(corpora, checkpoint) -> dict:
  """That of the smoke run, on these corpora and this checkpoint."""
  c = cpt_quick.get_config("smoke").to_dict()
  for name in ("new_text", "replay"):
    c[name]["source"] = "jsonl"
    c[name]["options"] = {"paths": str(corpora / f"{name}.jsonl"), "id_field": None}
    c[name]["split"] |= {"max_passage_chars": 10_000, "min_passage_chars": 1}
  c["initial"] = {"kind": "checkpoint", "path": str(checkpoint), "special_tokens": _SPECIAL}
  c["model"] = _MODEL
  c["tokens"] |= {"new_text_tokens": 20_000, "replay_tokens": 8_000}
  c["training"] |= {"batch_rows": 8, "peak_lr": 1e-2, "num_evaluations": 2, "num_checkpoints": 2}
  c["runtime"] = {"parallel_stages": 1}
  return c


def _run(config, folder, only=None):
  runner.run(config, folder, only=only, verify=False, progress=_QUIET)


def _changed(config, path, value):
  changed = copy.deepcopy(config)
  *sections, key = path.split(".")
  section = changed
  for name in sections:
    section = section[name]
  section[key] = value
  return changed


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("run")
  _run(config, folder)
  return folder


@pytest.fixture(scope="module")
def report(config, finished) -> dict:
  return continued_pretraining_report.make_report(config, finished, command="a command")


def test_the_new_text_is_learnt_and_the_loss_on_replay_is_known_before_and_after(report):
  learnt = report["heldout"]["new_text"]
  assert learnt["difference"]["value"] < -0.5
  assert learnt["difference"]["value"] < -4 * learnt["difference"]["stderr"] < 0
  assert learnt["before"]["value"] == pytest.approx(np.log(320), abs=0.2)
  for found in report["heldout"].values():
    difference = found["after"]["value"] - found["before"]["value"]
    assert found["difference"]["value"] == pytest.approx(difference)
    assert found["documents"] > 5


def test_a_tenth_of_the_rows_is_replay_which_counts_towards_the_epochs(config, report):
  passes, rows = report["tuned"]["passes"], report["rows"]
  used = {name: passes[name] * rows[name]["unique"]["records"] for name in passes}
  steps = report["tuned"]["steps_made"]
  assert used["new_text"] + used["replay"] == pytest.approx(8 * steps)
  assert used["replay"] / (8 * steps) == pytest.approx(0.1, abs=0.01)
  assert 8 * steps == pytest.approx(2 * rows["new_text"]["unique"]["records"], abs=8)


def _transformers_loss(model_folder, texts):
  """Nats per token of BOS text EOS, each document by itself, as transformers has it."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
  total = count = 0.0
  for text in texts:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])
    with torch.no_grad():
      total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    count += ids.shape[1] - 1
  return total / count


@pytest.mark.parametrize("name", ["new_text", "replay"])
def test_transformers_gives_checkpoint_and_export_the_losses_that_are_reported(
  name, report, finished, checkpoint
):
  documents = artifacts.open_artifact(finished / name / "documents")
  texts = [r["text"] for r in documents.read_jsonl("test-00000-of-00001.jsonl")]
  reported = report["heldout"][name]
  assert len(texts) == reported["documents"]
  for when, folder in (("before", checkpoint), ("after", finished / "export" / "model")):
    assert _transformers_loss(folder, texts) == pytest.approx(reported[when]["value"], abs=2e-4)


def test_the_export_has_the_checkpoints_tokenizer_and_context_length(finished, checkpoint):
  exported = finished / "export" / "model"
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (exported / name).read_bytes() == (checkpoint / name).read_bytes()
  said = json.loads((exported / "config.json").read_text())
  assert said["architectures"] == ["LlamaForCausalLM"]
  assert said["max_position_embeddings"] == 512
  assert (said["bos_token_id"], said["eos_token_id"]) == (0, 1)


def test_the_report_is_printed_as_a_table_and_kept(config, finished, capsys):
  continued_pretraining_report.make_and_print(config, finished, command="a command")
  lines = capsys.readouterr().out.splitlines()
  assert lines[2].startswith("new text") and lines[3].startswith("replay")
  assert lines[-1] == str(finished / "report" / "report.json")
  kept = json.loads((finished / "report" / "report.json").read_text())
  assert kept["command"] == "a command"
  assert kept["heldout"]["replay"]["after"]["stderr"] > 0


def test_a_tuning_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
  config, finished, tmp_path, monkeypatch, data_files
):
  folder = tmp_path / "run"
  skip = shutil.ignore_patterns("tuned", "export", "report")
  shutil.copytree(finished, folder, ignore=skip)
  asked = iter(range(100))
  with monkeypatch.context() as patch:
    patch.setattr(preemption, "requested", lambda _: next(asked) == 4)
    with pytest.raises(preemption.Preempted):
      _run(config, folder, only=["tuned"])
  assert not (folder / "tuned" / "manifest.json").exists()
  _run(config, folder, only=["tuned"])
  expected = data_files(finished / "tuned")
  assert "after-new_text.jsonl" in expected
  assert data_files(folder / "tuned") == expected


def test_without_a_checkpoint_a_model_is_pretrained_first_on_the_replay_text(config, tmp_path):
  initial = cpt_quick.get_config("smoke").to_dict()["initial"]
  initial["tokenizer"]["vocab_size"] = 300
  initial["training"] |= {"batch_rows": 8, "num_evaluations": 1, "num_checkpoints": 1}
  initial["total_tokens"] = 8_000
  config = _changed(config, "initial", initial)
  config["tokens"] |= {"new_text_tokens": 3_000}
  _run(config, tmp_path)
  report = continued_pretraining_report.make_report(config, tmp_path, command="")
  before = {name: found["before"]["value"] for name, found in report["heldout"].items()}
  assert before["replay"] < before["new_text"]
  pretrained = artifacts.open_artifact(tmp_path / "initial").summary
  assert pretrained["steps_made"] == 8_000 // (8 * 128)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export" / "model")
  assert tokenizer.bos_token == tokenizer_lib.BOS


def test_a_checkpoint_of_another_shape_is_refused_with_every_difference(config, tmp_path):
  other = _changed(config, "model", _MODEL | {"num_layers": 3, "rope_theta": 500_000.0})
  with pytest.raises(ValueError, match=r"num_layers: 2 -> 3\n +rope_theta: 10000\.0 -> 500000\.0"):
    _run(other, tmp_path, only=["initial"])


def test_a_folder_that_is_not_there_is_refused_by_the_name_of_the_key(config, tmp_path):
  with pytest.raises(ValueError, match=r"initial\.path='/nowhere' is no folder"):
    _run(_changed(config, "initial.path", "/nowhere"), tmp_path, only=["initial"])


def test_a_checkpoint_without_a_tokenizer_is_refused(config, checkpoint, tmp_path):
  bare = tmp_path / "bare"
  shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
  run = tmp_path / "run"
  with pytest.raises(ValueError, match="bare has no tokenizer"):
    _run(_changed(config, "initial.path", str(bare)), run, only=["initial", "tokenizer"])


def test_a_vocabulary_larger_than_the_model_is_refused(config, checkpoint, tmp_path):
  large = tmp_path / "large"
  shutil.copytree(checkpoint, large)
  tokenizer = transformers.AutoTokenizer.from_pretrained(large)
  tokenizer.add_tokens([f"<{i}>" for i in range(50)])
  tokenizer.save_pretrained(large)
  run = tmp_path / "run"
  with pytest.raises(ValueError, match=r"has \d+ ids .* its model 320"):
    _run(_changed(config, "initial.path", str(large)), run, only=["initial", "tokenizer"])


def test_a_checkpoint_that_changed_since_it_was_recorded_is_refused(
  config, finished, checkpoint, tmp_path
):
  moved = tmp_path / "checkpoint"
  shutil.copytree(checkpoint, moved)
  config = _changed(config, "initial.path", str(moved))
  run = tmp_path / "run"
  _run(config, run, only=["initial"])
  weights = moved / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\0")
  for name in ("new_text", "replay"):
    shutil.copytree(finished / name, run / name)
  with pytest.raises(artifacts.ArtifactError, match=r"are not those that .* recorded"):
    _run(config, run, only=["tokenizer", "tuned"])


@pytest.mark.parametrize(
  ("path", "value", "told"),
  [
    ("initial.kind", "gguf", "initial.kind='gguf' is unknown"),
    ("initial.special_tokens", {"bos": "<s>"}, "initial.special_tokens"),
    ("tuning", {"epochs": 2.0}, "'tuning' lacks"),
    ("tuning.replay_share", 1.0, r"replay_share=1\.0 must be in \[0, 1\)"),
    ("tuning.epochs", 0.0, "epochs=0"),
    ("training.seq_len", 64, r"training\.seq_len=64 is not tokens\.seq_len=128"),
    ("new_text.split.test_fraction", 0.0, r"new_text\.split\.test_fraction=0\.0 must be above 0"),
    ("replay.options", {"path": "x"}, r"'replay\.options' does not fit"),
    ("model", _MODEL | {"dropout_rate": 0.1}, r"model\.dropout_rate=0\.1"),
  ],
)
def test_a_config_that_makes_no_sense_is_refused_before_anything_runs(config, path, value, told):
  with pytest.raises(ValueError, match=told):
    runner.check(_changed(config, path, value))
