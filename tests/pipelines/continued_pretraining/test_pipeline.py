"""Continued pretraining of a checkpoint that transformers made, to one that transformers reads."""

import json
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from configs import cpt_quick
from selfimprove_jax.data import tokenizer as tokenizer_lib
from selfimprove_jax.evaluation import statistics
from selfimprove_jax.models.checkpoints import open_checkpoint, params_checkpoint
from selfimprove_jax.pipelines.continued_pretraining.config import Config
from selfimprove_jax.pipelines.continued_pretraining.pipeline import stages
from selfimprove_jax.pipelines.continued_pretraining.report import report
from selfimprove_jax.report import page, to_terminal
from selfimprove_jax.runs import artifacts, runner
from selfimprove_jax.runs.stage import Run
from selfimprove_jax.runtime import preemption
from selfimprove_jax.runtime.config import parse, to_json
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.runtime.progress import Progress

_QUIET = Progress(quiet=True)
_WHEN = ("before", "after")
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
  """A mesh of one device, which compiles faster; meshes are tested with training and sampling."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(MeshConfig, "make", lambda self, devices=None: one_device_mesh)
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
def values(corpora, checkpoint) -> dict[str, Any]:
  """The page of the smoke run, on these corpora and this checkpoint."""
  c = json.loads(json.dumps(cpt_quick.get_config("smoke").to_dict()))
  for name in ("new_text", "replay"):
    paths = [str(corpora / f"{name}.jsonl")]
    c[name]["source"] = {"kind": "jsonl", "paths": paths, "id_field": None}
    c[name]["split"] |= {"max_passage_chars": 10_000, "min_passage_chars": 1}
  c["initial"] = {"kind": "checkpoint", "path": str(checkpoint), "special_tokens": _SPECIAL}
  c["model"] = _MODEL
  c["tokens"] |= {"new_text_tokens": 20_000, "replay_tokens": 8_000}
  c["training"] |= {"batch_rows": 8, "peak_lr": 1e-2, "num_evaluations": 2, "num_checkpoints": 2}
  return c


@pytest.fixture(scope="module")
def config(values) -> Config:
  return parse(Config, values)


def _run(config: Config, folder: pathlib.Path, only=None) -> None:
  runner.run(stages(config), folder, only=only, progress=_QUIET, config=to_json(config))


def _changed(values, path, value) -> dict[str, Any]:
  changed = json.loads(json.dumps(values))
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


def _losses(run: pathlib.Path, when: str, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Nats and tokens of each held-out document."""
  records = list(artifacts.open_artifact(run / "tuned").read_jsonl(f"{when}-{name}.jsonl"))
  return np.array([r["nll"] for r in records]), np.array([r["tokens"] for r in records])


def _mean_loss(run: pathlib.Path, when: str, name: str) -> float:
  nll, counts = _losses(run, when, name)
  return nll.sum() / counts.sum()


@pytest.mark.slow
def test_the_new_text_is_learned_and_replay_is_scored_before_and_after(finished):
  (before, counts), (after, _) = (_losses(finished, when, "new_text") for when in _WHEN)
  learned = statistics.paired_difference(after, before, counts, groups=np.arange(len(counts)))
  assert learned.value < -0.5
  assert learned.value < -4 * learned.stderr < 0
  assert _mean_loss(finished, "before", "new_text") == pytest.approx(np.log(320), abs=0.2)
  for name in ("new_text", "replay"):
    sizes = [len(_losses(finished, when, name)[0]) for when in _WHEN]
    assert sizes[0] == sizes[1] > 5


@pytest.mark.slow
def test_a_tenth_of_the_rows_is_replay_which_counts_towards_the_epochs(finished):
  summary = artifacts.open_artifact(finished / "tuned").summary
  rows = {
    name: artifacts.open_artifact(finished / name / "rows").summary["unique"]["records"]
    for name in summary["passes"]
  }
  used = {name: passes * rows[name] for name, passes in summary["passes"].items()}
  steps = summary["steps_made"]
  assert used["new_text"] + used["replay"] == pytest.approx(8 * steps)
  assert used["replay"] / (8 * steps) == pytest.approx(0.1, abs=0.01)
  assert 8 * steps == pytest.approx(2 * rows["new_text"], abs=8)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["new_text", "replay"])
def test_transformers_gives_checkpoint_and_export_the_same_losses(name, finished, checkpoint):
  documents = artifacts.open_artifact(finished / name / "documents")
  texts = [r["text"] for r in documents.read_jsonl("test-00000-of-00001.jsonl")]
  assert len(texts) == len(_losses(finished, "before", name)[0])
  for when, folder in (("before", checkpoint), ("after", finished / "export" / "model")):
    expected = pytest.approx(_mean_loss(finished, when, name), abs=2e-4)
    assert _transformers_loss(folder, texts) == expected


@pytest.mark.slow
def test_the_export_has_the_checkpoints_tokenizer_and_context_length(finished, checkpoint):
  exported = finished / "export" / "model"
  for name in ("tokenizer.json", "tokenizer_config.json"):
    assert (exported / name).read_bytes() == (checkpoint / name).read_bytes()
  written = json.loads((exported / "config.json").read_text())
  assert written["architectures"] == ["LlamaForCausalLM"]
  assert written["max_position_embeddings"] == 512
  assert (written["bos_token_id"], written["eos_token_id"]) == (0, 1)


@pytest.mark.slow
def test_a_stopped_tuning_continues_and_ends_with_the_same_bytes(
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


@pytest.mark.slow
def test_without_a_checkpoint_a_model_is_pretrained_first_on_the_replay_text(values, tmp_path):
  initial = cpt_quick.get_config("smoke").to_dict()["initial"]
  initial["tokenizer"]["vocab_size"] = 300
  initial["training"] |= {"batch_rows": 8, "num_evaluations": 1, "num_checkpoints": 1}
  initial["total_tokens"] = 8_000
  values = _changed(_changed(values, "initial", initial), "tokens.new_text_tokens", 3_000)
  _run(parse(Config, values), tmp_path)
  before = {name: _mean_loss(tmp_path, "before", name) for name in ("new_text", "replay")}
  assert before["replay"] < before["new_text"]
  pretrained = artifacts.open_artifact(tmp_path / "initial").summary
  # The tokens that are predicted, without padding and the first one of each document.
  assert pretrained["targets"] == pytest.approx(8_000, abs=8 * 128 / 2)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export" / "model")
  assert tokenizer.bos_token == tokenizer_lib.BOS


@pytest.fixture(scope="module")
def orbax_checkpoint(checkpoint, one_device_mesh, tmp_path_factory) -> pathlib.Path:
  """The same weights as an orbax folder."""
  folder = tmp_path_factory.mktemp("orbax") / "checkpoint"
  opened = open_checkpoint(checkpoint)
  params = opened.load_params(one_device_mesh, opened.config)
  params_checkpoint.save_params(
    folder, params, opened.config, tokenizer=checkpoint, max_positions=opened.max_positions
  )
  return folder


@pytest.mark.slow
def test_an_orbax_folder_and_its_hugging_face_original_score_alike(
  values, finished, orbax_checkpoint, tmp_path
):
  values = _changed(values, "initial.path", str(orbax_checkpoint))
  for name in ("new_text", "replay"):
    shutil.copytree(finished / name / "documents", tmp_path / name / "documents")
  _run(parse(Config, values), tmp_path)
  for name in ("new_text", "replay"):
    for when in _WHEN:
      assert _mean_loss(tmp_path, when, name) == _mean_loss(finished, when, name)
  transformers.AutoTokenizer.from_pretrained(tmp_path / "export" / "model")


def test_an_orbax_folder_is_recorded_and_its_tokenizer_copied(values, orbax_checkpoint, tmp_path):
  config = parse(Config, _changed(values, "initial.path", str(orbax_checkpoint)))
  _run(config, tmp_path, only=["initial", "tokenizer"])
  recorded = artifacts.open_artifact(tmp_path / "initial").summary
  assert (recorded["kind"], recorded["max_positions"]) == ("orbax", 512)
  assert recorded["model"] == to_json(config.model)
  copied = artifacts.open_artifact(tmp_path / "tokenizer")
  assert copied.summary["bos_token_id"] == 0
  assert (copied.path("original") / "tokenizer.json").is_file()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> pathlib.Path:
  """A GGUF file of random weights in the shape of `_MODEL`, with a byte-level tokenizer."""
  gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
  path = tmp_path_factory.mktemp("gguf") / "model.gguf"
  rng = np.random.default_rng(0)
  V, D, F, N, K, H = 320, 32, 64, 4, 2, 8
  shapes = {"attn_q": (N * H, D), "attn_k": (K * H, D), "attn_v": (K * H, D)}
  shapes |= {"attn_output": (D, N * H), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
  shapes |= {"attn_norm": (D,), "ffn_norm": (D,)}
  shapes = {f"blk.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
  shapes |= {"token_embd": (V, D), "output": (V, D), "output_norm": (D,)}
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_block_count(2)
  writer.add_context_length(256)
  writer.add_embedding_length(D)
  writer.add_feed_forward_length(F)
  writer.add_head_count(N)
  writer.add_head_count_kv(K)
  writer.add_key_length(H)
  writer.add_rope_freq_base(10_000.0)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_vocab_size(V)
  trained = tokenizer_lib.train_bpe(["the sea of the hill, a wave of a path"] * 9, vocab_size=300)
  state = json.loads(trained.backend.to_str())
  vocab = trained.backend.get_vocab()
  special = {token["id"] for token in state["added_tokens"]}
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("gpt-2")
  writer.add_token_list(sorted(vocab, key=vocab.get))
  writer.add_token_types([3 if i in special else 1 for i in range(len(vocab))])
  writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
  writer.add_bos_token_id(trained.bos_id)
  writer.add_eos_token_id(trained.eos_id)
  for name, shape in shapes.items():
    values = 0.02 * rng.normal(size=shape) + (len(shape) == 1)
    writer.add_tensor(f"{name}.weight", values.astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_a_gguf_file_is_trained_on_new_text_and_exported(values, gguf_file, tmp_path):
  special_tokens = {"sep_token": tokenizer_lib.SEP, "pad_token": tokenizer_lib.PAD}
  initial = {"kind": "checkpoint", "path": str(gguf_file), "special_tokens": special_tokens}
  values = _changed(values, "initial", initial)
  values["tokens"] |= {"new_text_tokens": 4_000, "replay_tokens": 2_000}
  values["training"] |= {"num_evaluations": 1, "num_checkpoints": 1}
  _run(parse(Config, values), tmp_path)
  recorded = artifacts.open_artifact(tmp_path / "initial").summary
  assert (recorded["kind"], recorded["max_positions"]) == ("gguf", 256)
  before, after = (_mean_loss(tmp_path, when, "new_text") for when in _WHEN)
  assert before == pytest.approx(np.log(320), abs=0.2)
  assert after < before - 0.1
  exported = tmp_path / "export" / "model"
  tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
  assert tokenizer.bos_token == tokenizer_lib.BOS
  assert json.loads((exported / "config.json").read_text())["max_position_embeddings"] == 256


def test_a_checkpoint_of_another_shape_is_refused_with_every_difference(values, tmp_path):
  model = _MODEL | {"num_layers": 3, "rope_theta": 500_000.0}
  other = parse(Config, _changed(values, "model", model))
  with pytest.raises(ValueError, match=r"num_layers: 2 -> 3\n +rope_theta: 10000\.0 -> 500000\.0"):
    _run(other, tmp_path, only=["initial"])


def test_a_folder_that_does_not_exist_is_refused_by_the_name_of_the_knob(values, tmp_path):
  config = parse(Config, _changed(values, "initial.path", "/nowhere"))
  with pytest.raises(ValueError, match=r"initial\.path='/nowhere'"):
    _run(config, tmp_path, only=["initial"])


def test_a_checkpoint_without_a_tokenizer_is_refused(values, checkpoint, tmp_path):
  bare = tmp_path / "bare"
  shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
  config = parse(Config, _changed(values, "initial.path", str(bare)))
  with pytest.raises(ValueError, match="bare has no tokenizer"):
    _run(config, tmp_path / "run", only=["initial", "tokenizer"])


def test_a_vocabulary_larger_than_the_model_is_refused(values, checkpoint, tmp_path):
  large = tmp_path / "large"
  shutil.copytree(checkpoint, large)
  tokenizer = transformers.AutoTokenizer.from_pretrained(large)
  tokenizer.add_tokens([f"<{i}>" for i in range(50)])
  tokenizer.save_pretrained(large)
  config = parse(Config, _changed(values, "initial.path", str(large)))
  with pytest.raises(ValueError, match=r"has \d+ ids .* its model 320"):
    _run(config, tmp_path / "run", only=["initial", "tokenizer"])


def test_a_checkpoint_that_changed_since_it_was_recorded_is_refused(values, checkpoint, tmp_path):
  moved = tmp_path / "checkpoint"
  shutil.copytree(checkpoint, moved)
  config = parse(Config, _changed(values, "initial.path", str(moved)))
  run = tmp_path / "run"
  _run(config, run, only=["initial"])
  weights = moved / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\1\0")
  with pytest.raises(artifacts.ArtifactError, match=r"are not those that .* recorded"):
    _run(config, run, only=["tokenizer"])


@pytest.mark.parametrize(
  ("path", "value", "told"),
  [
    ("initial.kind", "gguf", "initial.kind='gguf': must be one of"),
    ("initial.special_tokens", {"bos": "<s>"}, "initial.special_tokens.bos='<s>': there is no"),
    ("tuning", {"epochs": 2.0}, "tuning.replay_share: is missing"),
    ("tuning.replay_share", 1.0, "tuning.replay_share=1.0: must be less than 1"),
    ("tuning.epochs", 0.0, "tuning.epochs=0.0: must be greater than 0"),
    ("training.seq_len", 64, "training.seq_len=64: there is no such knob"),
    ("replay.source", {"kind": "jsonl", "path": "x"}, "did you mean 'paths'?"),
    ("model", _MODEL | {"dropout_rate": 0.1}, "model.dropout_rate=0.1 must be 0"),
    ("export.dtype", "int8", "export.dtype='int8': must be"),
  ],
)
def test_a_config_that_makes_no_sense_is_refused_by_path(values, path, value, told):
  with pytest.raises(ValueError, match=re.escape(told)):
    parse(Config, _changed(values, path, value))


def test_early_stopping_without_validation_documents_is_refused(values):
  values = _changed(values, "new_text.split.validation_fraction", 0.0)
  parse(Config, values)
  with pytest.raises(ValueError, match=r"training\.patience=2 needs .*new_text\.split\.validation"):
    parse(Config, _changed(values, "training.patience", 2))
  values = _changed(
    cpt_quick.get_config("smoke").to_dict(), "replay.split.validation_fraction", 0.0
  )
  with pytest.raises(
    ValueError, match=r"initial\.training\.stop_at_loss=2\.0 needs .*replay\.split"
  ):
    parse(Config, _changed(values, "initial.training.stop_at_loss", 2.0))


def test_all_of_a_small_corpus_may_be_trained_on(values, checkpoint, corpora, tmp_path):
  lines = (corpora / "new_text.jsonl").read_text().splitlines(keepends=True)[:30]
  (tmp_path / "few.jsonl").write_text("".join([*lines, *lines[:4]]))
  values = _changed(values, "new_text.source.paths", [str(tmp_path / "few.jsonl")])
  values["training"] |= {"num_evaluations": 1, "num_checkpoints": 1}
  values["tuning"]["epochs"] = 8.0
  for name in ("new_text", "replay"):
    values[name]["split"] |= {"validation_fraction": 0.0, "test_fraction": 0.0}
  config = parse(Config, values)
  _run(config, tmp_path / "run")
  summary = artifacts.open_artifact(tmp_path / "run" / "new_text" / "documents").summary
  assert (summary["passages"]["train"], summary["repeated"]) == (30, 4)
  tuned = artifacts.open_artifact(tmp_path / "run" / "tuned")
  losses = [r["train/loss"] for r in tuned.read_jsonl("curve.jsonl")]
  assert losses[-1] < losses[0] - 0.2
  assert tuned.summary["final_validation"] is None
  made = report(Run(tmp_path / "run", config))
  assert "Nothing of new text was held out, so its loss was not measured." in made.lead
  assert "4 of 34 documents of new text were dropped, since others have" in to_terminal(made)
  assert "validation loss" not in page.render(made).split("Loss of continued")[0]


def test_benchmark_items_in_either_corpus_are_dropped_and_reported(values, corpora, tmp_path):
  item = "Who would have thought that the old lighthouse keeper could sing so very well?"
  changed = values
  for name, copies in (("new_text", 2), ("replay", 1)):
    lines = (corpora / f"{name}.jsonl").read_text().splitlines(keepends=True)
    planted = [json.dumps({"text": f"{i} {item.upper()} {i}"}) + "\n" for i in range(copies)]
    (tmp_path / f"{name}.jsonl").write_text("".join([*lines[:30], *planted, *lines[30:]]))
    changed = _changed(changed, f"{name}.source.paths", [str(tmp_path / f"{name}.jsonl")])
  (tmp_path / "evals").mkdir()
  (tmp_path / "evals" / "quiz.jsonl").write_text(json.dumps({"question": item}) + "\n")
  config = parse(Config, _changed(changed, "decontamination.data_dir", str(tmp_path / "evals")))
  _run(config, tmp_path / "run", only=["new_text/documents", "replay/documents"])
  made = report(Run(tmp_path / "run", config))
  for name, copies in (("new_text", 2), ("replay", 1)):
    artifact = artifacts.open_artifact(tmp_path / "run" / name / "documents")
    assert artifact.summary["decontamination"]["contaminated"] == copies
    texts = [
      r["text"] for shard in artifact.shards for r in artifact.read_jsonl(shard) if "text" in r
    ]
    assert len(texts) > 80 and not any("LIGHTHOUSE" in text for text in texts)
    assert made.data["decontamination"][name]["tasks"]["quiz"]["documents_hit"] == copies
  html = page.render(made)
  assert "New text: 2 of 162 documents contain an item of a benchmark and were dropped." in html
  assert "Nothing was checked" not in html


@pytest.mark.parametrize(
  ("path", "value", "told"),
  [
    ("initial.total_tokens", 511, "initial.total_tokens=511 must be at least the 512 tokens"),
    ("initial.tokenizer.vocab_size", 2000, "initial.tokenizer.vocab_size=2000 must be at most"),
  ],
)
def test_a_pretraining_that_makes_no_sense_is_refused_by_path(path, value, told):
  values = cpt_quick.get_config("smoke").to_dict()
  with pytest.raises(ValueError, match=re.escape(told)):
    parse(Config, _changed(values, path, value))


def test_a_pretrained_start_comes_after_the_rows_that_it_is_pretrained_on():
  made = stages(parse(Config, cpt_quick.get_config("smoke").to_dict()))
  names = [stage.name for stage in made]
  assert names.index("replay/rows") < names.index("initial") < names.index("tuned")
  tokenizer = made[names.index("tokenizer")]
  assert tokenizer.inputs == {"documents": "replay/documents"}
