"""Packs token sequences into training rows of one length that hold several segments each.

Attention does not cross segments (documents, pairs, or pieces of one): their positions restart at 0
and attention masks by `segment_ids`. `loss_mask` marks the tokens to predict from the tokens before
them in their segment, so the first token of a segment is never marked.
"""

import bisect
import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Integer

from selfimprove_jax.data.tokenizer import Tokenizer

Row = dict[str, Int32[np.ndarray, "T"] | Bool[np.ndarray, "T"]]
"""int32 tokens, positions (from 0 in each segment) and segment_ids (from 1; 0 is padding), and bool
loss_mask."""

Batch = dict[str, Int32[np.ndarray, "B T"] | Bool[np.ndarray, "B T"]]
"""Stacked rows."""


@dataclasses.dataclass(frozen=True)
class Label:
  """The document that a segment belongs to, for losses by document.

  Attributes:
    id: its id; pieces of one document share it.
    group: documents of one group are not independent.
    num_bytes: UTF-8 bytes of the text to predict, of the whole document.
  """

  id: str
  group: str
  num_bytes: int


@dataclasses.dataclass(frozen=True)
class Example:
  """A training sequence, a mask of the tokens to predict (never the first), and its document."""

  tokens: Sequence[int] | Int32[np.ndarray, "N"]
  loss_mask: Sequence[bool] | Bool[np.ndarray, "N"]
  label: Label | None = None


def document_example(
  ids: Sequence[int], tokenizer: Tokenizer, *, is_whole: bool = True, label: Label | None = None
) -> Example:
  """Returns BOS document EOS, with loss on everything but BOS; no EOS if the end was cut off."""
  tokens = np.empty(len(ids) + 1 + is_whole, np.int32)
  tokens[0], tokens[1 : len(ids) + 1] = tokenizer.bos_id, ids
  if is_whole:
    tokens[-1] = tokenizer.eos_id
  loss_mask = np.ones(len(tokens), bool)
  loss_mask[0] = False
  return Example(tokens, loss_mask, label)


def pair_example(
  d1_ids: Sequence[int],
  d2_ids: Sequence[int],
  tokenizer: Tokenizer,
  *,
  label: Label | None = None,
) -> Example:
  """Returns BOS d1 SEP d2 EOS, with loss on d2 and EOS (SBP, section 3.1; arXiv 2509.15248)."""
  tokens = [tokenizer.bos_id, *d1_ids, tokenizer.sep_id, *d2_ids, tokenizer.eos_id]
  loss_mask = np.ones(len(tokens), bool)
  loss_mask[: len(d1_ids) + 2] = False
  return Example(np.array(tokens, np.int32), loss_mask, label)


def pack(
  examples: Iterable[Example], *, seq_len: int, pad_id: int, num_open_rows: int = 32
) -> Iterator[Row]:
  """Packs a stream of examples into rows; see `pack_labeled`."""
  packed = pack_labeled(examples, seq_len=seq_len, pad_id=pad_id, num_open_rows=num_open_rows)
  return (row for row, _ in packed)


def pack_labeled(
  examples: Iterable[Example], *, seq_len: int, pad_id: int, num_open_rows: int = 32
) -> Iterator[tuple[Row, list[Example]]]:
  """Packs a stream of examples into rows of `seq_len` tokens, best fit first.

  Yields each row with the example that each of its segments comes from.

  An example goes to the open row that it fills best. If it fits into none, the fullest row is
  yielded and a new one opened. An example longer than a row is cut into consecutive pieces, each a
  segment of its own whose first token is not predicted; a last piece of one token is dropped, since
  it has no token to predict.

  Args:
    num_open_rows: more rows waste less padding; 1 keeps the order of the examples.

  Raises:
    ValueError: an example is empty, its mask has another length, or `seq_len` is below 2.
  """
  # Ours instead of grain's `BestFitPackIterDataset`, which yields all open rows when an example
  # fits into none and so pads twice as much, at a tenth of the speed (benchmarks/data.md).
  if seq_len < 2 or num_open_rows < 1:
    raise ValueError(
      f"seq_len={seq_len} must be at least 2, num_open_rows={num_open_rows} at least 1"
    )
  # Sorted by free space, then age: the first row with room for an example is the one that it fills
  # best, found in log time, and the oldest of equally full ones.
  free, age = operator.attrgetter("free"), operator.attrgetter("age")
  open_rows: list[_OpenRow] = []
  for number, (example, tokens, loss_mask) in enumerate(_pieces(examples, seq_len)):
    best = bisect.bisect_left(open_rows, len(tokens), key=free)
    if best < len(open_rows):
      row = open_rows.pop(best)
    else:
      if len(open_rows) == num_open_rows:
        yield open_rows.pop(0).finished()
      row = _OpenRow(seq_len, pad_id, number)
    row.add(example, tokens, loss_mask)
    if row.free < 2:  # no segment is shorter than two tokens
      yield row.finished()
    else:
      bisect.insort(open_rows, row, key=operator.attrgetter("free", "age"))
  for row in sorted(open_rows, key=age):  # the remaining rows, oldest first
    yield row.finished()


def layout(
  lengths: Sequence[Integer[np.ndarray, "_"]], seq_len: int
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
  """Returns positions and segment ids of rows from the lengths of their segments, vectorized."""
  # A row's parts are its segments and its padding, which may be empty; the parts of all rows are
  # concatenated.
  num_parts = np.array([len(row) + 1 for row in lengths])
  last = np.cumsum(num_parts) - 1
  first = last + 1 - num_parts
  sizes = np.zeros(num_parts.sum(), np.int64)
  ids = np.arange(1, len(sizes) + 1) - np.repeat(first, num_parts)
  ids[last] = 0
  sizes[ids > 0] = np.concatenate(lengths)
  sizes[last] = seq_len - np.add.reduceat(sizes, first)
  starts = np.cumsum(sizes) - sizes
  segment_ids = np.repeat(ids.astype(np.int32), sizes)
  # A position is the distance from the start of its part; padding has position 0.
  positions = np.arange(len(segment_ids), dtype=np.int32)
  positions -= np.repeat(starts.astype(np.int32), sizes)
  positions *= segment_ids > 0
  return positions.reshape(-1, seq_len), segment_ids.reshape(-1, seq_len)


def row_counts(row: Row) -> dict[str, int]:
  """Counts a row's records (1), tokens, targets (tokens to predict) and padding."""
  tokens = int(np.count_nonzero(row["segment_ids"]))
  return {
    "records": 1,
    "tokens": tokens,
    "targets": int(np.count_nonzero(row["loss_mask"])),
    "padding": len(row["tokens"]) - tokens,
  }


def _pieces(
  examples: Iterable[Example], seq_len: int
) -> Iterator[tuple[Example, np.ndarray, np.ndarray]]:
  """Yields example, tokens and loss mask of every segment."""
  for index, example in enumerate(examples):
    tokens = np.asarray(example.tokens, np.int32)
    loss_mask = np.asarray(example.loss_mask, bool)
    if not len(tokens) or len(tokens) != len(loss_mask):
      raise ValueError(
        f"example {index} has {len(tokens)} tokens and a loss mask of {len(loss_mask)}; both must "
        f"have the same length, and at least one token"
      )
    for start in range(0, len(tokens), seq_len):
      piece = slice(start, start + seq_len)
      if len(tokens[piece]) > 1:
        yield example, tokens[piece], loss_mask[piece]


class _OpenRow:
  """A row with room for more segments."""

  def __init__(self, seq_len: int, pad_id: int, age: int):
    self.arrays = {
      "tokens": np.full(seq_len, pad_id, np.int32),
      "positions": np.zeros(seq_len, np.int32),
      "segment_ids": np.zeros(seq_len, np.int32),
      "loss_mask": np.zeros(seq_len, bool),
    }
    self.free = seq_len
    self.age = age
    self._examples: list[Example] = []

  def finished(self) -> tuple[Row, list[Example]]:
    return self.arrays, self._examples

  def add(self, example: Example, tokens: np.ndarray, loss_mask: np.ndarray) -> None:
    begin = len(self.arrays["tokens"]) - self.free
    span = slice(begin, begin + len(tokens))
    self._examples.append(example)
    self.free -= len(tokens)
    self.arrays["tokens"][span] = tokens
    self.arrays["positions"][span] = np.arange(len(tokens), dtype=np.int32)
    self.arrays["segment_ids"][span] = len(self._examples)
    self.arrays["loss_mask"][span] = loss_mask
    self.arrays["loss_mask"][begin] = False  # nothing precedes the first token of a segment
