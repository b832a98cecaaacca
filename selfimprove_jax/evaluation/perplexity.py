"""Computes held-out loss over packed rows, as a mean or per document."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64, Int64

from selfimprove_jax.data.rows import LabeledRows, Segment
from selfimprove_jax.models.llama import Llama, output_head
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.training import losses


@dataclasses.dataclass(frozen=True)
class DocumentLosses:
  """Loss of each document that has targets, in the order of their first segments.

  Attributes:
    groups: documents of one group are not independent.
    nll_sums: nats over the document's target tokens.
    byte_counts: UTF-8 bytes of the text predicted, at least 1. The first token of a piece is not
      predicted; the bytes of a document in pieces are reduced by its share of such tokens.
  """

  ids: Sequence[str]
  groups: Sequence[str]
  nll_sums: Float64[np.ndarray, "N"]
  token_counts: Int64[np.ndarray, "N"]
  byte_counts: Float64[np.ndarray, "N"]


class RowScorer:
  """Scores a fixed set of rows under any parameters of one model; compiles once."""

  def __init__(
    self,
    model: Llama,
    mesh: Mesh,
    labeled: LabeledRows,
    *,
    batch_size: int,
    max_rows: int | None = None,
  ) -> None:
    """Reads the rows into memory.

    Args:
      batch_size: rows per forward pass, a multiple of the mesh's batch shards.
      max_rows: reads only this many rows, in turn from each group.
    """
    if batch_size % (num_shards := partitioning.num_batch_shards(mesh)):
      raise ValueError(f"batch_size={batch_size} does not divide over {num_shards} shards")
    self._mesh = mesh
    chosen = _spread(labeled, len(labeled.source) if max_rows is None else max_rows)
    self._rows = [labeled.source[i] for i in chosen]
    self._batch_size = batch_size
    of_row = collections.defaultdict(list)
    for segment in labeled.segments:
      of_row[segment.row].append(segment)
    self._segments = [of_row[i] for i in chosen]
    if not any(row["loss_mask"].any() for row in self._rows):
      raise ValueError(f"there are no target tokens in the {len(chosen)} rows to score")

    def nll(
      params: Any, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
      with partitioning.axis_rules():
        hidden_BTD, _ = model.apply(
          {"params": params}, tokens_BT, positions_BT, segment_ids_BT, logits=False
        )
      return losses.next_token_nll(hidden_BTD, output_head(params), tokens_BT)

    self._nll = jax.jit(nll, out_shardings=partitioning.replicated(mesh))

  def mean(self, params: Any) -> float:
    """Returns nats per target token over all rows."""
    total, count = 0.0, 0
    for row, nll_T in self._scored(params):
      total += float(np.sum(nll_T, where=row["loss_mask"], dtype=np.float64))
      count += int(np.count_nonzero(row["loss_mask"]))
    return total / count

  def documents(self, params: Any) -> DocumentLosses:
    """Returns the loss of every document; the pieces of one document are added up."""
    nats: dict[str, float] = {}
    counts: dict[str, int] = {}
    found: dict[str, Segment] = {}
    for segments, (row, nll_T) in zip(self._segments, self._scored(params), strict=True):
      for number, segment in enumerate(segments, 1):
        targets = (row["segment_ids"] == number) & row["loss_mask"]
        if targets.any():
          found.setdefault(segment.id, segment)
          nll = float(np.sum(nll_T, where=targets, dtype=np.float64))
          nats[segment.id] = nats.get(segment.id, 0.0) + nll
          counts[segment.id] = counts.get(segment.id, 0) + int(np.count_nonzero(targets))
    shares = [counts[id_] / segment.num_targets for id_, segment in found.items()]
    num_bytes = np.array([segment.num_bytes for segment in found.values()], np.float64)
    return DocumentLosses(
      ids=list(found),
      groups=[segment.group for segment in found.values()],
      nll_sums=np.array(list(nats.values())),
      token_counts=np.array(list(counts.values()), np.int64),
      byte_counts=np.maximum(num_bytes * shares, 1.0),  # a document may be empty
    )

  def _scored(self, params: Any) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yields every row and the negative log-likelihood of each of its tokens."""
    for start in range(0, len(self._rows), self._batch_size):
      rows = self._rows[start : start + self._batch_size]
      filled = rows + rows[:1] * (self._batch_size - len(rows))  # one shape for every batch
      arrays = {
        n: np.stack([row[n] for row in filled]) for n in ("tokens", "positions", "segment_ids")
      }
      batch = partitioning.whole_batch(arrays, self._mesh)
      with jax.set_mesh(self._mesh):
        nll_BT = self._nll(params, batch["tokens"], batch["positions"], batch["segment_ids"])
      yield from zip(rows, np.asarray(nll_BT))


def _spread(labeled: LabeledRows, num_rows: int) -> list[int]:
  """Chooses rows, in turn from each group of documents; a row is of its first document's group."""
  if num_rows >= len(labeled.source):
    return list(range(len(labeled.source)))
  groups: dict[int, str] = {}
  for segment in labeled.segments:
    groups.setdefault(segment.row, segment.group)
  seen: collections.Counter[str] = collections.Counter()
  order = []
  for row, group in sorted(groups.items()):
    order.append((seen[group], row))
    seen[group] += 1
  return sorted(row for _, row in sorted(order)[:num_rows])
