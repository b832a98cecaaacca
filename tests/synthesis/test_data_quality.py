"""Measures of text quality on texts whose quality is known."""

import gzip
import json

import numpy as np
import pytest

from selfimprove_jax.evaluation import statistics
from selfimprove_jax.retrieval import embedding
from selfimprove_jax.synthesis import data_quality

NUM_TOPICS, WORDS_PER_TOPIC = 20, 30


def write(rng: np.random.Generator, topic: int, share: float = 0.5) -> str:
  """40 words, `share` of them of a topic, the rest of any."""
  own = rng.integers(WORDS_PER_TOPIC, size=40) + topic * WORDS_PER_TOPIC
  other = rng.integers(NUM_TOPICS * WORDS_PER_TOPIC, size=40)
  return " ".join(f"w{w}" for w in np.where(rng.random(40) < share, own, other))


def similarities(share: float, num: int = 200) -> data_quality.Similarities:
  rng = np.random.default_rng(0)
  topics = rng.integers(NUM_TOPICS, size=num)
  seeds = [write(rng, topic) for topic in topics]
  targets = [write(rng, topic) for topic in topics]
  corpus = [write(rng, topic) for topic in rng.integers(NUM_TOPICS, size=2 * num)]
  embed = embedding.TfidfSvd.fit(corpus, dim=NUM_TOPICS, seed=0)
  syntheses = [write(rng, topic, share) for topic in topics]
  others = [write(rng, (topic + 1) % NUM_TOPICS) for topic in topics]
  real = list(zip(seeds, targets, others))
  return data_quality.similarities(seeds, syntheses, real=real, embed=embed, seed=0)


def retained(found: data_quality.Similarities) -> statistics.Estimate | None:
  groups_N, groups_P = (np.arange(len(values)) for values in (found.own_N, found.real_P))
  values = (found.own_N, found.random_N, found.real_P, found.unrelated_P)
  return statistics.retained_share(*values, groups_N=groups_N, groups_P=groups_P)


def test_a_synthesizer_as_good_as_real_pairs_retains_all_of_their_similarity():
  found = similarities(0.5)
  assert retained(found).value == pytest.approx(1, abs=0.1)
  assert found.real_P.mean() > 0.5 > 0.3 > abs(found.random_N.mean())
  assert found.own_N.std() > 0


def test_a_synthesizer_that_ignores_its_seed_retains_nothing():
  low, high = retained(similarities(0.0)).interval95
  assert low < 0 < high
  assert high - low < 0.2


def test_random_seeds_are_never_the_own_seed():
  embed = {"a": [1.0, 0.0], "b": [0.0, 1.0]}
  found = data_quality.similarities(
    ["a", "a", "b", "a"],
    ["a", "a", "b", "a"],
    real=[("a", "a", "b"), ("b", "b", "a")],
    embed=lambda texts: np.array([embed[text] for text in texts], np.float32),
    seed=0,
  )
  np.testing.assert_array_equal(found.own_N, 1)
  np.testing.assert_array_equal(found.random_N, 0)
  assert retained(found).value == 1


def test_syntheses_that_are_all_alike_do_not_make_real_pairs_look_unrelated():
  # Syntheses are about as similar to any seed as related documents are to each other.
  options = dict(groups_N=np.arange(4), groups_P=np.arange(4))
  own, random = np.array([0.52, 0.5, 0.51, 0.51]), np.array([0.5, 0.5, 0.49, 0.51])
  real, unrelated = np.array([0.5, 0.52, 0.48, 0.5]), np.array([0.1, 0.12, 0.08, 0.1])
  found = statistics.retained_share(own, random, real, unrelated, **options)
  assert found.value == pytest.approx(0.01 / 0.4)


def test_real_pairs_that_are_not_related_leave_no_share():
  rng = np.random.default_rng(0)
  texts = [write(rng, topic % NUM_TOPICS) for topic in range(100)]
  embed = embedding.TfidfSvd.fit(texts, dim=16, seed=0)
  unrelated = [(texts[i], texts[i + 1], texts[i + 2]) for i in range(98)]
  found = data_quality.similarities(texts, texts, real=unrelated, embed=embed, seed=0)
  assert retained(found) is None


def test_lists_that_do_not_match_are_refused():
  with pytest.raises(ValueError, match="2 syntheses, but 1 seeds"):
    data_quality.copies_of_seed(["a"], ["b", "c"], max_jaccard=0.5, shingle_size=2)


def test_loops_duplicates_and_copies_of_the_seed_are_flagged():
  rng = np.random.default_rng(0)
  plain = [" ".join(f"w{w}" for w in rng.integers(9999, size=30)) for _ in range(8)]
  loops = ["round and round and round " * 9, "again " * 50]
  flags = data_quality.looping([*plain, *loops], max_repetition=0.3)
  assert flags.tolist() == [False] * 8 + [True] * 2
  rate = statistics.share(flags, groups=np.arange(10))
  assert (rate.value, rate.unit) == (pytest.approx(0.2), "share")
  assert rate.stderr == pytest.approx((0.2 * 0.8 / 9) ** 0.5)

  texts = [*plain, plain[0], plain[5] + " more"]
  options = {"max_jaccard": 0.5, "shingle_size": 3, "seed": 0}
  places, flags = data_quality.duplicates(texts, sample_size=10, **options)
  assert places.tolist() == list(range(10))
  assert flags.tolist() == [False] * 8 + [True] * 2
  copies = [plain[0]] * 10
  places, flags = data_quality.duplicates(copies, sample_size=2, **options)
  assert flags.tolist() == [False, True] and len(set(places.tolist())) == 2

  flags = data_quality.copies_of_seed(
    plain[:4], [plain[0], *plain[5:8]], max_jaccard=0.5, shingle_size=3
  )
  assert flags.tolist() == [True, False, False, False]


def test_runs_of_words_found_in_the_corpus_are_counted():
  corpus = (text for text in ["zero one two three four five six seven eight nine", "other words"])
  syntheses = [
    "one two three four five six seven eight ten",  # 1 of 2 runs of 8 words
    "a b c d e f g h i j",  # 0 of 3
    "one two three",  # shorter than a run
  ]
  copied_N, all_N = data_quality.copied_runs(syntheses, corpus)
  assert (copied_N.tolist(), all_N.tolist()) == ([1, 0, 0], [2, 3, 0])
  estimate = statistics.ratio(copied_N, all_N, "share", groups=["a", "b", "b"])
  assert estimate.value == pytest.approx(1 / 5)
  assert estimate.stderr == pytest.approx(0.24)  # of two groups


def test_real_passages_are_scored_as_real(real_data):
  with gzip.open(real_data / "corpora/openstax.jsonl.gz", "rt", encoding="utf-8") as file:
    sections = [json.loads(line)["text"].split() for line in list(file)[::5]]
  sections = [words for words in sections if len(words) >= 400]
  firsts, seconds = ([" ".join(w[a : a + 200]) for w in sections] for a in (0, 200))
  embed = embedding.TfidfSvd.fit(firsts + seconds, dim=64, seed=0)
  others = np.random.default_rng(0).permutation(seconds[1::2])
  found = data_quality.similarities(
    firsts[::2],
    seconds[::2],
    real=list(zip(firsts[1::2], seconds[1::2], others.tolist())),
    embed=embed,
    seed=0,
  )
  assert retained(found).value == pytest.approx(1, abs=0.15)
  copied_N, all_N = data_quality.copied_runs(seconds, firsts)
  assert copied_N.sum() < 0.05 * all_N.sum()
