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


def passages(documents=NAMES, groups=NAMES, lengths=(10, 10, 10, 10, 10)):
  values = zip(NAMES, documents, groups, TEXTS, lengths, strict=True)
  fields = ("id", "document", "group", "text", "num_tokens")
  return [dict(zip(fields, passage, strict=True)) for passage in values]


def make(rows=(0, 1, 2, 3, 4), max_pair_tokens=100, documents=None, **changes):
  rows = list(rows)
  documents = documents or passages()
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
    "same_document": 0,
    "same_group": 0,
    "low_similarity": 10,
    "too_long": 0,
    "max_pairs_per_seed": 0,
    "max_uses_per_target": 0,
    "near_duplicate": 2,
    "pairs": 8,
  }


def test_similarity_at_the_threshold_is_not_enough():
  assert "a|c" not in names(make(min_similarity=float(np.float32(0.8)))[0])


def test_passages_of_one_document_are_never_paired_and_those_of_one_group_only_if_asked():
  documents = passages(documents=["x", "x", "y", "z", "v"], groups=["f", "f", "f", "g", "h"])
  made, counts = make(documents=documents)
  assert names(made) == ["c|d", "d|c"]
  assert (counts["itself"], counts["same_document"], counts["same_group"]) == (5, 2, 4)
  made, counts = make(documents=documents, same_group=True)
  assert names(made) == ["a|c", "b|c", "c|a", "c|b", "c|d", "d|c"]
  assert (counts["same_document"], counts["same_group"]) == (2, 0)
  with pytest.raises(ValueError, match=r"same_group=False .* removed \d+"):
    make(documents=passages(groups=["f"] * 5))


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
  documents = passages(lengths=(10, 20, 30, 40, 10))
  assert "a|c" in names(make(documents=documents, max_pair_tokens=43)[0])
  made, counts = make(documents=documents, max_pair_tokens=42)
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
    [{"id": "x", "document": "x", "group": "x", "text": "zero", "num_tokens": 1}],
    passages(lengths=(1, 1, 1, 1, 1)),
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


def some_pairs(num: int) -> tuple[list[pairs.Pair], dict[str, dict]]:
  """Returns pairs of passages, and the passages: two of each document, four of each group."""
  rng = np.random.default_rng(5)
  documents = {
    f"d{i}": {
      "id": f"d{i}",
      "document": f"document{i // 2}",
      "group": f"group{i // 4}",
      "num_tokens": int(rng.integers(5, 60)),
    }
    for i in range(num)
  }
  joined = {}
  while len(joined) < 3 * num:
    d1, d2 = (f"d{i}" for i in rng.integers(num, size=2))
    a, b = documents[d1], documents[d2]
    if a["group"] != b["group"] and a["num_tokens"] + b["num_tokens"] + 3 <= 80:
      joined[d1, d2] = {"id": f"{d1}|{d2}", "d1": d1, "d2": d2, "similarity": 0.9}
  return list(joined.values()), documents


def control_of(real, documents, *, max_pair_tokens=80, seed=0, **changes):
  filters = pairs.PairFilterConfig(**FILTERS | changes)
  return pairs.random_pairs(real, documents, filters, max_pair_tokens=max_pair_tokens, seed=seed)


def test_random_pairs_keep_the_documents_and_none_of_the_links():
  real, documents = some_pairs(40)
  control = control_of(real, documents)
  assert [pair["d1"] for pair in control] == [pair["d1"] for pair in real]
  counted = [collections.Counter(pair["d2"] for pair in made) for made in (real, control)]
  assert counted[0] == counted[1]
  assert not {pair["id"] for pair in real} & {pair["id"] for pair in control}
  assert len({pair["id"] for pair in control}) == len(real)
  for pair in control:
    d1, d2 = documents[pair["d1"]], documents[pair["d2"]]
    assert d1["group"] != d2["group"]
    assert d1["num_tokens"] + d2["num_tokens"] + 3 <= 80
    assert pair["similarity"] is None


def test_random_pairs_depend_on_the_seed_alone():
  real, documents = some_pairs(40)
  first = control_of(real, documents)
  assert first == control_of(real, documents)
  assert first != control_of(real, documents, seed=1)


def test_random_pairs_may_join_a_group_but_no_document_where_pairs_may():
  real, documents = some_pairs(40)
  control = control_of(real, documents, same_group=True)
  joined = [(documents[pair["d1"]], documents[pair["d2"]]) for pair in control]
  assert any(d1["group"] == d2["group"] for d1, d2 in joined)
  assert all(d1["document"] != d2["document"] for d1, d2 in joined)


def test_random_pairs_that_cannot_be_are_refused():
  real = [{"id": "a|b", "d1": "a", "d2": "b", "similarity": 0.9}]
  with pytest.raises(ValueError, match="'a' among 1 pairs"):
    control_of(real, {passage["id"]: passage for passage in passages()})
