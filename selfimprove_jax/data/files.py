"""Reads files of JSON lines and text, plain or compressed, in bounded memory.

Names of files are relative, so that ids made of them are the same on every machine.
"""

import contextlib
import dataclasses
import glob
import gzip
import io
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

# Of one line or text file. A line of any length would let a few kilobytes of zeros, decompressed,
# fill the memory.
MAX_BYTES = 1 << 26
_ZSTD_PIECE_BYTES = 1 << 10  # 4 bytes can decompress to 128 KiB, so these to 32 MiB


class CorpusError(ValueError):
  """A source is missing, or one of its records is not a document."""


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of a JSON-lines file.

  Attributes:
    id: "file:number", with the file's name as `matching_files` gives it.
    where: path and line, for errors.
  """

  id: str
  where: str
  content: bytes

  def parsed(self) -> Any:
    """Returns the JSON value; raises ValueError or RecursionError, which `fault` explains."""
    return _parse_line(self.content)


def jsonl_lines(patterns: Iterable[str]) -> Iterator[Line | CorpusError]:
  """Yields the lines of JSON-lines files in order of path and line; skips blank ones.

  Of a file that cannot be decompressed, an error follows the lines before the fault.
  """
  for file, name in matching_files(patterns):
    number = 0
    with opened(file) as readable:
      try:
        for number, line in enumerate(_lines(readable), 1):
          if line.strip():
            yield Line(f"{name}:{number}", f"{utf8(file)}, line {number}", line)
      except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        where = f"{utf8(file)}, after line {number}"
        yield CorpusError(f"{where}: cannot be decompressed ({error})")


def _lines(file: io.BufferedIOBase) -> Iterator[bytes]:
  """Yields the lines of a file; of a line above `MAX_BYTES`, its beginning, which is above too."""
  while line := file.readline(MAX_BYTES + 1):
    yield line
    while len(line) > MAX_BYTES and not line.endswith(b"\n"):
      line = file.readline(MAX_BYTES + 1)


def _parse_line(line: bytes) -> Any:
  if len(line) > MAX_BYTES:
    raise CorpusError(f"the line is longer than {MAX_BYTES} bytes; cut it into several records")
  return json.loads(line.decode("utf-8-sig"))  # a file may begin with a byte order mark


def matching_files(patterns: Iterable[str]) -> list[tuple[str, str]]:
  """Returns (path, name) of the files, by path; names are relative to their common folder."""
  found = set()
  for pattern in patterns:
    # A path is a path before it is a pattern: `data[1].jsonl`.
    matches = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
    matches = [os.path.abspath(match) for match in matches if os.path.isfile(match)]
    if not matches:
      raise CorpusError(f"no file matches {pattern!r} (folders and pipes are not read)")
    found.update(matches)
  root = os.path.commonpath([os.path.dirname(file) for file in found])
  return [(file, utf8(pathlib.Path(file).relative_to(root))) for file in sorted(found)]


def plain_or_compressed(path: pathlib.Path) -> pathlib.Path:
  """Returns a path, or that of its compressed form (`.gz`, `.zst`) if only that exists."""
  if not path.exists():
    for suffix in (".gz", ".zst"):
      if (compressed := path.with_name(path.name + suffix)).exists():
        return compressed
  return path


def folder_files(folder: str, pattern: str) -> list[pathlib.Path]:
  """Returns the files of a folder that match, in order, relative to it; skips hidden ones.

  Raises:
    CorpusError: there is none.
  """
  root = pathlib.Path(folder)
  try:
    found = sorted(path.relative_to(root) for path in root.glob(pattern) if path.is_file())
  except (ValueError, NotImplementedError, OSError) as error:
    raise CorpusError(f"folder={folder!r}, pattern={pattern!r}: {error}") from error
  # The Finder writes hidden files next to others: `._name.txt`, which is no text.
  kept = [path for path in found if not any(part.startswith(".") for part in path.parts)]
  if not kept:
    raise CorpusError(f"no file of {folder} matches {pattern!r}")
  return kept


def read_text(path: pathlib.Path) -> str | CorpusError:
  """Returns the text of a file, or an error if it is too long or not UTF-8."""
  with opened(path) as readable:
    content = readable.read(MAX_BYTES + 1)
  try:
    if len(content) > MAX_BYTES:
      raise CorpusError(f"longer than {MAX_BYTES} bytes; cut it into several files")
    return content.decode("utf-8-sig")
  except ValueError as error:
    return CorpusError(f"{utf8(path)}: {fault(error)}")


@contextlib.contextmanager
def opened(file: str | os.PathLike) -> Iterator[io.BufferedIOBase]:
  """Opens a file to read, decompressing `.gz` and `.zst` in bounded memory.

  Raises:
    CorpusError: the file cannot be opened or read.
  """
  try:
    with open(file, "rb") as plain:
      match os.path.splitext(file)[1]:
        case ".gz":
          yield gzip.GzipFile(fileobj=plain)
        case ".zst":
          yield io.BufferedReader(_ZstdFile(plain))
        case _:
          yield plain
  except OSError as error:
    raise CorpusError(f"{utf8(file)}: {error.strerror or error}") from error


def utf8(path: str | os.PathLike) -> str:
  """Returns a path as text; bytes of its name that are not UTF-8 become escapes."""
  return os.fsencode(pathlib.PurePath(path).as_posix()).decode("utf-8", "backslashreplace")


def field(record: Any, name: str) -> str:
  """Returns a field as text; converts an integer, which may be an id or a group."""
  if not isinstance(record, dict) or name not in record:
    have = str(sorted(record))[:200] if isinstance(record, dict) else type(record).__name__
    raise CorpusError(f"no field {name!r}; the record has {have}")
  value = record[name]
  if isinstance(value, int) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str):
    raise CorpusError(f"field {name!r} is {type(value).__name__}, not text")
  value.encode("utf-8")  # raises for half a surrogate pair: JSON can spell it, UTF-8 cannot
  return value


def fault(error: ValueError | RecursionError) -> str:
  """Explains why a record is not a document."""
  if isinstance(error, RecursionError):
    return "JSON is nested too deeply"
  if isinstance(error, UnicodeDecodeError):
    return f"not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x})"
  if isinstance(error, UnicodeEncodeError):
    return f"half a surrogate pair at character {error.start}"
  if isinstance(error, json.JSONDecodeError):
    return f"not JSON: {error}"
  return str(error)


class _ZstdFile(io.RawIOBase):
  """Reads a file of zstd frames.

  `zstandard`'s own readers do not report that the last frame is truncated. This one raises EOFError
  for it, and for what is not zstd.
  """

  def __init__(self, file: io.BufferedIOBase):
    import zstandard

    self._file = file
    self._zstd = zstandard
    self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    self._frame: Any = None
    self._compressed = self._plain = b""

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._plain:
      self._compressed = self._compressed or self._file.read(_ZSTD_PIECE_BYTES)
      if not self._compressed:
        if self._frame is not None:
          raise EOFError("the last zstd frame is truncated")
        return 0
      self._frame = self._frame or self._decompressor.decompressobj()
      try:
        self._plain = memoryview(self._frame.decompress(self._compressed))
      except self._zstd.ZstdError as error:
        raise EOFError(str(error)) from error
      self._compressed = self._frame.unused_data
      self._frame = None if self._frame.eof else self._frame
    size = min(len(buffer), len(self._plain))
    buffer[:size], self._plain = self._plain[:size], self._plain[size:]
    return size
