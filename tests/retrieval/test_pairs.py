"""Pairs of neighbors under every filter, and their random control."""

import collections

import numpy as np
import pytest

from selfimprove_jax.retrieval import ann, pairs
from selfimprove_jax.runtime import config

# Rows 0-3 are documents; 4 nearly repeats 0.
NAMES = ["a", "b", "c", "d", "e"]
TEXTS = [
  "one two three four five six",
  "red green blue red yellow pink",
  "sun moon star comet planet dust",
  "oak elm ash fir pine yew",
  "one two three four five seven",
]
SIMILARITY = np.array(
  [
    [1.0, 0.9, 0.8, 0.3, 0.95],
    [0.9, 1.0, 0.7, 0.2, 0.1],
    [0.8, 0.7, 1.0, 0.6, 0.0],
    [0.3, 0.2, 0.6, 1.0, 0.0],
    [0.95, 0.1, 0.0, 0.0, 1.0],
  ]
)


def neighbors_of(rows: list[int], num: int = 5) -> ann.Neighbors:
  ids = np.argsort(-SIMILARITY[rows], axis=1, kind="stable")[:, :num]
  return ann.Neighbors(ids, np.take_along_axis(SIMILARITY[rows], ids, axis=1).astype(np.float32))


FILTERS = dict(min_similarity=0.5, max_jaccard=0.5, max_uses_per_target=9, max_pairs_per_seed=9)


def make(rows=(0, 1, 2, 3, 4), lengths=(10, 10, 10, 10, 10), max_pair_tokens=100, **changes):
  rows = list(rows)
  documents = [
    {"id": name, "text": text, "num_tokens": length}
    for name, text, length in zip(NAMES, TEXTS, lengths, strict=True)
  ]
  return pairs.make_pairs(
    neighbors_of(rows),
    [documents[row] for row in rows],
    documents,
    pairs.PairFilterConfig(**FILTERS | changes),
    shingle_size=2,
    max_pair_tokens=max_pair_tokens,
  )


def names(made: list[pairs.Pair]) -> list[str]:
  return [pair["id"] for pair in made]


def test_each_seed_gets_its_near_documents_nearest_first_and_no_copy_of_itself():
  made, counts = make()
  assert names(made) == ["a|b", "a|c", "b|a", "b|c", "c|a", "c|b", "c|d", "d|c"]
  assert made[0] == {"id": "a|b", "d1": "a", "d2": "b", "similarity": 0.9}
  assert counts == {
    "candidates": 25,
    "itself": 5,
    "low_similarity": 10,
    "too_long": 0,
    "max_pairs_per_seed": 0,
    "max_uses_per_target": 0,
    "near_duplicate": 2,
    "pairs": 8,
  }


def test_similarity_at_the_threshold_is_not_enough():
  assert "a|c" not in names(make(min_similarity=float(np.float32(0.8)))[0])


def test_a_near_duplicate_is_kept_where_copies_are_allowed():
  assert "a|e" in names(make(max_jaccard=1.0)[0])


def test_a_hub_goes_to_the_seeds_it_is_nearest_to_whatever_their_order():
  # a is near to b (0.9) and to c (0.8); c to a (0.8), b (0.7), d (0.6)
  for rows in ([0, 1, 2, 3], [3, 2, 1, 0]):
    made, counts = make(rows, max_uses_per_target=1)
    assert sorted(names(made)) == ["a|b", "a|c", "b|a", "c|d"]
    assert counts["max_uses_per_target"] == 4


def test_a_seed_has_no_more_pairs_than_allowed_and_they_are_its_nearest():
  made, counts = make(max_pairs_per_seed=1)
  assert names(made) == ["a|b", "b|a", "c|a", "d|c"]
  assert counts["max_pairs_per_seed"] == 4


def test_a_pair_and_its_three_special_tokens_fit_the_window():
  lengths = (10, 20, 30, 40, 10)
  assert "a|c" in names(make(lengths=lengths, max_pair_tokens=43)[0])
  made, counts = make(lengths=lengths, max_pair_tokens=42)
  assert names(made) == ["a|b", "b|a"]
  assert counts["too_long"] == 6


def test_counts_add_up():
  _, counts = make(max_pairs_per_seed=1, max_uses_per_target=1, max_pair_tokens=30)
  assert counts.pop("candidates") == sum(counts.values())


def test_places_without_a_neighbor_are_passed_over():
  ids = np.array([[1, -1]])
  found = ann.Neighbors(ids, np.array([[0.9, -np.inf]], np.float32))
  made, counts = pairs.make_pairs(
    found,
    [{"id": "x", "text": "zero", "num_tokens": 1}],
    [{"id": name, "text": text, "num_tokens": 1} for name, text in zip(NAMES, TEXTS)],
    pairs.PairFilterConfig(**FILTERS),
    shingle_size=2,
    max_pair_tokens=5,
  )
  assert names(made) == ["x|b"]
  assert counts["candidates"] == 1


def test_no_pair_left_names_the_threshold_that_removed_most():
  with pytest.raises(ValueError, match=r"of 25 candidates: min_similarity=0\.97 removed 20"):
    make(min_similarity=0.97)
  with pytest.raises(ValueError, match=r"max_pair_tokens=5 removed 14, min_similarity=0\.15 .* 6"):
    make(max_pair_tokens=5, min_similarity=0.15)
  with pytest.raises(ValueError, match=r"max_jaccard=0\.0 removed"):
    make(rows=[0, 4], min_similarity=0.93, max_jaccard=0.0)


def test_thresholds_out_of_range_are_refused():
  for change, message in (
    ({"min_similarity": -0.1}, "min_similarity=-0.1"),
    ({"min_similarity": 1.0}, "min_similarity=1.0"),
    ({"max_jaccard": 1.1}, "max_jaccard=1.1"),
    ({"max_uses_per_target": 0}, "max_uses_per_target=0"),
  ):
    with pytest.raises(ValueError, match=message):
      config.parse(pairs.PairFilterConfig, FILTERS | change)


def some_pairs(num: int) -> tuple[list[pairs.Pair], dict[str, int]]:
  rng = np.random.default_rng(5)
  lengths = {f"d{i}": int(rng.integers(5, 60)) for i in range(num)}
  joined = {}
  while len(joined) < 3 * num:
    d1, d2 = (f"d{i}" for i in rng.integers(num, size=2))
    if d1 != d2 and lengths[d1] + lengths[d2] + 3 <= 80:
      joined[d1, d2] = {"id": f"{d1}|{d2}", "d1": d1, "d2": d2, "similarity": 0.9}
  return list(joined.values()), lengths


def test_random_pairs_keep_the_documents_and_none_of_the_links():
  real, lengths = some_pairs(40)
  control = pairs.random_pairs(real, lengths=lengths, max_pair_tokens=80, seed=0)
  assert [pair["d1"] for pair in control] == [pair["d1"] for pair in real]
  counted = [collections.Counter(pair["d2"] for pair in made) for made in (real, control)]
  assert counted[0] == counted[1]
  assert not {pair["id"] for pair in real} & {pair["id"] for pair in control}
  assert len({pair["id"] for pair in control}) == len(real)
  for pair in control:
    assert pair["d1"] != pair["d2"]
    assert lengths[pair["d1"]] + lengths[pair["d2"]] + 3 <= 80
    assert pair["similarity"] is None


def test_random_pairs_depend_on_the_seed_alone():
  real, lengths = some_pairs(20)
  options = {"lengths": lengths, "max_pair_tokens": 80}
  first = pairs.random_pairs(real, seed=0, **options)
  assert first == pairs.random_pairs(real, seed=0, **options)
  assert first != pairs.random_pairs(real, seed=1, **options)


def test_random_pairs_that_cannot_be_are_refused():
  real = [{"id": "a|b", "d1": "a", "d2": "b", "similarity": 0.9}]
  with pytest.raises(ValueError, match="'a' among 1 pairs"):
    pairs.random_pairs(real, lengths={"a": 1, "b": 1}, max_pair_tokens=9, seed=0)
