"""Finds nearest neighbors by inner product: exactly in blocks, or by ScaNN in large databases.

Axis letters: Q queries, C corpus (the database), E embedding, M neighbors.

Rows have length 1, or are all zeros (a document with nothing to embed, at similarity 0 to all).
Both methods report scores of a float64 product rounded to float32, so methods and numbers of
threads differ only in which neighbors they find.
"""

import dataclasses
from types import ModuleType
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from selfimprove_jax.runtime.config import section

NO_NEIGHBOR = -1
_NORM_TOLERANCE = 1e-3
_LARGEST_ID = 2**32 - 2  # ids share an int64 with 32 bits of the score
_NOTHING = np.iinfo(np.int64).max  # sorts after every neighbor
_EXACT_BLOCK = 512
_RESCORE_BLOCK = 256


@section
class SearchConfig:
  """Nearest-neighbor search (SBP's first step; the paper uses ScaNN).

  Attributes:
    num_neighbors: neighbors per query.
    method: "auto" searches exactly in a database of fewer than `exact_below` rows.
    tree_from: ScaNN partitions databases of at least this many rows into about sqrt(C) leaves.
    searched_share: share of the leaves that ScaNN searches for each query (at least 10 leaves).
      Raise it if `measure_recall` is too low; the time grows in proportion.
  """

  num_neighbors: Annotated[int, Field(ge=1)]
  method: Literal["auto", "exact", "scann"] = "auto"
  exact_below: Annotated[int, Field(ge=0)] = 20_000
  tree_from: Annotated[int, Field(ge=0)] = 100_000
  searched_share: Annotated[float, Field(gt=0, le=1)] = 0.1


@dataclasses.dataclass(frozen=True)
class Neighbors:
  """Neighbors of each query, nearest first, ties in the order of ids.

  Attributes:
    ids_QM: rows of the database; -1, always last, where fewer than M were found.
    scores_QM: inner products; -inf where the id is -1.
  """

  ids_QM: Int[np.ndarray, "Q M"]
  scores_QM: Float[np.ndarray, "Q M"]


def find_neighbors(
  database_CE: Float[np.ndarray, "C E"],
  queries_QE: Float[np.ndarray, "Q E"],
  config: SearchConfig,
) -> Neighbors:
  """Finds the neighbors of each query; a query that is a row of the database finds itself too.

  Raises:
    ValueError: there are fewer rows than neighbors wanted, or a row has a length other than 1 or 0
      (the message says which).
    ImportError: ScaNN is needed and cannot be imported.
  """
  _check(database_CE, queries_QE, config.num_neighbors)
  if config.method == "exact" or (
    config.method == "auto" and len(database_CE) < config.exact_below
  ):
    return exact_neighbors(database_CE, queries_QE, config.num_neighbors)
  return _scann_neighbors(database_CE, queries_QE, config)


def exact_neighbors(
  database_CE: Float[np.ndarray, "C E"],
  queries_QE: Float[np.ndarray, "Q E"],
  num_neighbors: int,
) -> Neighbors:
  """Searches the whole database, one block x block product at a time."""
  found_QM = np.empty((len(queries_QE), num_neighbors), np.int64)
  for q in range(0, len(queries_QE), _EXACT_BLOCK):
    queries_qE = queries_QE[q : q + _EXACT_BLOCK].astype(np.float64)
    best_qM = np.full((len(queries_qE), num_neighbors), _NOTHING)
    for c in range(0, len(database_CE), _EXACT_BLOCK):
      database_cE = database_CE[c : c + _EXACT_BLOCK].astype(np.float64)
      ids_1c = np.arange(c, c + len(database_cE))[None, :]
      keys_qc = _keys((queries_qE @ database_cE.T).astype(np.float32), ids_1c)
      candidates_qn = np.concatenate([best_qM, keys_qc], axis=1)
      best_qM = np.partition(candidates_qn, num_neighbors - 1, axis=1)[:, :num_neighbors]
    found_QM[q : q + _EXACT_BLOCK] = best_qM
  return _from_keys(found_QM)


def _scann_neighbors(
  database_CE: Float[np.ndarray, "C E"],
  queries_QE: Float[np.ndarray, "Q E"],
  config: SearchConfig,
) -> Neighbors:
  """Searches by asymmetric hashing, then scores the best candidates exactly.

  Gives the same neighbors in every process, with any number of threads.
  """
  num_rows, dim = database_CE.shape
  database_CE = np.ascontiguousarray(database_CE, np.float32)
  builder = _import_scann().builder(database_CE, config.num_neighbors, "dot_product")
  if num_rows >= config.tree_from:
    num_leaves = round(num_rows**0.5)
    builder = builder.tree(
      num_leaves,
      min(num_leaves, max(10, round(config.searched_share * num_leaves))),
      training_sample_size=min(num_rows, 100_000),
      random_init=False,  # k-means++: with random centers, the default, two builds differ
    )
  # ScaNN's fast path takes at most 256 blocks; 0.2 is its threshold for unit vectors.
  builder = builder.score_ah(2 if dim <= 512 else 4, anisotropic_quantization_threshold=0.2)
  searcher = builder.reorder(max(100, 10 * config.num_neighbors)).build()
  ids_QM, approximate_QM = searcher.search_batched_parallel(
    np.ascontiguousarray(queries_QE, np.float32)
  )
  # If the searched leaves hold too few rows, ScaNN fills the missing places with NaN scores.
  ids_QM = np.where(np.isnan(approximate_QM), NO_NEIGHBOR, ids_QM.astype(np.int64))
  # ScaNN sums its float32 scores in an order of its own; score again as exact search does.
  keys_QM = np.empty(ids_QM.shape, np.int64)
  for q in range(0, len(ids_QM), _RESCORE_BLOCK):
    ids_qM = ids_QM[q : q + _RESCORE_BLOCK]
    queries_qE = queries_QE[q : q + _RESCORE_BLOCK]
    scores_qM = np.einsum("qE,qME->qM", queries_qE, database_CE[ids_qM], dtype=np.float64)
    keys_QM[q : q + _RESCORE_BLOCK] = _keys(scores_qM.astype(np.float32), ids_qM)
  return _from_keys(keys_QM)


def recall_at_k(found: Neighbors, exact: Neighbors) -> tuple[float, float]:
  """Returns the mean share of the exact neighbors that were found, and its standard error.

  Raises:
    ValueError: the two have different shapes, or fewer than two queries.
  """
  if found.ids_QM.shape != exact.ids_QM.shape or len(exact.ids_QM) < 2:
    raise ValueError(
      f"recall needs the same 2 or more queries in both; found has {found.ids_QM.shape}, exact "
      f"{exact.ids_QM.shape}"
    )
  hit_QMM = exact.ids_QM[:, :, None] == found.ids_QM[:, None, :]
  share_Q = hit_QMM.any(2).mean(1)
  return float(share_Q.mean()), float(share_Q.std(ddof=1) / len(share_Q) ** 0.5)


def measure_recall(
  database_CE: Float[np.ndarray, "C E"],
  queries_QE: Float[np.ndarray, "Q E"],
  found: Neighbors,
  *,
  sample_size: int,
  seed: int,
) -> tuple[float, float]:
  """Estimates `recall_at_k` by searching exactly for a random sample of the queries."""
  rows = np.random.default_rng(seed).permutation(len(queries_QE))[:sample_size]
  exact = exact_neighbors(database_CE, queries_QE[rows], found.ids_QM.shape[1])
  return recall_at_k(Neighbors(found.ids_QM[rows], found.scores_QM[rows]), exact)


def _check(database_CE: np.ndarray, queries_QE: np.ndarray, num_neighbors: int) -> None:
  if not num_neighbors <= len(database_CE) <= _LARGEST_ID:
    raise ValueError(
      f"num_neighbors={num_neighbors} does not fit a database of {len(database_CE)} rows"
    )
  for name, rows_CE in (("database", database_CE), ("queries", queries_QE)):
    norms_C = np.sqrt(np.einsum("CE,CE->C", rows_CE, rows_CE, dtype=np.float64))
    good_C = (np.abs(norms_C - 1) <= _NORM_TOLERANCE) | (norms_C == 0)
    if not good_C.all():
      row = int(np.argmin(good_C))
      raise ValueError(f"row {row} of the {name} has length {norms_C[row]}; it must be 1 or 0")


def _import_scann() -> ModuleType:
  try:
    from scann.scann_ops.py import scann_ops_pybind
  except Exception as error:  # TensorFlow raises its own error class if the versions do not match
    raise ImportError(
      "scann cannot be imported; it needs tensorflow~=2.20.0 (2.21 breaks it). "
      "Install both, or search with method='exact'."
    ) from error
  return scann_ops_pybind


# A key is a neighbor as one int64 that sorts by falling score, then by rising id: the upper half
# holds the bits of the negated score, the lower half the id. One integer sort then breaks ties the
# same way everywhere, which a sort by float scores alone would not.


def _keys(scores: np.ndarray, ids: np.ndarray) -> Int[np.ndarray, "..."]:
  bits = (np.float32(0) - scores).view(np.int32)  # 0 - x, not -x: a zero must not become -0.0
  keys = _flip_negative(bits).astype(np.int64)
  keys <<= 32
  keys |= ids
  keys[np.broadcast_to(ids == NO_NEIGHBOR, keys.shape)] = _NOTHING
  return keys


def _from_keys(keys_QM: Int[np.ndarray, "Q M"]) -> Neighbors:
  keys_QM = np.sort(keys_QM, axis=1)
  is_nothing = keys_QM == _NOTHING
  bits = _flip_negative((keys_QM >> 32).astype(np.int32))
  scores_QM = np.where(is_nothing, -np.inf, np.float32(0) - bits.view(np.float32))
  ids_QM = np.where(is_nothing, NO_NEIGHBOR, keys_QM & 0xFFFFFFFF)
  return Neighbors(ids_QM, scores_QM.astype(np.float32))


def _flip_negative(bits: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
  """Maps float bits to integers that sort like the floats; it is its own inverse.

  Negative IEEE floats sort in reverse as integers: flipping all but their sign bit reverses them.
  """
  return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
