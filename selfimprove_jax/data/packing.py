"""Token sequences -> rows of one length that hold several segments each.

A segment (a document, a pair, or a piece of one) never sees another: its positions restart at 0,
and attention takes `segment_ids`. `loss_mask` marks the tokens that are predicted from what stands
before them in their segment, so the first token of a segment never is.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Integer

from selfimprove_jax.data import tokenizer as tokenizer_lib

Row = dict[str, Int32[np.ndarray, "T"] | Bool[np.ndarray, "T"]]
"""int32 tokens, positions (0.. in a segment), segment_ids (1.., 0 is padding); bool loss_mask."""

Batch = dict[str, Int32[np.ndarray, "B T"] | Bool[np.ndarray, "B T"]]
"""Rows, stacked."""


@dataclasses.dataclass(frozen=True)
class Example:
  """One sequence to train on, and which of its tokens are predicted (never the first)."""

  tokens: Sequence[int] | Int32[np.ndarray, "N"]
  loss_mask: Sequence[bool] | Bool[np.ndarray, "N"]


def document_example(ids: Sequence[int], tokenizer: tokenizer_lib.Tokenizer) -> Example:
  """BOS document EOS, with loss on all but BOS."""
  tokens = np.empty(len(ids) + 2, np.int32)
  tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
  loss_mask = np.ones(len(tokens), bool)
  loss_mask[0] = False
  return Example(tokens, loss_mask)


def pair_example(
  d1_ids: Sequence[int], d2_ids: Sequence[int], tokenizer: tokenizer_lib.Tokenizer
) -> Example:
  """BOS d1 SEP d2 EOS, with loss on d2 and its EOS (SBP, synthesizer-tuning; arXiv 2509.15248)."""
  tokens = [tokenizer.bos_id, *d1_ids, tokenizer.sep_id, *d2_ids, tokenizer.eos_id]
  loss_mask = np.ones(len(tokens), bool)
  loss_mask[: len(d1_ids) + 2] = False
  return Example(np.array(tokens, np.int32), loss_mask)


def pack(
  examples: Iterable[Example],
  *,
  seq_len: int,
  pad_id: int,
  num_open_rows: int = 32,
  split_long: bool = True,
) -> Iterator[Row]:
  """Packs a stream of examples, best fit first, into rows of `seq_len` tokens.

  An example goes to the open row that it fills best; where none has room, the fullest is given
  out and a new one begun. So an example waits for others only as long as its row is open.

  Args:
    num_open_rows: More waste less padding; 1 keeps the order of the examples.
    split_long: Cut a longer example into consecutive pieces, each a segment of its own, whose
      first token is not predicted; a last piece of one token, with nothing to predict, is left
      out. False refuses it instead.

  Raises:
    ValueError: an example is empty, its mask is of another length, or it is too long while
      `split_long` is False; or `seq_len` is below 2.
  """
  if seq_len < 2 or num_open_rows < 1:
    raise ValueError(f"seq_len is {seq_len} (at least 2), num_open_rows {num_open_rows} (1)")
  open_rows: list[_OpenRow] = []  # the fullest first, of equally full ones the oldest
  for number, (tokens, loss_mask) in enumerate(_pieces(examples, seq_len, split_long)):
    best = bisect.bisect_left(open_rows, len(tokens), key=_free)
    if best < len(open_rows):
      row = open_rows.pop(best)
    else:
      if len(open_rows) == num_open_rows:
        yield open_rows.pop(0).arrays
      row = _OpenRow(seq_len, pad_id, number)
    row.add(tokens, loss_mask)
    if row.free < 2:  # no segment is shorter
      yield row.arrays
    else:
      bisect.insort(open_rows, row, key=_free_and_age)
  for row in sorted(open_rows, key=_age):
    yield row.arrays


def layout(
  lengths: Sequence[Integer[np.ndarray, "_"]], seq_len: int
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
  """Positions and segment ids of rows whose segments are so long; what is left is padding."""
  num_parts = np.array([len(row) + 1 for row in lengths])  # the last is padding, maybe of no token
  last = np.cumsum(num_parts) - 1
  first = last + 1 - num_parts
  sizes = np.zeros(num_parts.sum(), np.int64)
  ids = np.arange(1, len(sizes) + 1) - np.repeat(first, num_parts)
  ids[last] = 0
  sizes[ids > 0] = np.concatenate(lengths)
  sizes[last] = seq_len - np.add.reduceat(sizes, first)
  starts = np.cumsum(sizes) - sizes
  segment_ids = np.repeat(ids.astype(np.int32), sizes)
  positions = np.arange(len(segment_ids), dtype=np.int32)
  positions -= np.repeat(starts.astype(np.int32), sizes)
  positions *= segment_ids > 0
  return positions.reshape(-1, seq_len), segment_ids.reshape(-1, seq_len)


def row_counts(row: Row) -> dict[str, int]:
  """Of one row: records (1), tokens, targets (predicted tokens) and padding."""
  tokens = int(np.count_nonzero(row["segment_ids"]))
  return {
    "records": 1,
    "tokens": tokens,
    "targets": int(np.count_nonzero(row["loss_mask"])),
    "padding": len(row["tokens"]) - tokens,
  }


def _pieces(
  examples: Iterable[Example], seq_len: int, split_long: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for index, example in enumerate(examples):
    tokens = np.asarray(example.tokens, np.int32)
    loss_mask = np.asarray(example.loss_mask, bool)
    if not len(tokens) or len(tokens) != len(loss_mask):
      raise ValueError(
        f"example {index} has {len(tokens)} tokens and a loss mask of {len(loss_mask)}; they must "
        f"be as many, and not none"
      )
    if len(tokens) > seq_len and not split_long:
      raise ValueError(
        f"example {index} has {len(tokens)} tokens, a row {seq_len}: shorten it or raise seq_len"
      )
    for start in range(0, len(tokens), seq_len):
      piece = slice(start, start + seq_len)
      if len(tokens[piece]) > 1:
        yield tokens[piece], loss_mask[piece]


class _OpenRow:
  """A row with room left."""

  def __init__(self, seq_len: int, pad_id: int, age: int):
    self.arrays = {
      "tokens": np.full(seq_len, pad_id, np.int32),
      "positions": np.zeros(seq_len, np.int32),
      "segment_ids": np.zeros(seq_len, np.int32),
      "loss_mask": np.zeros(seq_len, bool),
    }
    self.free = seq_len
    self.age = age
    self._num_segments = 0

  def add(self, tokens: np.ndarray, loss_mask: np.ndarray) -> None:
    begin = len(self.arrays["tokens"]) - self.free
    span = slice(begin, begin + len(tokens))
    self._num_segments += 1
    self.free -= len(tokens)
    self.arrays["tokens"][span] = tokens
    self.arrays["positions"][span] = np.arange(len(tokens), dtype=np.int32)
    self.arrays["segment_ids"][span] = self._num_segments
    self.arrays["loss_mask"][span] = loss_mask
    self.arrays["loss_mask"][begin] = False


def _free(row: _OpenRow) -> int:
  return row.free


def _age(row: _OpenRow) -> int:
  return row.age


def _free_and_age(row: _OpenRow) -> tuple[int, int]:
  return row.free, row.age
