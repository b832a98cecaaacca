"""Stores packed rows in ArrayRecord files, which are read by index in any order.

A record is a row, little-endian: magic, version (uint16), seq_len (uint32), bytes per token
(uint16, 2 or 4), number of segments (uint32); then tokens (uint16 if all are below 65,536, else
uint32), the segments' lengths (uint32) and loss_mask (one bit per token, the first in the highest
bit). Positions and segment ids follow from the lengths, so they are not stored: a token takes 1.0
to 1.9 bytes on disk instead of 1.6 to 3.3 (benchmarks/data.md).
"""

import bisect
import copy
import dataclasses
import itertools
import operator
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from array_record.python import array_record_module

from selfimprove_jax.data import packing
from selfimprove_jax.runs import artifacts

SUFFIX = ".array_record"
SEGMENTS = ".segments.jsonl"

_MAGIC = b"SIRW"
_VERSION = 2
_PREFIX = struct.Struct("<4sHI")  # magic, version, seq_len
_HEADER = struct.Struct("<4sHIHI")
_ROWS_CHECKED_AT_ONCE = 64
# One row per chunk, so that a read by index decompresses no other row. All options are spelled out
# because the bytes of a file are part of an artifact's digest.
_WRITER_OPTIONS = "group_size:1,zstd:3,max_parallelism:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def write_rows(path: str | os.PathLike, rows: Iterable[packing.Row]) -> dict[str, int]:
  """Writes a file of rows of one length; returns the sum of `packing.row_counts` over them.

  Equal rows make files of equal bytes.

  Raises:
    ValueError: rows differ in length, a token is negative, or `packing.pack` would lay out the
      segments differently.
  """
  counts = dict.fromkeys(("records", "tokens", "targets", "padding"), 0)
  remaining = iter(rows)
  seq_len = None
  writer = array_record_module.ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)
  try:
    # In blocks, since the check decodes the records, which is fast for many at a time.
    while block := list(itertools.islice(remaining, _ROWS_CHECKED_AT_ONCE)):
      seq_len = seq_len or len(block[0]["tokens"])
      for record in _encode(block, seq_len):
        writer.write(record)
      for row in block:
        for name, count in packing.row_counts(row).items():
          counts[name] += count
  finally:
    writer.close()
  return counts


class RowSource:
  """Presents the rows of several files as one sequence (grain's `RandomAccessDataSource`)."""

  def __init__(
    self, paths: Sequence[str | os.PathLike], *, counts: Sequence[Mapping[str, int]], seq_len: int
  ):
    """Opens no file yet: reading a row opens its file and checks it against its counts.

    Args:
      counts: the result of `write_rows` for each file.
      seq_len: tokens per row; reading a file of other rows fails.
    """
    if len(paths) != len(counts):
      raise ValueError(f"{len(paths)} files, but counts of {len(counts)}")
    self.seq_len = seq_len
    self._prefix = _PREFIX.pack(_MAGIC, _VERSION, seq_len)  # one comparison checks all three
    self._paths = [os.fspath(path) for path in paths]
    self._ends = list(itertools.accumulate(count["records"] for count in counts))
    self._length = self._ends[-1] if self._ends else 0
    self._readers: dict[int, array_record_module.ArrayRecordReader] = {}

  def __len__(self) -> int:
    return self._length

  def first(self, num_rows: int) -> "RowSource":
    """Returns the source of the first rows, at most as many as there are."""
    part = copy.copy(self)
    part._length = min(num_rows, self._length)
    return part

  def __getitem__(self, index: SupportsIndex) -> packing.Row:
    """Returns row number `index`; raises the errors of `record`."""
    return {name: array[0] for name, array in decode([self.record(index)], self.seq_len).items()}

  def record(self, index: SupportsIndex) -> bytes:
    """Returns row number `index` as it is stored, for `decode`; threads may call it concurrently.

    Raises:
      IndexError: there is no such row.
      ArtifactError: its file is damaged.
      ValueError: the file's rows have another length or version.
    """
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    file = bisect.bisect_right(self._ends, index)
    begin = self._ends[file - 1] if file else 0
    reader = self._reader(file, self._ends[file] - begin)
    try:
      # Not `read([i])`, which scans the whole file's index at every call.
      (record,) = reader.read(index - begin, index - begin + 1)
    except RuntimeError as error:
      raise artifacts.ArtifactError(f"{self._paths[file]} is damaged: {error}") from error
    if not record.startswith(self._prefix):
      raise ValueError(_fault(record, self._paths[file], self.seq_len))
    return record

  def __getstate__(self) -> dict[str, Any]:  # open readers cannot be pickled
    return self.__dict__ | {"_readers": {}}

  def _reader(self, file: int, num_records: int) -> array_record_module.ArrayRecordReader:
    if file not in self._readers:
      reader = array_record_module.ArrayRecordReader(self._paths[file], _READER_OPTIONS)
      found = reader.num_records()  # 0 for a damaged file, without an exception
      if found != num_records:
        raise artifacts.ArtifactError(
          f"{self._paths[file]} is damaged: {found} of the {num_records} rows written can be read"
        )
      self._readers[file] = reader
    return self._readers[file]


@dataclasses.dataclass(frozen=True)
class Segment:
  """One segment of a row, and the document that it belongs to (`packing.Label`).

  Attributes:
    num_targets: tokens to predict in the whole document; pieces of it have fewer.
  """

  row: int
  id: str
  group: str
  num_bytes: int
  num_targets: int


def segments(row: int, examples: Iterable[packing.Example]) -> Iterator[dict[str, Any]]:
  """Yields a row's segments, as JSON; arguments as `packing.pack_labeled` yields them."""
  for example in examples:
    num_targets = int(np.count_nonzero(example.loss_mask))
    yield {"row": row, **dataclasses.asdict(example.label), "num_targets": num_targets}


@dataclasses.dataclass(frozen=True)
class LabeledRows:
  """Rows whose segments are known, in the order of rows: what held-out losses need."""

  source: RowSource
  segments: Sequence[Segment]


def open_labeled(artifact: artifacts.Artifact, *, seq_len: int, name: str) -> LabeledRows:
  """Opens the rows `<name>.array_record` and their segments `<name>.segments.jsonl`.

  Raises:
    ArtifactError: a shard's SHA-256 is not the one recorded.
    ValueError: there is no such shard.
  """
  source = open_rows(artifact, seq_len=seq_len, prefix=f"{name}.")
  found = [Segment(**record) for record in artifact.read_jsonl(name + SEGMENTS)]
  return LabeledRows(source, found)


def open_rows(artifact: artifacts.Artifact, *, seq_len: int, prefix: str = "") -> RowSource:
  """Opens the rows of an artifact's ArrayRecord shards whose names begin with `prefix`.

  The artifact must store the counts of `write_rows` for each shard.

  Raises:
    ArtifactError: a shard's SHA-256 is not the one recorded.
    ValueError: there is no such shard.
  """
  names = [n for n in sorted(artifact.shards) if n.startswith(prefix) and n.endswith(SUFFIX)]
  if not names:
    raise ValueError(f"{artifact.folder} has no rows named {prefix}*; it has {[*artifact.shards]}")
  paths = [artifact.path(name) for name in names]
  return RowSource(paths, counts=[artifact.shards[n] for n in names], seq_len=seq_len)


def decode(records: Sequence[bytes], seq_len: int) -> packing.Batch:
  """Decodes records of `RowSource.record`, from one or several sources, into a batch."""
  tokens = np.empty((len(records), seq_len), np.int32)
  lengths, masks = [], []
  for record, row in zip(records, tokens):
    # Views of the record's bytes; the assignment widens the tokens to int32.
    *_, token_bytes, num_segments = _HEADER.unpack_from(record)
    row[:] = np.frombuffer(record, f"<u{token_bytes}", seq_len, _HEADER.size)
    offset = _HEADER.size + seq_len * token_bytes
    lengths.append(np.frombuffer(record, "<u4", num_segments, offset))
    masks.append(record[offset + 4 * num_segments :])
  mask_bits = np.frombuffer(b"".join(masks), np.uint8).reshape(len(records), -1)
  positions, segment_ids = packing.layout(lengths, seq_len)
  return {
    "tokens": tokens,
    "positions": positions,
    "segment_ids": segment_ids,
    "loss_mask": np.unpackbits(mask_bits, axis=1, count=seq_len).view(np.bool_),
  }


def _encode(rows: Sequence[packing.Row], seq_len: int) -> list[bytes]:
  """Encodes rows, and checks that they decode to the same arrays."""
  records = [_encode_row(row, seq_len) for row in rows]
  # Positions and segment ids are not stored, so a row with another layout would change silently.
  for name, array in decode(records, seq_len).items():
    if not np.array_equal(array, [row[name] for row in rows]):
      raise ValueError(
        f"the rows' {name} cannot be stored: segments must be numbered 1, 2, ... in their order, "
        f"with positions from 0 in each, and padding (0 in both) must be at the end of a row"
      )
  return records


def _encode_row(row: packing.Row, seq_len: int) -> bytes:
  tokens = row["tokens"]
  if len(tokens) != seq_len:
    raise ValueError(f"rows of {seq_len} and of {len(tokens)} tokens cannot be in one file")
  if tokens.min() < 0:
    raise ValueError(f"a row has token {tokens.min()}; tokens must be 0 or more")
  # Decided for each row, so that a row's bytes do not depend on the other rows of its file.
  token_bytes = 2 if tokens.max() <= 0xFFFF else 4
  lengths = np.bincount(row["segment_ids"])[1:]
  header = _HEADER.pack(_MAGIC, _VERSION, seq_len, token_bytes, len(lengths))
  stored = tokens.astype(f"<u{token_bytes}"), lengths.astype("<u4"), np.packbits(row["loss_mask"])
  return header + b"".join(array.tobytes() for array in stored)


def _fault(record: bytes, path: str, seq_len: int) -> str:
  """Explains why a record is not a row of `seq_len` tokens."""
  magic, version, found = _PREFIX.unpack_from(record.ljust(_PREFIX.size, b"\0"))
  if magic != _MAGIC:
    return f"{path} does not hold packed rows of version {_VERSION}"
  if version != _VERSION:
    return (
      f"{path} holds packed rows of version {version}; this release reads version {_VERSION}: pack "
      f"them again, or use the release that wrote them"
    )
  return f"{path} has rows of {found} tokens, not of {seq_len}"
