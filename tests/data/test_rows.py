import concurrent.futures
import pathlib
import pickle
import struct

import numpy as np
import pytest

from selfimprove_jax.data import packing, rows
from selfimprove_jax.runs import artifacts


def _packed(num, seq_len=16, seed=0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, seq_len, num)
  examples = (
    packing.Example(rng.integers(0, 2**31 - 1, n).astype(np.int32), np.arange(n) > 0)
    for n in lengths.tolist()
  )
  return list(packing.pack(examples, seq_len=seq_len, pad_id=0))


def _assert_equal(row, other):
  assert row.keys() == other.keys()
  for name in row:
    np.testing.assert_array_equal(row[name], other[name])
    assert row[name].dtype == other[name].dtype


def test_rows_come_back_by_index_over_files(tmp_path):
  written = [_packed(30), _packed(1, seed=1), _packed(9, seed=2)]
  paths = [tmp_path / f"{i}" for i in range(3)]
  counts = [rows.write_rows(path, packed) for path, packed in zip(paths, written)]
  source = rows.RowSource(paths, counts=counts, seq_len=16)
  flat = [row for packed in written for row in packed]
  assert len(source) == len(flat)
  for index in np.random.default_rng(0).permutation(len(flat)):
    _assert_equal(source[index], flat[index])
  for index in (-1, len(flat)):
    with pytest.raises(IndexError, match=f"row {index}"):
      source[index]


def test_written_counts_are_those_of_the_rows(tmp_path):
  packed = _packed(40)
  counts = rows.write_rows(tmp_path / "a", packed)
  assert counts["tokens"] == sum(int((row["segment_ids"] > 0).sum()) for row in packed)
  assert counts["targets"] == sum(int(row["loss_mask"].sum()) for row in packed)
  assert counts["records"] * 16 == counts["tokens"] + counts["padding"]


def test_a_file_written_again_has_the_same_bytes(tmp_path):
  for name in "ab":
    rows.write_rows(tmp_path / name, iter(_packed(300, seq_len=64)))
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_long_rows_keep_their_positions(tmp_path):
  seq_len = 70_000
  (row,) = packing.pack(
    [packing.Example(np.ones(seq_len, np.int32), np.ones(seq_len, bool))],
    seq_len=seq_len,
    pad_id=0,
  )
  counts = rows.write_rows(tmp_path / "a", [row])
  _assert_equal(rows.RowSource([tmp_path / "a"], counts=[counts], seq_len=seq_len)[0], row)


def test_a_pickled_source_reads_on(tmp_path):
  packed = _packed(5)
  source = rows.RowSource(
    [tmp_path / "a"], counts=[rows.write_rows(tmp_path / "a", packed)], seq_len=16
  )
  _assert_equal(source[1], packed[1])
  _assert_equal(pickle.loads(pickle.dumps(source))[1], packed[1])


def test_another_row_length_is_refused(tmp_path):
  counts = rows.write_rows(tmp_path / "a", _packed(5))
  source = rows.RowSource([tmp_path / "a"], counts=[counts], seq_len=32)
  with pytest.raises(ValueError, match="rows of 16 tokens, not of 32"):
    source[0]
  with pytest.raises(ValueError, match="rows of 16 and of 32"):
    rows.write_rows(tmp_path / "b", [*_packed(1), *_packed(1, seq_len=32)])


@pytest.mark.parametrize(
  "record, fault",
  [
    (b"something of another kind", "does not hold packed rows of version 2"),
    (b"abc", "does not hold packed rows of version 2"),
    (struct.pack("<4sHI", b"SIRW", 1, 16) + bytes(16 * 9), "rows of version 1.*pack them again"),
  ],
)
def test_other_records_are_refused(tmp_path, record, fault):
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a"), "group_size:1")
  writer.write(record)
  writer.close()
  counts = {"records": 1, "tokens": 1, "targets": 1}
  with pytest.raises(ValueError, match=fault):
    rows.RowSource([tmp_path / "a"], counts=[counts], seq_len=16)[0]


def test_a_batch_of_records_from_several_files_is_their_rows(tmp_path):
  """Rows of vocabularies below and above 2**16, full and padded, of a length not divisible by 8."""
  seq_len, rng = 21, np.random.default_rng(0)
  written, records = [], []
  for name, vocab_size in (("a", 1 << 16), ("b", (1 << 16) + 1), ("c", 1 << 31)):
    examples = [
      packing.Example(rng.integers(0, vocab_size, n).astype(np.int32), rng.random(n) < 0.5)
      for n in [seq_len, seq_len - 1, *rng.integers(2, seq_len, 200).tolist()]
    ]
    packed = list(packing.pack(examples, seq_len=seq_len, pad_id=vocab_size - 1))
    counts = rows.write_rows(tmp_path / name, packed)
    source = rows.RowSource([tmp_path / name], counts=[counts], seq_len=seq_len)
    written += packed
    records += [source.record(i) for i in range(len(source))]
  order = rng.permutation(len(written))
  batch = rows.decode([records[i] for i in order], seq_len)
  stacked = {name: np.stack([written[i][name] for i in order]) for name in written[0]}
  _assert_equal(batch, stacked)


def test_short_ids_take_half_the_room(tmp_path):
  sizes = []
  for vocab_size in (1 << 16, 1 << 31):
    tokens = np.random.default_rng(0).integers(0, vocab_size, 1_000_000).astype(np.int32)
    packed = packing.pack([packing.Example(tokens, tokens >= 0)], seq_len=1000, pad_id=0)
    rows.write_rows(tmp_path / "a", packed)
    sizes.append((tmp_path / "a").stat().st_size)
  assert sizes[0] < 2_300_000 < 4_000_000 < sizes[1] < 4_500_000


def test_several_threads_read_one_source(tmp_path):
  written = [_packed(400), _packed(400, seed=1)]
  paths = [tmp_path / name for name in "ab"]
  counts = [rows.write_rows(path, packed) for path, packed in zip(paths, written)]
  flat = [row["tokens"].tolist() for packed in written for row in packed]
  for _ in range(5):  # the files are opened anew, by all threads at once
    source = rows.RowSource(paths, counts=counts, seq_len=16)
    order = np.random.default_rng(0).permutation(len(flat)).tolist() * 4
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
      found = list(threads.map(lambda i, source=source: source[i]["tokens"].tolist(), order))
    assert found == [flat[i] for i in order]


@pytest.mark.parametrize(
  "name, values",
  [
    ("segment_ids", [1, 1, 0, 2, 2]),
    ("segment_ids", [0, 1, 1, 2, 2]),
    ("segment_ids", [1, 2, 1, 2, 0]),
    ("positions", [0, 1, 1, 2, 0]),
    ("positions", [0, 1, 0, 1, 1]),
  ],
)
def test_segments_that_could_not_be_read_back_are_refused(tmp_path, name, values):
  examples = [packing.Example([7, 8], [False, True])] * 2
  (row,) = packing.pack(examples, seq_len=5, pad_id=0)
  rows.write_rows(tmp_path / "a", [row])
  row[name] = np.array(values, np.int32)
  with pytest.raises(ValueError, match="cannot be stored: segments must be numbered 1, 2"):
    rows.write_rows(tmp_path / "a", [row])


def test_negative_tokens_are_refused(tmp_path):
  (row,) = _packed(1)
  row["tokens"][0] = -1
  with pytest.raises(ValueError, match="token -1"):
    rows.write_rows(tmp_path / "a", [row])


@pytest.mark.parametrize("kept", [0, 100, 65_536, 0.5, -1])
def test_a_truncated_file_is_never_read(tmp_path, kept):
  counts = rows.write_rows(tmp_path / "a", _packed(3000, seq_len=64))
  whole = (tmp_path / "a").read_bytes()
  cut = int(len(whole) * kept) if isinstance(kept, float) else kept
  pathlib.Path(tmp_path / "a").write_bytes(whole[:cut])
  with pytest.raises(
    artifacts.ArtifactError, match="damaged: 0 of the 1617 rows written can be read"
  ):
    rows.RowSource([tmp_path / "a"], counts=[counts], seq_len=64)[0]


def test_a_flipped_byte_is_never_read(tmp_path):
  counts = rows.write_rows(tmp_path / "a", _packed(3000, seq_len=64))
  whole = bytearray((tmp_path / "a").read_bytes())
  whole[len(whole) // 2] ^= 1
  (tmp_path / "a").write_bytes(whole)
  source = rows.RowSource([tmp_path / "a"], counts=[counts], seq_len=64)
  with pytest.raises(artifacts.ArtifactError, match="damaged"):
    for index in range(len(source)):
      source[index]


def test_the_rows_of_an_artifact_are_opened_by_prefix(tmp_path):
  packed = {"train-0": _packed(9), "train-1": _packed(8, seed=1), "test-0": _packed(7, seed=2)}
  writer = artifacts.Writer(tmp_path / "rows", config={}, inputs={})
  for name in packed:
    with writer.shard(name + rows.SUFFIX) as (path, counts):
      counts.update(rows.write_rows(path, packed[name]))
  artifact = writer.finish()
  train = rows.open_rows(artifact, seq_len=16, prefix="train-")
  assert len(train) == len(packed["train-0"]) + len(packed["train-1"])
  _assert_equal(train[len(packed["train-0"])], packed["train-1"][0])
  with pytest.raises(ValueError, match=r"no rows named validation-\*"):
    rows.open_rows(artifact, seq_len=16, prefix="validation-")
  path = tmp_path / "rows" / f"train-1{rows.SUFFIX}"
  data = bytearray(path.read_bytes())
  data[70_000] ^= 1
  path.write_bytes(data)
  with pytest.raises(artifacts.ArtifactError, match="SHA-256"):
    rows.open_rows(artifact, seq_len=16, prefix="train-")


def test_a_file_of_no_rows_is_an_empty_source(tmp_path):
  counts = rows.write_rows(tmp_path / "a", [])
  assert len(rows.RowSource([tmp_path / "a"], counts=[counts], seq_len=16)) == 0
