"""Computes held-out loss over packed rows, as a mean or per document."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float64, Int64

from selfimprove_jax.data.rows import RowSource
from selfimprove_jax.data.tokenizer import Tokenizer
from selfimprove_jax.models.llama import Llama, output_head
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.training import losses


@dataclasses.dataclass(frozen=True)
class DocumentLosses:
  """Losses of each segment that has targets, in the order of rows and segments.

  Attributes:
    nll_sums: nats over the segment's target tokens.
    token_counts: number of target tokens.
    byte_counts: UTF-8 bytes of the target tokens, at least 1.
  """

  nll_sums: Float64[np.ndarray, "N"]
  token_counts: Int64[np.ndarray, "N"]
  byte_counts: Int64[np.ndarray, "N"]


class RowScorer:
  """Scores a fixed set of rows under any parameters of one model; compiles once."""

  def __init__(
    self,
    model: Llama,
    mesh: Mesh,
    source: RowSource,
    *,
    batch_size: int,
    max_rows: int | None = None,
  ) -> None:
    """Reads the rows into memory.

    Args:
      batch_size: rows per forward pass; the last batch is padded with rows that do not count.
      max_rows: reads only the first `max_rows` rows.

    Raises:
      ValueError: `batch_size` does not divide over the mesh, or no row has a target token.
    """
    if batch_size % partitioning.num_batch_shards(mesh):
      raise ValueError(
        f"batch_size={batch_size} does not divide over {partitioning.num_batch_shards(mesh)} shards"
      )
    self._mesh = mesh
    num_rows = len(source) if max_rows is None else min(max_rows, len(source))
    self._batches = [
      [source[i] for i in range(start, min(start + batch_size, num_rows))]
      for start in range(0, num_rows, batch_size)
    ]
    self._batch_size = batch_size
    if not any(row["loss_mask"].any() for rows in self._batches for row in rows):
      raise ValueError(f"there are no target tokens in the {num_rows} rows to score")

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

  def documents(self, params: Any, tokenizer: Tokenizer) -> DocumentLosses:
    """Returns the loss of every document; segments of one document in two rows count as two."""
    nll_sums, token_counts, byte_counts = [], [], []
    for row, nll_T in self._scored(params):
      for segment in range(1, int(row["segment_ids"].max()) + 1):
        targets = (row["segment_ids"] == segment) & row["loss_mask"]
        if targets.any():
          nll_sums.append(float(np.sum(nll_T, where=targets, dtype=np.float64)))
          token_counts.append(int(np.count_nonzero(targets)))
          text = tokenizer.decode(row["tokens"][targets].tolist())
          byte_counts.append(max(len(text.encode()), 1))  # a lone special token decodes to nothing
    return DocumentLosses(
      np.array(nll_sums), np.array(token_counts, np.int64), np.array(byte_counts, np.int64)
    )

  def _scored(self, params: Any) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yields every row and the negative log-likelihood of each of its tokens."""
    for rows in self._batches:
      filled = rows + rows[:1] * (self._batch_size - len(rows))
      arrays = {
        n: np.stack([row[n] for row in filled]) for n in ("tokens", "positions", "segment_ids")
      }
      batch = partitioning.whole_batch(arrays, self._mesh)
      with jax.set_mesh(self._mesh):
        nll_BT = self._nll(params, batch["tokens"], batch["positions"], batch["segment_ids"])
      yield from zip(rows, np.asarray(nll_BT))
