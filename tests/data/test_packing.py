import collections
import itertools

import numpy as np
import pytest

from selfimprove_jax.data import packing, tokenizer

_TOKENIZER = tokenizer.train_bpe(["some text"], vocab_size=261)  # pad 0, BOS 1, SEP 2, EOS 3


def _example(length, token=7):
  return packing.Example([token] * length, [False] + [True] * (length - 1))


def _pack(examples, seq_len, **options):
  return list(packing.pack(examples, seq_len=seq_len, pad_id=0, **options))


def _segments(row):
  """[(tokens, loss_mask)] of each segment of a row."""
  ids = row["segment_ids"]
  return [
    (tuple(row["tokens"][ids == i].tolist()), tuple(row["loss_mask"][ids == i].tolist()))
    for i in range(1, ids.max() + 1)
  ]


def _random_examples(num, max_length=30):
  rng = np.random.default_rng(0)
  for _ in range(num):
    length = int(rng.integers(2, max_length))
    yield packing.Example(
      rng.integers(0, 99, length).astype(np.int32), np.arange(length) > length // 2
    )


def test_two_documents_share_a_row_and_do_not_touch():
  examples = [
    packing.document_example([7, 8], _TOKENIZER),
    packing.document_example([9], _TOKENIZER),
  ]
  (row,) = _pack(examples, 9)
  np.testing.assert_array_equal(row["tokens"], [1, 7, 8, 3, 1, 9, 3, 0, 0])
  np.testing.assert_array_equal(row["positions"], [0, 1, 2, 3, 0, 1, 2, 0, 0])
  np.testing.assert_array_equal(row["segment_ids"], [1, 1, 1, 1, 2, 2, 2, 0, 0])
  np.testing.assert_array_equal(row["loss_mask"], [0, 1, 1, 1, 0, 1, 1, 0, 0])
  assert [row[k].dtype for k in ("tokens", "positions", "segment_ids")] == [np.int32] * 3
  assert row["loss_mask"].dtype == np.bool_


def test_a_pair_is_scored_on_its_second_document_and_the_end():
  example = packing.pair_example([7, 8], [9, 6], _TOKENIZER)
  np.testing.assert_array_equal(example.loss_mask, [0, 0, 0, 0, 1, 1, 1])
  (row,) = _pack([example], 8)
  np.testing.assert_array_equal(row["tokens"], [1, 7, 8, 2, 9, 6, 3, 0])
  np.testing.assert_array_equal(row["loss_mask"], [0, 0, 0, 0, 1, 1, 1, 0])


def test_nothing_is_lost_doubled_or_mixed():
  examples = list(_random_examples(500))
  rows = _pack(examples, 64)
  found = collections.Counter(segment for row in rows for segment in _segments(row))
  wanted = collections.Counter(
    (tuple(e.tokens.tolist()), tuple(e.loss_mask.tolist())) for e in examples
  )
  assert found == wanted
  for row in rows:
    ids = row["segment_ids"]
    padding = ids == 0
    assert not padding[: np.count_nonzero(ids)].any()  # only at the end
    assert not row["loss_mask"][padding].any() and not row["tokens"][padding].any()
    starts = np.flatnonzero(np.diff(ids, prepend=0) > 0)
    assert not row["positions"][starts].any() and not row["loss_mask"][starts].any()


def test_an_example_goes_where_it_fits_best():
  rows = _pack([_example(5, 5), _example(6, 6), _example(2, 2), _example(3, 3)], 8)
  assert [[tokens[0] for tokens, _ in _segments(row)] for row in rows] == [[6, 2], [5, 3]]


def test_the_fullest_row_is_given_out_where_no_more_may_be_open():
  stream = packing.pack(
    (_example(n, n) for n in (5, 6, 7, 4)), seq_len=8, pad_id=0, num_open_rows=2
  )
  assert [int(row["tokens"][0]) for row in stream] == [6, 7, 5, 4]


def test_of_rows_equally_full_the_oldest_is_filled_and_given_out_first():
  filled = _pack([_example(4, 4), _example(4, 5), _example(5, 6), _example(3, 3)], 7)
  assert [[tokens[0] for tokens, _ in _segments(row)] for row in filled] == [[4, 3], [5], [6]]
  given = _pack([_example(5, 5), _example(5, 4), _example(6, 6)], 8, num_open_rows=2)
  assert [int(row["tokens"][0]) for row in given] == [5, 4, 6]


def test_positions_and_segments_follow_from_lengths():
  positions, segment_ids = packing.layout(
    [np.array([3, 1]), np.array([], int), np.array([2, 3]), np.array([5])], 5
  )
  np.testing.assert_array_equal(
    positions, [[0, 1, 2, 0, 0], [0] * 5, [0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
  )
  np.testing.assert_array_equal(segment_ids, [[1, 1, 1, 2, 0], [0] * 5, [1, 1, 2, 2, 2], [1] * 5])


def test_a_row_without_room_for_a_segment_is_given_out_at_once():
  assert [int(row["tokens"][0]) for row in _pack([_example(4, 4), _example(7, 7)], 8)] == [7, 4]


def test_one_open_row_keeps_the_order():
  rows = _pack((_example(n, n) for n in (5, 2, 3, 6, 2)), 8, num_open_rows=1)
  assert [tokens[0] for row in rows for tokens, _ in _segments(row)] == [5, 2, 3, 6, 2]


def test_rows_come_while_examples_are_still_to_come():
  stream = packing.pack((_example(20) for _ in itertools.count()), seq_len=32, pad_id=0)
  assert len(list(itertools.islice(stream, 10))) == 10


def test_packing_leaves_little_padding_and_is_repeatable():
  rows, again = (_pack(_random_examples(2000), 128) for _ in range(2))
  counts = collections.Counter()
  for row in rows:
    counts.update(packing.row_counts(row))
  assert counts["padding"] / (counts["tokens"] + counts["padding"]) < 0.02
  assert counts["tokens"] + counts["padding"] == 128 * counts["records"]
  assert counts["targets"] == sum(int(e.loss_mask.sum()) for e in _random_examples(2000))
  for row, same in zip(rows, again, strict=True):
    for name in row:
      np.testing.assert_array_equal(row[name], same[name])


def test_a_long_document_is_cut_into_segments_of_their_own():
  example = packing.Example(range(10, 20), [False] + [True] * 9)
  rows = _pack([example], 4)
  assert [_segments(row) for row in rows] == [
    [((10, 11, 12, 13), (False, True, True, True))],
    [((14, 15, 16, 17), (False, True, True, True))],
    [((18, 19), (False, True))],
  ]


def test_a_last_piece_of_one_token_is_left_out():
  assert len(_pack([_example(9)], 4)) == 2


def test_examples_that_cannot_be_packed_are_refused():
  with pytest.raises(ValueError, match="example 0 has 2 tokens and a loss mask of 1"):
    _pack([packing.Example([1, 2], [True])], 8)
  with pytest.raises(ValueError, match="at least one"):
    _pack([packing.Example([], [])], 8)
  with pytest.raises(ValueError, match="seq_len=1 must be at least 2"):
    _pack([_example(3)], 1)
