"""Near-duplicates against comparing all pairs, and LSH against its S-curve."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from selfimprove_jax.data import shingles
from selfimprove_jax.retrieval import near_duplicates
from selfimprove_jax.retrieval.near_duplicates import choose_bands, collision_probability


def random_text(rng: np.random.Generator, num_words: int) -> list[str]:
  return [f"w{word}" for word in rng.integers(10_000, size=num_words)]


def some_texts() -> list[str]:
  """300 texts; every third repeats an earlier one but for some of its words."""
  rng = np.random.default_rng(0)
  texts: list[list[str]] = []
  for i in range(300):
    words = random_text(rng, 60)
    if i % 3 == 2:
      words = list(texts[rng.integers(len(texts))])
      for place in rng.integers(60, size=rng.integers(1, 8)):
        words[place] = "new"
    texts.append(words)
  return [" ".join(words) for words in texts]


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8])
def test_lsh_finds_what_comparing_all_pairs_finds(threshold):
  texts = some_texts()
  sets = [shingles.word_shingles(text, 3) for text in texts]
  expected = [
    next((j for j in range(i) if shingles.jaccard(sets[i], sets[j]) > threshold), None)
    for i in range(len(texts))
  ]
  found = near_duplicates.near_duplicates(texts, threshold=threshold, shingle_size=3)
  missed = [i for i in range(len(texts)) if found[i] != expected[i]]
  assert len(missed) <= 1  # LSH may miss one that is just above the threshold
  assert all(found[i] is None or found[i] > expected[i] for i in missed)
  assert 10 < sum(j is not None for j in expected) <= 100


def test_the_first_repeated_reference_is_named_and_references_may_be_a_stream():
  texts = some_texts()
  queries = ["nothing like it in the corpus at all", texts[2], texts[2] + " and more", "short"]
  found = near_duplicates.near_duplicates_of(
    (text for text in [*texts, *texts]), queries, threshold=0.8, shingle_size=3
  )
  assert found == [None, 2, 2, None]


def test_texts_too_short_for_a_shingle_repeat_nothing():
  texts = ["", "two words", "two words", ""]
  assert near_duplicates.near_duplicates(texts, threshold=0.0, shingle_size=3) == [None] * 4
  found = near_duplicates.near_duplicates_of(texts, texts, threshold=0.0, shingle_size=3)
  assert found == [None] * 4


def test_a_threshold_that_nothing_exceeds_is_refused():
  for threshold in (1.0, -0.1):
    with pytest.raises(ValueError, match=f"threshold={threshold}"):
      near_duplicates.near_duplicates(["a b c"], threshold=threshold, shingle_size=2)


def test_the_s_curve_is_steep_at_its_middle():
  assert collision_probability(0.0, 16, 8) == 0
  assert collision_probability(1.0, 16, 8) == 1
  assert collision_probability(0.5, 1, 2) == 0.25
  assert collision_probability(0.5, 2, 1) == 0.75
  assert collision_probability(0.4, 16, 8) < 0.02 < 0.9 < collision_probability(0.8, 16, 8)


def test_bands_are_the_fewest_that_propose_what_is_at_the_threshold():
  for threshold in (0.3, 0.5, 0.8, 0.95):
    bands = choose_bands(threshold, 128)
    assert collision_probability(threshold, bands, 128 // bands) >= 0.98
    assert collision_probability(threshold, bands // 2, 256 // bands) < 0.98
  assert choose_bands(0.0, 128) == 128


def test_signatures_collide_as_often_as_the_s_curve_says(monkeypatch):
  collided = 0
  rng = np.random.default_rng(1)
  for seed in range(300):
    words = random_text(rng, 101)
    texts = [" ".join(words), " ".join([*words[:68], *random_text(rng, 33)])]
    monkeypatch.setattr(near_duplicates, "_SEED", seed)
    (_, a), (_, b) = near_duplicates._signatures(texts, 2)
    lsh = near_duplicates._new_lsh(0.6)
    lsh.insert(0, a)
    collided += bool(lsh.query(b))
  assert collided / 300 == pytest.approx(collision_probability(67 / 133, 32, 4), abs=0.06)


_FIND_AND_PRINT = """
import numpy as np
from selfimprove_jax.retrieval import near_duplicates
texts = [" ".join(f"w{(7 * i + j) % 97}" for j in range(40)) for i in range(60)]
near_duplicates._NUM_PERM = 4
for near_duplicates._SEED in range(20):
  print(near_duplicates.near_duplicates(texts, threshold=0.28, shingle_size=1))
"""


def test_two_processes_miss_the_same_near_duplicates():
  outputs = set()
  for number in ("1", "2"):
    environment = {**os.environ, "PYTHONHASHSEED": number, "RAYON_NUM_THREADS": number}
    command = [sys.executable, "-c", _FIND_AND_PRINT]
    outputs.add(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
  (output,) = outputs
  assert len(set(output.splitlines())) > 1  # another seed misses others


def test_sections_of_textbooks_that_come_twice_are_found(real_data):
  with gzip.open(real_data / "corpora/openstax.jsonl.gz", "rt", encoding="utf-8") as file:
    texts = [json.loads(line)["text"][:2000] for line in file][:700]
  found = near_duplicates.near_duplicates(texts, threshold=0.5, shingle_size=5)
  for i, j in enumerate(found):
    if j is not None:
      sets = [shingles.word_shingles(texts[row], 5) for row in (i, j)]
      assert j < i and shingles.jaccard(*sets) > 0.5
  assert any(j is not None for j in found)
