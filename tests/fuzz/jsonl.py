"""Damages corpora: JSON lines (plain, gzip, zstd), Parquet and text files.

What is damaged is rejected by file and place, and the other records are read.

python -m tests.fuzz.jsonl --minutes 10 --seed 0
"""

import contextlib
import gzip
import io
import json
import pathlib
import random
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

import pyarrow
import pyarrow.parquet
import zstandard

from selfimprove_jax.data import corpora, files
from tests.fuzz import harness

_MAX_BYTES = 1 << 16  # of a line
_NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"]


def _records(rng: random.Random) -> list[dict]:
  words = ["rain", "Fluß", "雨", "🌧", "\n", '"', "\\", "\u2028"]
  return [
    {
      "id": rng.choice([f"d{i}", i]),
      "text": f"{i}: " + " ".join(rng.choices(words, k=rng.randrange(30))),
      "book": rng.choice("xyz"),
    }
    for i in range(rng.randrange(1, 20))
  ]


def _encode(name: str, lines: list[bytes]) -> bytes:
  text = b"\n".join(lines)
  if name.endswith(".gz"):
    return gzip.compress(text, mtime=0)
  if name.endswith(".zst"):
    return zstandard.ZstdCompressor().compress(text)
  return text


def _parquet(rng: random.Random, records: list[dict]) -> bytes:
  columns = {field: [str(r[field]) for r in records] for field in records[0]}
  file = io.BytesIO()
  pyarrow.parquet.write_table(
    pyarrow.table(columns),
    file,
    row_group_size=rng.choice([3, 100]),
    compression=rng.choice(["none", "snappy", "gzip", "zstd"]),
    use_dictionary=rng.random() < 0.5,
  )
  return file.getvalue()


def _damage(rng: random.Random, data: bytes) -> bytes:
  """Returns bytes with up to three damages."""
  for _ in range(rng.choice([1, 1, 1, 2, 3])):
    data = harness.damage(rng, data)
  return data


def _damage_line(rng: random.Random, line: bytes) -> bytes:
  kind = rng.randrange(10)
  if kind == 0:
    return b"x" * rng.choice([_MAX_BYTES - 1, _MAX_BYTES, _MAX_BYTES + 1, 3 * _MAX_BYTES])
  if kind == 1:
    record = {**json.loads(line), "text": "x" * rng.choice([10, 2 * _MAX_BYTES])}
    return json.dumps(record).encode()
  if kind == 2:
    text = rng.choice([b'"\\ud800"', b"9" * 5_000, b"[" * 2_000 + b"]" * 2_000, b"-1e999", b"NaN"])
    return b'{"id": 1, "book": "x", "text": ' + text + b"}"
  return _damage(rng, line)


def _source(rng: random.Random, path: pathlib.Path) -> corpora.SourceConfig:
  if path.suffix == ".txt":
    return corpora.TextFolderConfig(folder=str(path.parent))
  config = corpora.ParquetConfig if path.suffix == ".parquet" else corpora.JsonlConfig
  return config(
    paths=(str(path),),
    id_field=rng.choice([None, "id"]),
    group_field=rng.choice([None, "book"]),
  )


def _check(source: corpora.SourceConfig, path: pathlib.Path, texts: list[str]) -> None:
  """Reads with and without `on_bad`.

  Raises:
    AssertionError: one of `texts` is missing, or an error does not name the file.
    Exception: whatever is no documented error.
  """
  rejected: list[str] = []
  found = list(corpora.read_documents(source, on_bad=rejected.append))
  missing = set(texts) - {document.text for document in found}
  assert not missing, f"lost: {missing}"
  for document in found:
    f"{document.id}{document.group}{document.text}".encode()
  for message in rejected:
    assert path.name in message and len(message) < 2_000, f"no name in: {message[:2_000]}"
  try:
    again = list(corpora.read_documents(source))
  except corpora.CorpusError as error:
    assert rejected and str(error) == rejected[0], f"other error: {error}"
  else:
    assert not rejected and again == found, f"not raised: {rejected}"


def try_seed(folder: pathlib.Path, seed: int) -> str | None:
  """Writes one damaged file and reads it; returns what is wrong."""
  rng = random.Random(seed)
  path = folder / rng.choice(_NAMES)
  records = _records(rng)
  whole: list[str] = []  # texts that must come out
  if path.suffix == ".parquet":
    data = _damage(rng, _parquet(rng, records))
  else:
    lines = [json.dumps(r, ensure_ascii=rng.random() < 0.5).encode() for r in records]
    in_line = rng.random() < 0.6
    if in_line:
      at = rng.randrange(len(lines))
      lines[at] = _damage_line(rng, lines[at])
    data = _encode(path.name, lines)
    if not in_line:
      data = _damage(rng, data)
    elif path.suffix != ".txt":
      whole = [record["text"] for i, record in enumerate(records) if i != at]
  path.write_bytes(data)
  try:
    _check(_source(rng, path), path, whole)
  except Exception as error:
    return f"{path.name}: {type(error).__name__}: {str(error)[:300]}"
  finally:
    path.unlink()
  return None


@contextlib.contextmanager
def opened() -> Iterator[Callable[[int], str | None]]:
  """Yields the fuzzer."""
  with (
    tempfile.TemporaryDirectory() as folder,
    mock.patch.object(files, "MAX_BYTES", _MAX_BYTES),
  ):
    yield lambda seed: try_seed(pathlib.Path(folder), seed)


if __name__ == "__main__":
  harness.main(__doc__, opened)
