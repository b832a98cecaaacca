"""Finds nearest neighbors by inner product: exactly in blocks, or by ScaNN in large databases.

Axis letters: Q queries, C corpus (the database), E embedding, M neighbors.

Rows have length 1, or are all zeros (a document with nothing to embed, at similarity 0 to all).
Both methods report float64 products rounded to float32, so scores depend neither on the method nor
on the number of threads.
"""

import dataclasses
import logging
from types import ModuleType
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from selfimprove_jax.runtime.config import section

_logger = logging.getLogger(__name__)

NO_NEIGHBOR = -1
_NORM_TOLERANCE = 1e-3
_LARGEST_ID = 2**32 - 2  # ids share an int64 with 32 bits of the score
_NOTHING = np.iinfo(np.int64).max  # sorts after every neighbor
_EXACT_BLOCK = 512
_RESCORE_BLOCK = 256
_FEWEST_LEAVES = 10
_RECALL_SAMPLE = 200


@section
class SearchConfig:
  """Configures nearest-neighbor search (SBP's first step; the paper uses ScaNN).

  Attributes:
    method: "auto" searches databases of fewer than `exact_below` rows exactly.
    tree_from: ScaNN partitions databases of at least this many rows into about sqrt(C) leaves.
    min_recall: ScaNN searches as many leaves as it takes to find this share of the exact neighbors
      of a sample of the queries. If all leaves are not enough, the search is exact.
  """

  num_neighbors: Annotated[int, Field(ge=1)]
  method: Literal["auto", "exact", "scann"] = "auto"
  exact_below: Annotated[int, Field(ge=0)] = 20_000
  tree_from: Annotated[int, Field(ge=0)] = 100_000
  min_recall: Annotated[float, Field(gt=0, le=1)] = 0.9


@dataclasses.dataclass(frozen=True)
class Neighbors:
  """Neighbors of each query, nearest first, ties in the order of ids.

  Attributes:
    ids_QM: rows of the database; -1, always last, where fewer than M were found.
    scores_QM: inner products; -inf where the id is -1.
    method: how they were found, in words.
  """

  ids_QM: Int[np.ndarray, "Q M"]
  scores_QM: Float[np.ndarray, "Q M"]
  method: str = "exact"


def find_neighbors(
  database_CE: Float[np.ndarray, "C E"], queries_QE: Float[np.ndarray, "Q E"], config: SearchConfig
) -> Neighbors:
  """Finds the neighbors of each query; a query that is a row of the database finds itself too.

  Raises:
    ValueError: there are fewer rows than `num_neighbors`, or a row has a length other than 1 or 0.
    ImportError: ScaNN is needed and cannot be imported.
  """
  _check(database_CE, queries_QE, config.num_neighbors)
  is_small = len(database_CE) < config.exact_below
  if config.method == "exact" or (config.method == "auto" and is_small):
    return exact_neighbors(database_CE, queries_QE, config.num_neighbors)
  return _scann_neighbors(database_CE, queries_QE, config)


def exact_neighbors(
  database_CE: Float[np.ndarray, "C E"], queries_QE: Float[np.ndarray, "Q E"], num_neighbors: int
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
  database_CE: Float[np.ndarray, "C E"], queries_QE: Float[np.ndarray, "Q E"], config: SearchConfig
) -> Neighbors:
  """Searches by asymmetric hashing, then scores the best candidates exactly.

  Gives the same neighbors in every process, with any number of threads.
  """
  num_rows, dim = database_CE.shape
  database_CE = np.ascontiguousarray(database_CE, np.float32)
  builder = _import_scann().builder(database_CE, config.num_neighbors, "dot_product")
  num_leaves = round(num_rows**0.5) if num_rows >= config.tree_from else 1
  if num_leaves > 1:
    builder = builder.tree(
      num_leaves,
      min(num_leaves, _FEWEST_LEAVES),
      training_sample_size=min(num_rows, 100_000),
      random_init=False,  # k-means++: with random centers, the default, two builds differ
    )
  # ScaNN's fast path takes at most 256 blocks; 0.2 is its threshold for unit vectors.
  builder = builder.score_ah(2 if dim <= 512 else 4, anisotropic_quantization_threshold=0.2)
  searcher = builder.reorder(max(100, 10 * config.num_neighbors)).build()

  def search(rows_QE: np.ndarray, leaves: int) -> Neighbors:
    options = {"leaves_to_search": leaves} if num_leaves > 1 else {}
    ids_QM, scores_QM = searcher.search_batched_parallel(
      np.ascontiguousarray(rows_QE, np.float32), **options
    )
    # If the searched leaves hold too few rows, ScaNN pads the result with NaN scores.
    ids_QM = np.where(np.isnan(scores_QM), NO_NEIGHBOR, ids_QM.astype(np.int64))
    return _rescored(database_CE, rows_QE, ids_QM)

  sample = np.linspace(0, len(queries_QE) - 1, min(len(queries_QE), _RECALL_SAMPLE)).round()
  sample_QE = queries_QE[sample.astype(int)]
  exact = exact_neighbors(database_CE, sample_QE, config.num_neighbors)
  leaves = min(num_leaves, _FEWEST_LEAVES)
  while (recall := _recall_by_score(search(sample_QE, leaves), exact)) < config.min_recall:
    if leaves == num_leaves:
      method = f"exact, because ScaNN's recall in all leaves was {recall:.2f}"
      _logger.warning("min_recall=%g: the search is %s", config.min_recall, method)
      found = exact_neighbors(database_CE, queries_QE, config.num_neighbors)
      return dataclasses.replace(found, method=method)
    leaves = min(2 * leaves, num_leaves)
  method = f"ScaNN, {leaves} of {num_leaves} leaves" if num_leaves > 1 else "ScaNN without a tree"
  return dataclasses.replace(search(queries_QE, leaves), method=method)


def _rescored(
  database_CE: np.ndarray, queries_QE: np.ndarray, ids_QM: Int[np.ndarray, "Q M"]
) -> Neighbors:
  """Scores candidates as exact search does; ScaNN sums float32 scores in an order of its own."""
  keys_QM = np.empty(ids_QM.shape, np.int64)
  for q in range(0, len(ids_QM), _RESCORE_BLOCK):
    ids_qM = ids_QM[q : q + _RESCORE_BLOCK]
    queries_qE = queries_QE[q : q + _RESCORE_BLOCK]
    scores_qM = np.einsum("qE,qME->qM", queries_qE, database_CE[ids_qM], dtype=np.float64)
    keys_QM[q : q + _RESCORE_BLOCK] = _keys(scores_qM.astype(np.float32), ids_qM)
  return _from_keys(keys_QM)


def _recall_by_score(found: Neighbors, exact: Neighbors) -> float:
  """Returns the share of places filled as well as by exact search; equals count."""
  return float((found.scores_QM >= exact.scores_QM[:, -1:]).mean())


def recall_at_k(found: Neighbors, exact: Neighbors) -> Float[np.ndarray, "Q"]:
  """Returns the share of the exact neighbors that were found, for each query."""
  if found.ids_QM.shape != exact.ids_QM.shape or len(exact.ids_QM) < 1:
    raise ValueError(
      f"recall needs the same queries in both; found has {found.ids_QM.shape}, exact "
      f"{exact.ids_QM.shape}"
    )
  hit_QMM = exact.ids_QM[:, :, None] == found.ids_QM[:, None, :]
  return hit_QMM.any(2).mean(1)


def measure_recall(
  database_CE: Float[np.ndarray, "C E"],
  queries_QE: Float[np.ndarray, "Q E"],
  found: Neighbors,
  *,
  sample_size: int,
  seed: int,
) -> tuple[Int[np.ndarray, "S"], Float[np.ndarray, "S"]]:
  """Returns a random sample of the queries and their `recall_at_k`, by searching exactly."""
  rows = np.random.default_rng(seed).permutation(len(queries_QE))[:sample_size]
  exact = exact_neighbors(database_CE, queries_QE[rows], found.ids_QM.shape[1])
  return rows, recall_at_k(Neighbors(found.ids_QM[rows], found.scores_QM[rows]), exact)


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
# holds the bits of the negated score, the lower half the id. So one integer sort breaks ties by id,
# which `np.partition` of float scores would not.


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
  """Maps float bits to integers that sort like the floats; it is its own inverse."""
  # Negative IEEE floats sort in reverse as integers: flipping all but their sign bit reverses them.
  return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
