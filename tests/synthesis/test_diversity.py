"""Measures of diversity on texts whose diversity is known."""

import zlib

import numpy as np
import pytest

from selfimprove_jax.synthesis import diversity


def prose(rng: np.random.Generator, num: int, vocabulary: int = 5_000) -> str:
  return " ".join(f"w{word}" for word in rng.integers(vocabulary, size=num))


def corpus(share: float, *, num_texts: int = 40) -> tuple[list[tuple[str, str]], dict[str, str]]:
  """Texts of 100 words; the first `share` of each are copied from its source."""
  rng = np.random.default_rng(0)
  sources = {f"d{index}": prose(rng, 200) for index in range(4)}
  copied = round(100 * share)
  texts = []
  for index in range(num_texts):
    source = sources[f"d{index % 4}"].split()
    start = int(rng.integers(0, 201 - copied))
    text = " ".join(source[start : start + copied])
    texts.append((f"d{index % 4}", f"{text} {prose(rng, 100 - copied)}"))
  return texts, sources


def measure(texts, sources, num_words=4_000, **options):
  return diversity.measure(texts, sources, num_words=num_words, seed=0, **options)


def test_overlap_counts_the_ngrams_that_the_own_source_holds():
  texts, sources = corpus(0.5)
  found = measure(texts, sources)
  # 50 copied words have 51 - n n-grams; a text of 100 words has 101 - n.
  for size in diversity.OVERLAP_SIZES:
    expected = (51 - size) / (101 - size)
    assert found[f"source_overlap_{size}"] == pytest.approx(expected, abs=0.01)
  assert found["source_overlap_2_stderr"] < 0.01
  swapped = [(f"d{(int(document[1]) + 1) % 4}", text) for document, text in texts]
  assert measure(swapped, sources)["source_overlap_4"] == 0


def test_overlap_ignores_case_and_punctuation():
  sources = {"d": "The cat sat on the mat. Then it slept."}
  texts = [("d", "THE CAT, sat on -- the mat!")] * 10
  found = diversity.measure(texts, sources, num_words=60, seed=0)
  assert found["source_overlap_2"] == found["source_overlap_4"] == 1
  assert np.isnan(found["source_overlap_16"])  # no text has 16 words


def test_repeated_texts_are_less_diverse_by_every_measure():
  rng = np.random.default_rng(1)
  sources = {"d": prose(rng, 50)}
  varied = [("d", prose(rng, 50)) for _ in range(200)]
  repeated = varied[:4] * 50

  def embed(texts):
    rows = np.zeros((len(texts), 5_000))
    for row, text in zip(rows, texts):
      np.add.at(row, [int(word[1:]) for word in text.split()], 1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)

  high, low = (measure(t, sources, num_words=10_000, embed=embed) for t in (varied, repeated))
  # Each text of 50 words has 47 4-grams; a block of 20 texts holds all 4 of the repeated ones.
  assert high["distinct_4grams"] == pytest.approx(10_000 * 47 / 50)
  assert low["distinct_4grams"] <= 10_000 * 4 * 47 / 1_000
  assert low["compression_ratio"] > 2 * high["compression_ratio"]
  assert low["embedding_distance"] < 0.8 < high["embedding_distance"]
  assert low.keys() == high.keys()


def test_corpora_of_different_sizes_compare():
  small, large = (measure(*corpus(0.5, num_texts=num)) for num in (60, 600))
  for name in ("source_overlap_4", "distinct_4grams", "compression_ratio"):
    assert small[name] == pytest.approx(large[name], rel=0.02)


def test_one_long_text_fills_all_blocks():
  rng = np.random.default_rng(2)
  text = prose(rng, 1_000)
  found = diversity.measure([("d", text)], {"d": text}, num_words=1_000, seed=0)
  assert found["source_overlap_16"] == 1
  assert found["distinct_4grams"] == pytest.approx(10_000 * 97 / 100)
  parts = [" ".join(text.split()[start : start + 100]).encode() for start in range(0, 1_000, 100)]
  ratio = np.mean([len(part) / len(zlib.compress(part, 9)) for part in parts])
  assert found["compression_ratio"] == pytest.approx(ratio, rel=0.02)


def test_embedding_distance_is_the_mean_over_pairs():
  rng = np.random.default_rng(3)
  rows = rng.normal(size=(30, 4))
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  distance, stderr = diversity.embedding_distance(rows)
  pairs = [1 - rows[i] @ rows[j] for i in range(30) for j in range(i)]
  assert distance == pytest.approx(np.mean(pairs))
  # The jackknife over texts estimates the same error.
  left_out = [diversity.embedding_distance(np.delete(rows, i, 0))[0] for i in range(30)]
  assert stderr == pytest.approx(np.std(left_out) * np.sqrt(29), rel=0.1)


def test_the_seed_chooses_the_sample():
  texts, sources = corpus(0.5)
  one, same = (diversity.measure(texts, sources, num_words=2_000, seed=0) for _ in range(2))
  assert one == same
  other = diversity.measure(texts, sources, num_words=2_000, seed=1)
  assert other["compression_ratio"] != one["compression_ratio"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(num_words=4_001 + 10), "num_words=4010, and the texts have 4000 words"),
    (dict(num_words=10), "num_words=10 must be at least 40"),
    (dict(sources={"d0": "a"}), "no source document 'd1'; texts name 3 missing ones"),
    (dict(embed=lambda texts: np.ones((len(texts), 4))), "unit rows; one has length 2.000"),
  ],
)
def test_refusals(change, message):
  texts, sources = corpus(0.5)
  with pytest.raises(ValueError, match=message):
    measure(**dict(texts=texts, sources=sources) | change)
