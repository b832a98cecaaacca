"""Embedders on small corpora, and embeddings on disk."""

import gzip
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
