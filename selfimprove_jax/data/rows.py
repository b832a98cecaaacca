"""Packed rows on disk: ArrayRecord files that are read by index, in any order.

One record is one row, little-endian: magic, version (uint16), seq_len (uint32), then tokens
(uint32), positions (uint16, or uint32 above 65,536 tokens), segment_ids (uint16) and loss_mask
(uint8).
"""

import bisect
import itertools
import operator
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsIndex

import numpy as np
from array_record.python import array_record_module

from selfimprove_jax import artifacts
from selfimprove_jax.data import packing

SUFFIX = ".array_record"

_MAGIC = b"SIRW"
_VERSION = 1
_HEADER = struct.Struct("<4sHI")
# One row a chunk, so that a read by index decompresses no other row. Written out in full because
# the bytes of a file are part of an artefact's digest.
_WRITER_OPTIONS = "group_size:1,zstd:3,max_parallelism:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def write_rows(path: str | os.PathLike, rows: Iterable[packing.Row]) -> dict[str, int]:
  """Writes a file of rows of one length; returns the sum of `packing.row_counts` over them.

  Equal rows give equal bytes.

  Raises:
    ValueError: rows of different lengths, a negative token, or over 65,535 segments in a row.
  """
  counts = {"records": 0, "tokens": 0, "targets": 0, "padding": 0}
  seq_len = None
  writer = array_record_module.ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)
  try:
    for row in rows:
      seq_len = seq_len or len(row["tokens"])
      if len(row["tokens"]) != seq_len:
        raise ValueError(f"rows of {seq_len} and of {len(row['tokens'])} tokens in one file")
      writer.write(_encode(row))
      for name, count in packing.row_counts(row).items():
        counts[name] += count
  finally:
    writer.close()
  return counts


class RowSource:
  """Rows of several files as one sequence (a grain `RandomAccessDataSource`; can be pickled)."""

  def __init__(
    self,
    paths: Sequence[str | os.PathLike],
    *,
    counts: Sequence[Mapping[str, int]],
    seq_len: int,
  ):
    """Opens nothing yet: a file is opened, and compared with its counts, when first read.

    Args:
      counts: What `write_rows` returned for each file.
      seq_len: Tokens a row; a file of other rows is refused when read.
    """
    if len(paths) != len(counts):
      raise ValueError(f"{len(paths)} files, but counts of {len(counts)}")
    self.seq_len = seq_len
    self.num_tokens = sum(count["tokens"] for count in counts)
    self.num_targets = sum(count["targets"] for count in counts)
    self._paths = [os.fspath(path) for path in paths]
    self._ends = list(itertools.accumulate(count["records"] for count in counts))
    self._readers: dict[int, array_record_module.ArrayRecordReader] = {}

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: SupportsIndex) -> packing.Row:
    """Row number `index`.

    Raises:
      IndexError: there is no such row.
      ArtifactError: its file is damaged.
      ValueError: its rows are not of `seq_len` tokens, or of another version.
    """
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    file = bisect.bisect_right(self._ends, index)
    begin = self._ends[file - 1] if file else 0
    reader = self._reader(file, self._ends[file] - begin)
    try:
      record = reader.read([index - begin])[0]
    except RuntimeError as error:
      raise artifacts.ArtifactError(f"{self._paths[file]} is damaged: {error}") from error
    return _decode(record, self.seq_len, self._paths[file])

  def __getstate__(self) -> dict:
    return self.__dict__ | {"_readers": {}}

  def __repr__(self) -> str:
    return f"RowSource({len(self)} rows of {self.seq_len} tokens)"

  def _reader(self, file: int, num_records: int) -> array_record_module.ArrayRecordReader:
    if file not in self._readers:
      reader = array_record_module.ArrayRecordReader(self._paths[file], _READER_OPTIONS)
      found = reader.num_records()  # a damaged file is found to have none, and raises nothing
      if found != num_records:
        raise artifacts.ArtifactError(
          f"{self._paths[file]} is damaged: {found} rows can be read, {num_records} were written"
        )
      self._readers[file] = reader
    return self._readers[file]


def open_rows(artifact: artifacts.Artifact, *, seq_len: int, prefix: str = "") -> RowSource:
  """The rows of an artefact's ArrayRecord shards whose names begin with `prefix`.

  Each shard was written with the counts of `write_rows`, and is compared with its SHA-256 here.

  Raises:
    ArtifactError: a shard is damaged.
    ValueError: there is no such shard.
  """
  names = [n for n in sorted(artifact.shards) if n.startswith(prefix) and n.endswith(SUFFIX)]
  if not names:
    raise ValueError(f"{artifact.folder} has no rows named {prefix}*; it has {[*artifact.shards]}")
  paths = [artifact.path(name) for name in names]
  return RowSource(paths, counts=[artifact.shards[n] for n in names], seq_len=seq_len)


def _positions_dtype(seq_len: int) -> str:
  return "<u2" if seq_len <= 1 << 16 else "<u4"


def _encode(row: packing.Row) -> bytes:
  seq_len = len(row["tokens"])
  if row["tokens"].min() < 0 or row["segment_ids"].max() > 0xFFFF:
    raise ValueError(
      f"a row has token {row['tokens'].min()} and {row['segment_ids'].max()} segments; tokens are "
      f"0 or more, segments at most {0xFFFF}"
    )
  return b"".join(
    [
      _HEADER.pack(_MAGIC, _VERSION, seq_len),
      row["tokens"].astype("<u4").tobytes(),
      row["positions"].astype(_positions_dtype(seq_len)).tobytes(),
      row["segment_ids"].astype("<u2").tobytes(),
      row["loss_mask"].astype("u1").tobytes(),
    ]
  )


def _decode(record: bytes, seq_len: int, path: str) -> packing.Row:
  magic, version, found = _HEADER.unpack_from(record)
  if (magic, version) != (_MAGIC, _VERSION):
    raise ValueError(f"{path} holds no packed rows of version {_VERSION}")
  if found != seq_len:
    raise ValueError(f"{path} has rows of {found} tokens; {seq_len} were asked for")
  row, offset = {}, _HEADER.size
  for name, stored, dtype in (
    ("tokens", "<u4", np.int32),
    ("positions", _positions_dtype(seq_len), np.int32),
    ("segment_ids", "<u2", np.int32),
    ("loss_mask", "u1", np.bool_),
  ):
    array = np.frombuffer(record, stored, seq_len, offset)
    row[name] = array.astype(dtype)
    offset += array.nbytes
  return row
