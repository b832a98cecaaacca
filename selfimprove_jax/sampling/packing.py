"""Packs rows of different lengths into calls of one shape, one sequence for each batch shard.

Axis letters: those of `models/packed_rows.py`.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from selfimprove_jax.models.packed_rows import PackedRows

# The part of its columns that an average row fills. If rows are shorter, a call has all its rows
# before it has all its tokens.
_FILL = 1 / 3
# Two rows share a sequence of up to this many tokens, so that one that is a little longer than half
# of the columns leaves less of it empty.
_ROOM_FOR_TWO = 512


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of a call.

  Attributes:
    num_sequences: sequences of packed rows, a multiple of the batch shards.
    num_tokens: tokens of a sequence.
    num_rows: most rows of a sequence.
    num_columns: tokens of the longest row.
  """

  num_sequences: int
  num_tokens: int
  num_rows: int
  num_columns: int

  @property
  def total_rows(self) -> int:
    return self.num_sequences * self.num_rows


def make_shape(
  num_columns: int, *, shortest: int = 1, num_tokens: int, most_rows: int, num_sequences: int
) -> Shape:
  """Returns the shape of calls with rows of `shortest` to `num_columns` tokens.

  Args:
    num_tokens: of a whole call; more if the rows need them.
    most_rows: of a whole call; more if there are more sequences.
  """
  at_least = max(num_columns, min(2 * num_columns, _ROOM_FOR_TWO))
  tokens = max(num_tokens // num_sequences, at_least)
  # Attention computes every row at full length, so no more rows than have room.
  average = max(_FILL * num_columns, shortest)
  rows = min(max(most_rows // num_sequences, 1), int(tokens / average))
  return Shape(num_sequences, min(tokens, rows * num_columns), rows, num_columns)


def pack(lengths: Sequence[int], shape: Shape) -> Iterator[list[list[int]]]:
  """Yields the rows of each call: indices into `lengths`, for each of its sequences.

  The longest rows come first, each in the first sequence with room for it.
  """
  rooms: list[int] = []
  sequences: list[list[int]] = []
  first = 0  # those before it have no room for another row
  for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
    at = first
    while at < len(sequences) and (
      rooms[at] < lengths[index] or len(sequences[at]) == shape.num_rows
    ):
      at += 1
    if at == len(sequences):
      rooms.append(shape.num_tokens)
      sequences.append([])
    sequences[at].append(index)
    rooms[at] -= lengths[index]
    while first < len(sequences) and (not rooms[first] or len(sequences[first]) == shape.num_rows):
      first += 1
  for start in range(0, len(sequences), shape.num_sequences):
    some = sequences[start : start + shape.num_sequences]
    yield some + [[] for _ in range(shape.num_sequences - len(some))]


def lay_out(
  sequences: Sequence[Sequence[tuple[Sequence[int], int]]], shape: Shape
) -> tuple[Int[np.ndarray, "B T"], PackedRows]:
  """Returns the tokens of a call, and where they stand in rows.

  Args:
    sequences: the rows of each sequence: (tokens, position of the first one).
  """
  B, T, R, C = shape.num_sequences, shape.num_tokens, shape.num_rows, shape.num_columns
  tokens_BT = np.zeros((B, T), np.int32)
  starts_BR = np.zeros((B, R), np.int32)
  places_BT = np.full((B, T), R * C, np.int32)
  sources_BP = np.full((B, R * C), T, np.int32)
  for b, rows in enumerate(sequences):
    begin = 0
    for r, (tokens, start) in enumerate(rows):
      end = begin + len(tokens)
      tokens_BT[b, begin:end] = tokens
      starts_BR[b, r] = start
      places_BT[b, begin:end] = r * C + np.arange(len(tokens))
      sources_BP[b, r * C : r * C + len(tokens)] = np.arange(begin, end)
      begin = end
  positions_RC = starts_BR.reshape(-1, 1) + np.arange(C, dtype=np.int32)
  return tokens_BT, PackedRows(positions_RC, places_BT, sources_BP)
