"""Rows of different lengths in calls of one shape."""

import jax
import numpy as np
import pytest

from selfimprove_jax.sampling import packing

SHAPE = packing.Shape(num_sequences=2, num_tokens=12, num_rows=3, num_columns=8)


def test_every_row_is_in_one_call_and_no_sequence_is_too_full():
  lengths = np.random.default_rng(0).integers(1, 9, 50).tolist()
  calls = list(packing.pack(lengths, SHAPE))
  assert all(len(sequences) == 2 for sequences in calls)
  sequences = [rows for call in calls for rows in call]
  assert sorted(index for rows in sequences for index in rows) == list(range(50))
  for rows in sequences:
    assert len(rows) <= 3 and sum(lengths[index] for index in rows) <= 12
  assert len(calls) <= 1.3 * sum(lengths) / 24


def test_rows_are_laid_out_at_their_positions_and_packed_again():
  sequences = [[([5, 6, 7], 0), ([8], 10)], []]
  tokens_BT, packed = jax.tree.map(jax.numpy.asarray, packing.lay_out(sequences, SHAPE))
  assert tokens_BT[0].tolist() == [5, 6, 7, 8] + [0] * 8 and not tokens_BT[1].any()
  rows_RC = packed.lay_out(tokens_BT)
  assert rows_RC.shape == (6, 8)
  assert rows_RC[:2].tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [8, 0, 0, 0, 0, 0, 0, 0]]
  assert not rows_RC[2:].any()
  assert packed.positions_RC[1].tolist() == list(range(10, 18))
  np.testing.assert_array_equal(packed.pack(rows_RC), tokens_BT)
  positions_BT = packed.pack(packed.positions_RC)
  assert positions_BT[0].tolist() == [0, 1, 2, 10] + [0] * 8


@pytest.mark.parametrize(
  ("columns", "sequences", "most_rows", "expected"),
  [
    (16, 1, 99, (128, 24)),  # rows are a third full
    (16, 1, 4, (64, 4)),  # no more tokens than the rows may have
    (256, 1, 99, (512, 6)),  # two whole rows
    (1024, 1, 99, (1024, 3)),
    (16, 4, 2, (16, 1)),  # a row for each sequence, although that is more
  ],
)
def test_a_shape_has_room_for_its_rows(columns, sequences, most_rows, expected):
  options = dict(num_tokens=128, most_rows=most_rows, num_sequences=sequences)
  shape = packing.make_shape(columns, **options)
  assert (shape.num_tokens, shape.num_rows) == expected
  assert shape.total_rows == sequences * shape.num_rows


def test_a_shape_has_no_more_rows_than_have_room():
  options = dict(num_tokens=128, most_rows=99, num_sequences=1)
  # Two rows of more than half of the columns do not fit.
  assert packing.make_shape(1024, shortest=513, **options).num_rows == 1
  assert packing.make_shape(256, shortest=129, **options).num_rows == 3
