"""Neighbors against brute force, across methods, processes and impossible requests."""

import os
import subprocess
import sys

import numpy as np
import pytest

from selfimprove_jax.retrieval import ann
from selfimprove_jax.runtime import config


def search(database, queries, num_neighbors, **options) -> ann.Neighbors:
  section = ann.SearchConfig(num_neighbors=num_neighbors, **options)
  return ann.find_neighbors(database, queries, section)


def unit_rows(num_rows: int, dim: int, seed: int = 0) -> np.ndarray:
  """Rows in clusters of about 25, as the embeddings of a corpus are."""
  rng = np.random.default_rng(seed)
  centers = rng.standard_normal((max(1, num_rows // 25), dim))
  rows = centers[rng.integers(len(centers), size=num_rows)]
  rows = rows + 0.7 * rng.standard_normal((num_rows, dim))
  return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_exact_search_equals_sorting_all_inner_products(block, monkeypatch):
  monkeypatch.setattr(ann, "_EXACT_BLOCK", block)
  database, queries = unit_rows(200, 8), unit_rows(50, 8, seed=1)
  found = ann.exact_neighbors(database, queries, 10)
  scores = (queries.astype(np.float64) @ database.T.astype(np.float64)).astype(np.float32)
  ids = np.argsort(-scores, axis=1, kind="stable")[:, :10]
  np.testing.assert_array_equal(found.ids_QM, ids)
  np.testing.assert_array_equal(found.scores_QM, np.take_along_axis(scores, ids, axis=1))


@pytest.mark.parametrize("block", [2, 5, 100])
def test_equal_scores_come_in_the_order_of_their_ids(block, monkeypatch):
  monkeypatch.setattr(ann, "_EXACT_BLOCK", block)
  database = np.eye(3, dtype=np.float32)[[1, 0, 1, 2, 0, 0, 1]]
  found = ann.exact_neighbors(database, database[1:2], 5)
  np.testing.assert_array_equal(found.ids_QM, [[1, 4, 5, 0, 2]])
  np.testing.assert_array_equal(found.scores_QM, [[1, 1, 1, 0, 0]])


def test_negative_scores_are_in_order():
  angles = np.array([0.0, 3.0, 2.0, 1.0])
  database = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
  found = ann.exact_neighbors(database, database[:1], 4)
  np.testing.assert_array_equal(found.ids_QM, [[0, 3, 2, 1]])
  np.testing.assert_allclose(found.scores_QM, [np.cos([0, 1, 2, 3])], atol=1e-6)


def test_bad_rows_are_named():
  rows = unit_rows(30, 4)
  for bad in (np.nan, np.inf, 1.5):
    broken = rows.copy()
    broken[17, 2] = bad
    with pytest.raises(ValueError, match="row 17 of the database"):
      search(broken, rows, 3)
    with pytest.raises(ValueError, match="row 17 of the queries"):
      search(rows, broken, 3)


def test_a_zero_row_is_allowed_and_is_similar_to_nothing():
  rows = unit_rows(30, 4)
  rows[3] = 0
  assert (search(rows, rows[3:4], 30).scores_QM == 0).all()


def test_impossible_requests_are_refused():
  rows = unit_rows(5, 4)
  with pytest.raises(ValueError, match="num_neighbors=6 does not fit a database of 5 rows"):
    search(rows, rows, 6)
  with pytest.raises(ValueError, match="method='faiss'"):
    config.parse(ann.SearchConfig, {"num_neighbors": 2, "method": "faiss"})


def test_recall_counts_the_exact_neighbors_that_were_found():
  scores = np.zeros((2, 4), np.float32)
  exact = ann.Neighbors(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), scores)
  found = ann.Neighbors(np.array([[3, 9, 8, 0], [7, 6, 5, 4]]), scores)
  assert ann.recall_at_k(found, exact).tolist() == [0.5, 1.0]


def test_scann_finds_what_exact_search_finds():
  rows = unit_rows(2000, 32)
  rows[7] = 0  # a text without a known word
  exact = ann.exact_neighbors(rows, rows, 10)
  for tree_from, least in ((100_000, 0.97), (1, 0.9)):
    found = search(rows, rows, 10, method="scann", tree_from=tree_from)
    has_text = np.arange(len(rows)) != 7  # all its scores tie
    recall = ann.recall_at_k(
      *(ann.Neighbors(n.ids_QM[has_text], n.scores_QM[has_text]) for n in (found, exact))
    ).mean()
    assert recall > least
    same = found.ids_QM == exact.ids_QM
    np.testing.assert_array_equal(found.scores_QM[same], exact.scores_QM[same])
    sampled, recall_S = ann.measure_recall(rows, rows, found, sample_size=300, seed=1)
    assert len(set(sampled.tolist())) == 300
    assert recall_S.mean() == pytest.approx(recall, abs=5 * recall_S.std() / 300**0.5 + 1e-3)


def test_places_that_scann_cannot_fill_are_marked():
  rows = unit_rows(300, 16)
  found = search(rows, rows, 290, method="scann", tree_from=1, min_recall=0.01)
  missing = found.ids_QM == ann.NO_NEIGHBOR
  assert missing.any()
  assert (np.diff(missing.astype(int), axis=1) >= 0).all()  # last in each row
  np.testing.assert_array_equal(np.isneginf(found.scores_QM), missing)


def test_leaves_are_searched_until_the_recall_is_reached_or_the_search_is_exact():
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((3000, 32)).astype(np.float32)  # without clusters: a tree's worst case
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  exact = ann.exact_neighbors(rows, rows, 10)
  recalls, leaves = [], []
  for min_recall in (0.1, 0.75, 0.95):
    found = search(rows, rows, 10, method="scann", tree_from=1, min_recall=min_recall)
    recalls.append(ann.recall_at_k(found, exact).mean())
    leaves.append(int(found.method.split()[1]))
    assert recalls[-1] > min_recall - 0.03
  assert recalls[0] < 0.75  # the fewest leaves are not enough
  assert leaves == sorted(set(leaves))
  found = search(rows, rows, 10, method="scann", tree_from=1, min_recall=1.0)
  if not found.method.startswith("ScaNN"):
    assert found.method.startswith("exact, because")
  np.testing.assert_array_equal(found.ids_QM, exact.ids_QM)


_SEARCH_AND_SAVE = """
import sys
import numpy as np
from selfimprove_jax.retrieval import ann
rows = np.load(sys.argv[1])
for i, tree in enumerate((100_000, 1)):
  config = ann.SearchConfig(
    num_neighbors=10, method="scann", tree_from=tree, min_recall=0.01
  )
  found = ann.find_neighbors(rows, rows, config)
  np.savez(f"{sys.argv[2]}{i}.npz", ids=found.ids_QM, scores=found.scores_QM)
"""


@pytest.mark.slow
def test_scann_gives_the_same_neighbors_in_two_processes(tmp_path):
  rows = unit_rows(8000, 32)
  np.save(tmp_path / "rows.npy", rows)
  command = [sys.executable, "-c", _SEARCH_AND_SAVE, tmp_path / "rows.npy", tmp_path / "found"]
  environment = {**os.environ, "PYTHONHASHSEED": "7"}
  subprocess.run(command, env=environment, capture_output=True, check=True)
  for i, tree_from in enumerate((100_000, 1)):
    here = search(rows, rows, 10, method="scann", tree_from=tree_from, min_recall=0.01)
    there = np.load(tmp_path / f"found{i}.npz")
    np.testing.assert_array_equal(here.ids_QM, there["ids"])
    np.testing.assert_array_equal(here.scores_QM, there["scores"])


def test_method_auto_asks_scann_only_for_large_databases(monkeypatch):
  monkeypatch.setattr(ann, "_import_scann", lambda: pytest.fail("scann was imported"))
  rows = unit_rows(50, 8)
  search(rows, rows, 3, exact_below=51)
  with pytest.raises(pytest.fail.Exception):
    search(rows, rows, 3, exact_below=50)


def test_a_missing_scann_says_what_it_needs(monkeypatch):
  monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
  rows = unit_rows(50, 8)
  with pytest.raises(ImportError, match=r"tensorflow~=2\.20"):
    search(rows, rows, 3, method="scann")
