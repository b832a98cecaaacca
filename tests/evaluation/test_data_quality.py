import gzip
import json

import numpy as np
import pytest

from selfimprove_jax.evaluation import data_quality
from selfimprove_jax.retrieval import embedding

NUM_TOPICS, WORDS_PER_TOPIC = 20, 30


def write(rng: np.random.Generator, topic: int, share: float = 0.5) -> str:
  """40 words, `share` of them of a topic, the rest of any."""
  own = rng.integers(WORDS_PER_TOPIC, size=40) + topic * WORDS_PER_TOPIC
  other = rng.integers(NUM_TOPICS * WORDS_PER_TOPIC, size=40)
  return " ".join(f"w{w}" for w in np.where(rng.random(40) < share, own, other))


def relevance(share: float, num: int = 200) -> data_quality.TopicalRelevance:
  rng = np.random.default_rng(0)
  topics = rng.integers(NUM_TOPICS, size=num)
  seeds = [write(rng, topic) for topic in topics]
  targets = [write(rng, topic) for topic in topics]
  corpus = [write(rng, topic) for topic in rng.integers(NUM_TOPICS, size=2 * num)]
  embed = embedding.TfidfSvd.fit(corpus, dim=NUM_TOPICS, seed=0)
  syntheses = [write(rng, topic, share) for topic in topics]
  return data_quality.topical_relevance(
    seeds, syntheses, real_pairs=list(zip(seeds, targets)), embed=embed, seed=0
  )


def test_a_synthesizer_as_good_as_real_pairs_retains_all_and_one_that_ignores_its_seed_nothing():
  faithful, deaf = relevance(0.5), relevance(0.0)
  assert faithful.retained_share.value == pytest.approx(1, abs=0.1)
  low, high = deaf.retained_share.interval95
  assert low < 0 < high
  assert high - low < 0.2
  assert faithful.real_pairs.value > 0.5 > 0.3 > abs(faithful.random_seed.value)
  assert faithful.own_seed.stderr > 0


def test_random_seeds_are_never_the_own_seed():
  embed = {"a": [1.0, 0.0], "b": [0.0, 1.0]}
  result = data_quality.topical_relevance(
    ["a", "a", "b", "a"],
    ["a", "a", "b", "a"],
    real_pairs=[("a", "a"), ("b", "b")],
    embed=lambda texts: np.array([embed[text] for text in texts], np.float32),
    seed=0,
  )
  assert (result.own_seed.value, result.random_seed.value) == (1, 0)
  assert result.retained_share.value == 1


def test_real_pairs_that_are_not_related_leave_no_share():
  rng = np.random.default_rng(0)
  texts = [write(rng, topic % NUM_TOPICS) for topic in range(100)]
  embed = embedding.TfidfSvd.fit(texts, dim=16, seed=0)
  unrelated = [(texts[i], texts[i + 1]) for i in range(99)]
  result = data_quality.topical_relevance(texts, texts, real_pairs=unrelated, embed=embed, seed=0)
  assert result.retained_share is None


def test_lists_that_do_not_match_are_refused():
  with pytest.raises(ValueError, match="2 syntheses, but 1 seeds"):
    data_quality.pair_copying_rate(["a"], ["b", "c"], max_jaccard=0.5, shingle_size=2)


def test_rates_are_shares_of_documents_with_standard_errors():
  rng = np.random.default_rng(0)
  plain = [" ".join(f"w{w}" for w in rng.integers(9999, size=30)) for _ in range(8)]
  loops = ["round and round and round " * 9, "again " * 50]
  repeated = data_quality.repetition_rate([*plain, *loops], max_repetition=0.3)
  assert repeated.value == pytest.approx(0.2)
  assert repeated.stderr == pytest.approx((0.2 * 0.8 / 9) ** 0.5)

  texts = [*plain, plain[0], plain[5] + " more"]
  options = {"max_jaccard": 0.5, "shingle_size": 3, "seed": 0}
  duplicates = data_quality.duplicate_rate(texts, sample_size=10, **options)
  assert duplicates.value == pytest.approx(0.2)
  assert duplicates.unit == "share"
  copies = [plain[0]] * 10
  assert data_quality.duplicate_rate(copies, sample_size=2, **options).value == 0.5

  copied = data_quality.pair_copying_rate(
    plain[:4], [plain[0], *plain[5:8]], max_jaccard=0.5, shingle_size=3
  )
  assert copied.value == 0.25


def test_copied_share_counts_runs_of_words_found_in_the_corpus():
  corpus = (text for text in ["zero one two three four five six seven eight nine", "other words"])
  syntheses = [
    "one two three four five six seven eight ten",  # 1 of 2 runs of 8 words
    "a b c d e f g h i j",  # 0 of 3
    "one two three",  # too short to tell
  ]
  estimate = data_quality.copied_share(syntheses, corpus)
  assert estimate.value == pytest.approx(1 / 5)
  assert estimate.stderr == pytest.approx(0.24)  # of two documents


def test_real_passages_are_scored_as_real(real_data):
  with gzip.open(real_data / "corpora/openstax.jsonl.gz", "rt", encoding="utf-8") as file:
    sections = [json.loads(line)["text"].split() for line in list(file)[::5]]
  sections = [words for words in sections if len(words) >= 400]
  firsts, seconds = ([" ".join(w[a : a + 200]) for w in sections] for a in (0, 200))
  embed = embedding.TfidfSvd.fit(firsts + seconds, dim=64, seed=0)
  half = len(sections) // 2
  result = data_quality.topical_relevance(
    firsts[:half],
    seconds[:half],
    real_pairs=list(zip(firsts[half:], seconds[half:])),
    embed=embed,
    seed=0,
  )
  assert result.retained_share.value == pytest.approx(1, abs=0.15)
  assert data_quality.copied_share(seconds, firsts).value < 0.05
