"""Nearest neighbours by inner product: exact in blocks, ScaNN for large databases.

Axis letters: Q queries, C corpus (the database), E embedding, M neighbours.

Rows have length 1, or are all zeros (a document with nothing to embed, at similarity 0 to all).
Scores are those of a float64 product, rounded to float32, whichever method found the neighbour, so
methods, shards and numbers of threads differ only in which neighbours they find.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

NO_NEIGHBOR = -1
_NORM_TOLERANCE = 1e-3
_LARGEST_ID = 2**32 - 2
_NOTHING = np.iinfo(np.int64).max  # sorts after every neighbour


@dataclasses.dataclass(frozen=True)
class Neighbors:
  """For each query its neighbours, nearest first; equal scores in the order of their ids.

  Attributes:
    ids_QM: Rows of the database; -1 where fewer than M were found, always last.
    scores_QM: Inner products; -inf where the id is -1.
  """

  ids_QM: Int[np.ndarray, "Q M"]
  scores_QM: Float[np.ndarray, "Q M"]


def find_neighbors(
  database_CE: Float[np.ndarray, "C E"],
  queries_QE: Float[np.ndarray, "Q E"],
  *,
  num_neighbors: int,
  method: str = "auto",
  exact_below: int = 20_000,
) -> Neighbors:
  """The neighbours of each query (SBP's first step; the paper uses ScaNN).

  Where the queries are the database itself, each finds itself: ask for one more.

  Args:
    method: "exact", "scann", or "auto": exact for a database of fewer than `exact_below` rows.

  Raises:
    ValueError: an unknown method, more neighbours than rows, or a row that is neither of length 1
      nor zero (the message says which).
    ImportError: ScaNN is needed and can't be imported.
  """
  if method not in ("auto", "exact", "scann"):
    raise ValueError(f"method={method!r}: one of 'auto', 'exact', 'scann'")
  if method == "exact" or (method == "auto" and len(database_CE) < exact_below):
    return exact_neighbors(database_CE, queries_QE, num_neighbors=num_neighbors)
  return scann_neighbors(database_CE, queries_QE, num_neighbors=num_neighbors)


def exact_neighbors(
  database_CE: Float[np.ndarray, "C E"],
  queries_QE: Float[np.ndarray, "Q E"],
  *,
  num_neighbors: int,
  block: int = 512,
) -> Neighbors:
  """The nearest rows of the whole database, `block` x `block` inner products at a time.

  Raises:
    ValueError: see `find_neighbors`.
  """
  _check(database_CE, queries_QE, num_neighbors)
  found_QM = np.empty((len(queries_QE), num_neighbors), np.int64)
  for q in range(0, len(queries_QE), block):
    queries_qE = queries_QE[q : q + block].astype(np.float64)
    best_qM = np.full((len(queries_qE), num_neighbors), _NOTHING)
    for c in range(0, len(database_CE), block):
      database_cE = database_CE[c : c + block].astype(np.float64)
      ids_c = np.arange(c, c + len(database_cE))
      keys_qc = _keys((queries_qE @ database_cE.T).astype(np.float32), ids_c[None, :])
      best_qM = _smallest(np.concatenate([best_qM, keys_qc], axis=1), num_neighbors)
    found_QM[q : q + block] = best_qM
  return _from_keys(found_QM)


def scann_neighbors(
  database_CE: Float[np.ndarray, "C E"],
  queries_QE: Float[np.ndarray, "Q E"],
  *,
  num_neighbors: int,
  tree_from: int = 100_000,
  searched_share: float = 0.1,
) -> Neighbors:
  """Approximate neighbours by ScaNN: asymmetric hashing, then exact scores of the best candidates.

  The same arguments give the same neighbours in every process, with any number of threads. That
  holds because the tree starts from k-means++ (with ScaNN's default, random centres, two builds
  differ) and because the scores are computed again here.

  Args:
    tree_from: Databases of at least this many rows are partitioned into about sqrt(C) leaves.
    searched_share: Of the leaves, how many each query looks into (at least 10). Raise it where
      `measure_recall` is too low; the time grows in proportion.

  Raises:
    ValueError: see `find_neighbors`.
    ImportError: `scann` can't be imported.
  """
  _check(database_CE, queries_QE, num_neighbors)
  num_rows, dim = database_CE.shape
  database_CE = np.ascontiguousarray(database_CE, np.float32)
  builder = _import_scann().builder(database_CE, num_neighbors, "dot_product")
  if num_rows >= tree_from:
    num_leaves = round(num_rows**0.5)
    builder = builder.tree(
      num_leaves,
      min(num_leaves, max(10, round(searched_share * num_leaves))),
      training_sample_size=min(num_rows, 100_000),
      random_init=False,
    )
  # ScaNN's fast path takes at most 256 blocks; 0.2 is its threshold for unit vectors.
  builder = builder.score_ah(2 if dim <= 512 else 4, anisotropic_quantization_threshold=0.2)
  searcher = builder.reorder(max(100, 10 * num_neighbors)).build()
  ids_QM, approximate_QM = searcher.search_batched_parallel(
    np.ascontiguousarray(queries_QE, np.float32)
  )
  # Leaves with fewer rows than were asked for leave places, which ScaNN fills with NaN scores.
  ids_QM = np.where(np.isnan(approximate_QM), NO_NEIGHBOR, ids_QM.astype(np.int64))
  return _rescored(database_CE, queries_QE, ids_QM)


def merge_neighbors(parts: Sequence[Neighbors], num_neighbors: int) -> Neighbors:
  """The nearest of several searches of the same queries in different shards of a database.

  Args:
    parts: With ids that are rows of the whole database (add each shard's first row, not to -1).

  Raises:
    ValueError: no parts, parts of different queries, or fewer neighbours in all than asked for.
  """
  if not parts or len({len(part.ids_QM) for part in parts}) != 1:
    raise ValueError(f"cannot merge neighbours of {[len(part.ids_QM) for part in parts]} queries")
  available = sum(part.ids_QM.shape[1] for part in parts)
  if not 1 <= num_neighbors <= available:
    raise ValueError(f"num_neighbors={num_neighbors}: the parts hold {available} a query")
  keys = [_keys(part.scores_QM, part.ids_QM) for part in parts]
  return _from_keys(_smallest(np.concatenate(keys, axis=1), num_neighbors))


def recall_at_k(found: Neighbors, exact: Neighbors) -> tuple[float, float]:
  """Mean over queries of the share of the exact neighbours that were found, and its standard error.

  Raises:
    ValueError: the two have different shapes, or fewer than two queries.
  """
  if found.ids_QM.shape != exact.ids_QM.shape or len(exact.ids_QM) < 2:
    raise ValueError(
      f"recall compares the same 2 or more queries; found is {found.ids_QM.shape}, exact "
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
  """`recall_at_k` of `found` on a random sample of its queries, which are searched exactly."""
  rows = np.random.default_rng(seed).permutation(len(queries_QE))[:sample_size]
  exact = exact_neighbors(database_CE, queries_QE[rows], num_neighbors=found.ids_QM.shape[1])
  return recall_at_k(Neighbors(found.ids_QM[rows], found.scores_QM[rows]), exact)


def _check(database_CE: np.ndarray, queries_QE: np.ndarray, num_neighbors: int) -> None:
  if not 1 <= num_neighbors <= len(database_CE) <= _LARGEST_ID:
    raise ValueError(f"num_neighbors={num_neighbors} of a database of {len(database_CE)} rows")
  for name, rows_CE in (("database", database_CE), ("queries", queries_QE)):
    norms_C = np.sqrt(np.einsum("CE,CE->C", rows_CE, rows_CE, dtype=np.float64))
    good_C = (np.abs(norms_C - 1) <= _NORM_TOLERANCE) | (norms_C == 0)
    if not good_C.all():
      row = int(np.argmin(good_C))
      raise ValueError(f"row {row} of the {name} has length {norms_C[row]}; it must be 1 (or 0)")


def _import_scann() -> Any:
  try:
    from scann.scann_ops.py import scann_ops_pybind
  except Exception as error:  # tensorflow's own error class where the versions do not fit
    raise ImportError(
      "scann could not be imported; it needs tensorflow~=2.20.0 beside it (2.21 breaks it). "
      "Install both, or search with method='exact'."
    ) from error
  return scann_ops_pybind


def _rescored(
  database_CE: np.ndarray, queries_QE: np.ndarray, ids_QM: Int[np.ndarray, "Q M"], block: int = 256
) -> Neighbors:
  keys_QM = np.empty(ids_QM.shape, np.int64)
  for q in range(0, len(ids_QM), block):
    ids_qM = ids_QM[q : q + block]
    scores_qM = np.einsum(
      "qE,qME->qM", queries_QE[q : q + block], database_CE[ids_qM], dtype=np.float64
    )
    keys_QM[q : q + block] = _keys(scores_qM.astype(np.float32), ids_qM)
  return _from_keys(np.sort(keys_QM, axis=1))


# A neighbour as one integer that sorts by falling score, then by rising id: the score's bits, made
# to sort as the score does, in the upper half, and the id in the lower.


def _keys(scores: np.ndarray, ids: np.ndarray) -> Int[np.ndarray, "..."]:
  bits = (np.float32(0) - scores).view(np.int32)  # 0 - x, not -x: a zero must not become -0.0
  keys = _flip_negative(bits).astype(np.int64)
  keys <<= 32
  keys |= ids
  keys[np.broadcast_to(ids == NO_NEIGHBOR, keys.shape)] = _NOTHING
  return keys


def _from_keys(keys_QM: Int[np.ndarray, "Q M"]) -> Neighbors:
  is_nothing = keys_QM == _NOTHING
  bits = _flip_negative((keys_QM >> 32).astype(np.int32))
  return Neighbors(
    ids_QM=np.where(is_nothing, NO_NEIGHBOR, keys_QM & 0xFFFFFFFF),
    scores_QM=np.where(is_nothing, -np.inf, np.float32(0) - bits.view(np.float32)).astype(
      np.float32
    ),
  )


def _flip_negative(bits: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
  return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def _smallest(keys_qn: Int[np.ndarray, "q n"], num: int) -> Int[np.ndarray, "q M"]:
  return np.sort(np.partition(keys_qn, num - 1, axis=1)[:, :num], axis=1)
