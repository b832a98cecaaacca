"""Reads documents from installed packages, JSON lines, Parquet, text folders and Hugging Face.

Ids and groups contain no absolute path, so a corpus is split the same way on every machine.
"""

import ast
import contextlib
import dataclasses
import functools
import glob
import gzip
import importlib.metadata
import importlib.util
import inspect
import io
import json
import os
import pathlib
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.runtime.config import section

# Of one line or text file. A line of any length would let a few kilobytes of zeros, decompressed,
# fill the memory.
_MAX_BYTES = 1 << 26
_ZSTD_PIECE_BYTES = 1 << 10  # 4 bytes can decompress to 128 KiB, so these to 32 MiB
_PARQUET_BATCH_ROWS = 64
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclasses.dataclass(frozen=True)
class Document:
  """A document; a split never separates the documents of one group (a book, a module)."""

  id: str
  group: str
  text: str


class CorpusError(ValueError):
  """A source is missing, or one of its records is not a document."""


@section
class DocstringsConfig:
  """Selects documentation strings of installed packages.

  Attributes:
    packages: top-level import names; "stdlib" is the standard library. Empty selects the standard
      library and every installed package except this one.
    min_chars: skips shorter texts; indentation does not count.
    max_chars: skips longer texts; None keeps all.
  """

  kind: Literal["docstrings"] = "docstrings"
  packages: tuple[str, ...] = ()
  min_chars: Annotated[int, Field(ge=0)] = 400
  max_chars: Annotated[int, Field(ge=1)] | None = None


@section
class _RecordsConfig:
  """Names the fields of records that are read.

  Attributes:
    text_field: holds the text.
    id_field: None makes ids of the form "file:number", where the number counts lines or rows.
    group_field: the field that holds the group (a book, a site); None makes each document its own
      group.
  """

  text_field: str = "text"
  id_field: str | None = None
  group_field: str | None = None


@section
class JsonlConfig(_RecordsConfig):
  """Selects records of JSON-lines files: plain, `.gz` or `.zst`.

  Attributes:
    paths: paths or glob patterns; `**` matches nested folders.
  """

  kind: Literal["jsonl"] = "jsonl"
  paths: Annotated[tuple[str, ...], Field(min_length=1)]


@section
class ParquetConfig(_RecordsConfig):
  """Selects rows of Parquet files; `paths` is that of `JsonlConfig`."""

  kind: Literal["parquet"] = "parquet"
  paths: Annotated[tuple[str, ...], Field(min_length=1)]


@section
class TextFolderConfig:
  """Selects the files of a folder, one document each; skips hidden files.

  Attributes:
    group_by: "folder" groups the files of each subfolder, "file" makes each file its own group, and
      so does "auto" with files outside subfolders, or if there is only one subfolder.
  """

  kind: Literal["text_folder"] = "text_folder"
  folder: str
  pattern: str = "**/*.txt"
  group_by: Literal["auto", "file", "folder"] = "auto"


@section
class HuggingFaceConfig(_RecordsConfig):
  """Selects the records of a Hugging Face dataset (needs the extra `hub`).

  Attributes:
    name: a name on the hub, or a local folder: of data files, or written by `save_to_disk`.
    config_name: the dataset's configuration; None for its default.
    streaming: read records as they arrive instead of downloading the whole dataset first.
  """

  kind: Literal["huggingface"] = "huggingface"
  name: str
  split: str = "train"
  config_name: str | None = None
  streaming: bool = True


SourceConfig = Annotated[
  DocstringsConfig | JsonlConfig | ParquetConfig | TextFolderConfig | HuggingFaceConfig,
  Field(discriminator="kind"),
]


def read_documents(
  source: SourceConfig, *, on_bad: Callable[[str], None] | None = None
) -> Iterator[Document]:
  """Yields the documents of a source in a fixed order.

  Args:
    on_bad: called with a message (file, line, fault) for each record that is not a document, which
      is then skipped; None raises the message.

  Raises:
    CorpusError: while iterating: the source is missing or cannot be read, or a record is bad and
      `on_bad` is None.
  """
  for found in _READERS[type(source)](source):
    if isinstance(found, Document):
      yield found
    elif on_bad is None:
      raise found
    else:
      on_bad(str(found))


def _docstrings(config: DocstringsConfig) -> Iterator[Document]:
  """Yields docstrings in order of package, file and line; parses the files, never imports them."""
  low, high = config.min_chars, config.max_chars
  for package in sorted(set(config.packages)) or _installed_packages():
    for name, path in sorted(_python_files(package).items()):
      for qualified_name, text in _docstrings_of_file(path):
        if low <= len(text) and (high is None or len(text) <= high):
          yield Document(f"{name}:{qualified_name}", name, text)


def _jsonl(config: JsonlConfig) -> Iterator[Document | CorpusError]:
  """Yields the records of JSON-lines files in order of path and line; skips blank lines."""
  for file, name in _matching_files(config.paths):
    number = 0
    with _opened(file) as opened:
      try:
        for number, line in enumerate(_lines(opened), 1):
          if line.strip():
            where, read = f"{_utf8(file)}, line {number}", functools.partial(_parse_line, line)
            yield _document(config, read, f"{name}:{number}", where)
      except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        where = f"{_utf8(file)}, after line {number}"
        yield CorpusError(f"{where}: cannot be decompressed ({error})")


def _lines(file: io.BufferedIOBase) -> Iterator[bytes]:
  """Yields the lines of a file; of a line above `_MAX_BYTES`, its beginning, which is above too."""
  while line := file.readline(_MAX_BYTES + 1):
    yield line
    while len(line) > _MAX_BYTES and not line.endswith(b"\n"):
      line = file.readline(_MAX_BYTES + 1)


def _parse_line(line: bytes) -> Any:
  if len(line) > _MAX_BYTES:
    raise CorpusError(f"the line is longer than {_MAX_BYTES} bytes; cut it into several records")
  return json.loads(line.decode("utf-8-sig"))  # a file may begin with a byte order mark


def _document(
  config: _RecordsConfig, read: Callable[[], Any], id_: str, where: str
) -> Document | CorpusError:
  """Makes a document of the record that `read` returns; `where` tells its place in errors."""
  try:
    record = read()
    text = _field(record, config.text_field)
    id_ = id_ if config.id_field is None else _field(record, config.id_field)
    group = id_ if config.group_field is None else _field(record, config.group_field)
  except (ValueError, RecursionError) as error:
    return CorpusError(f"{where}: {_fault(error)}")
  return Document(id_, group, text)


def _parquet(config: ParquetConfig) -> Iterator[Document | CorpusError]:
  """Yields the rows of Parquet files in order of path and row."""
  import pyarrow
  import pyarrow.parquet

  fields = {config.text_field, config.id_field, config.group_field} - {None}
  for file, name in _matching_files(config.paths):
    number = 0
    with _opened(file) as opened:
      try:
        table = pyarrow.parquet.ParquetFile(opened)
        columns = table.schema_arrow.names
        if missing := sorted(field for field in fields if columns.count(field) != 1):
          yield CorpusError(f"{_utf8(file)}: not one column {missing[0]!r}; it has {columns}")
          continue
        for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=sorted(fields)):
          for row in range(batch.num_rows):
            number += 1
            where, read = f"{_utf8(file)}, row {number}", functools.partial(_row, batch, row)
            yield _document(config, read, f"{name}:{number}", where)
      except (pyarrow.ArrowException, OSError) as error:
        yield CorpusError(f"{_utf8(file)}, after row {number}: cannot be read ({error})")


def _row(batch: Any, row: int) -> dict[str, Any]:
  return {field: batch.column(field)[row].as_py() for field in batch.schema.names}


def _text_folder(config: TextFolderConfig) -> Iterator[Document | CorpusError]:
  """Yields one document per file in order of path."""
  root = pathlib.Path(config.folder)
  try:
    found = sorted(path.relative_to(root) for path in root.glob(config.pattern) if path.is_file())
  except (ValueError, NotImplementedError, OSError) as error:
    raise CorpusError(f"folder={config.folder!r}, pattern={config.pattern!r}: {error}") from error
  # The Finder writes hidden files next to others: `._name.txt`, which is no text.
  files = [path for path in found if not any(part.startswith(".") for part in path.parts)]
  if not files:
    raise CorpusError(f"no file of {config.folder} matches {config.pattern!r}")
  alone = {pathlib.Path("."), *([files[0].parent] if len({f.parent for f in files}) == 1 else [])}
  for file in files:
    with _opened(root / file) as opened:
      data = opened.read(_MAX_BYTES + 1)
    try:
      if len(data) > _MAX_BYTES:
        raise CorpusError(f"longer than {_MAX_BYTES} bytes; cut it into several files")
      text = data.decode("utf-8-sig")
    except ValueError as error:
      yield CorpusError(f"{_utf8(root / file)}: {_fault(error)}")
    else:
      by_file = config.group_by == "file" or (config.group_by == "auto" and file.parent in alone)
      yield Document(_utf8(file), _utf8(file if by_file else file.parent), text)


def _huggingface(config: HuggingFaceConfig) -> Iterator[Document | CorpusError]:
  """Yields a dataset's records, with ids "name:split:index"."""
  where = f"{config.name}, split {config.split}"
  folder = pathlib.Path(config.name)
  name = f"{folder.resolve().name if folder.is_dir() else config.name}:{config.split}"
  for index, record in enumerate(_dataset(config, where)):
    yield _document(config, lambda r=record: r, f"{name}:{index}", f"{where}, record {index}")


def _dataset(config: HuggingFaceConfig, where: str) -> Iterator[Any]:
  """Yields the records of a dataset; never runs code that comes with it."""
  try:
    import datasets
  except ImportError as error:
    raise CorpusError(
      "the source 'huggingface' needs the package `datasets`: pip install 'selfimprove_jax[hub]'"
    ) from error
  try:
    saved = ("state.json", "dataset_dict.json")
    if any(pathlib.Path(config.name, file).is_file() for file in saved):
      records = datasets.load_from_disk(config.name)
      if isinstance(records, dict):
        if config.split not in records:
          raise ValueError(f"the folder has the splits {sorted(records)}")
        records = records[config.split]
    else:
      records = datasets.load_dataset(
        config.name,
        config.config_name,
        split=config.split,
        streaming=config.streaming,
        trust_remote_code=False,
      )
    yield from records
  except Exception as error:  # the library has its own for networks, files, formats and versions
    raise CorpusError(f"{where}: {type(error).__name__}: {error}") from error


_READERS: dict[type, Callable[[Any], Iterator[Document | CorpusError]]] = {
  DocstringsConfig: _docstrings,
  JsonlConfig: _jsonl,
  ParquetConfig: _parquet,
  TextFolderConfig: _text_folder,
  HuggingFaceConfig: _huggingface,
}


def _matching_files(patterns: Iterable[str]) -> list[tuple[str, str]]:
  """Returns (path, name) of the files, by path; names are relative to their common folder."""
  files = set()
  for pattern in patterns:
    # A path is a path before it is a pattern: `data[1].jsonl`.
    matches = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
    matches = [os.path.abspath(match) for match in matches if os.path.isfile(match)]
    if not matches:
      raise CorpusError(f"no file matches {pattern!r} (folders and pipes are not read)")
    files.update(matches)
  root = os.path.commonpath([os.path.dirname(file) for file in files])
  return [(file, _utf8(pathlib.Path(file).relative_to(root))) for file in sorted(files)]


@contextlib.contextmanager
def _opened(file: str | os.PathLike) -> Iterator[io.BufferedIOBase]:
  """Opens a file to read what `.gz` or `.zst` hold, in bounded memory."""
  try:
    with open(file, "rb") as opened:
      match os.path.splitext(file)[1]:
        case ".gz":
          yield gzip.GzipFile(fileobj=opened)
        case ".zst":
          yield io.BufferedReader(_ZstdFile(opened))
        case _:
          yield opened
  except OSError as error:
    raise CorpusError(f"{_utf8(file)}: {error.strerror or error}") from error


def _utf8(path: str | os.PathLike) -> str:
  """Returns a path as text; bytes of its name that are not UTF-8 become escapes."""
  return os.fsencode(pathlib.PurePath(path).as_posix()).decode("utf-8", "backslashreplace")


def _field(record: Any, field: str) -> str:
  """Returns a field as text; converts an integer, which may be an id or a group."""
  if not isinstance(record, dict) or field not in record:
    have = str(sorted(record))[:200] if isinstance(record, dict) else type(record).__name__
    raise CorpusError(f"no field {field!r}; the record has {have}")
  value = record[field]
  if isinstance(value, int) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str):
    raise CorpusError(f"field {field!r} is {type(value).__name__}, not text")
  value.encode("utf-8")  # raises for half a surrogate pair: JSON can spell it, UTF-8 cannot
  return value


def _fault(error: ValueError | RecursionError) -> str:
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


def _installed_packages() -> list[str]:
  """Returns "stdlib" and the import names of all installed packages but this one."""
  own = __name__.partition(".")[0]  # or the corpus would change with our own code
  names = {
    name
    for name in importlib.metadata.packages_distributions()
    if name.isidentifier() and name != own and importlib.util.find_spec(name) is not None
  }
  return sorted({"stdlib"} | names)


def _python_files(package: str) -> dict[str, pathlib.Path]:
  """Maps names ("numpy/linalg/_linalg.py") to paths for all Python files of a package."""
  if package == "stdlib":
    roots = [pathlib.Path(sysconfig.get_path("stdlib"))]
  else:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
      raise CorpusError(f"package {package!r} is not installed; give import names, or 'stdlib'")
    if spec.submodule_search_locations is None:
      path = pathlib.Path(spec.origin or "")
      return {path.name: path} if path.suffix == ".py" else {}
    roots = [pathlib.Path(location) for location in spec.submodule_search_locations]
  files = {}
  for root in roots:
    for path in root.rglob("*.py"):
      relative = path.relative_to(root)
      if path.is_file() and not _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
        files.setdefault(f"{package}/{relative.as_posix()}", path)
  return files


def _docstrings_of_file(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields (qualified name, text) for each documentation string of a file."""
  with _opened(path) as opened:
    source = opened.read()
  if b'"""' not in source and b"'''" not in source:
    return  # avoids parsing most files; one-line strings are too short to keep
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # invalid escapes in other people's strings
      found = list(_docstrings_of_node(ast.parse(source), ""))
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return  # ValueError: a null byte, before Python 3.11.4; the last two: nested too deeply
  seen: dict[str, int] = {}
  for name, text in found:
    try:
      text.encode("utf-8")
    except UnicodeEncodeError:
      continue  # a lone surrogate has no UTF-8
    seen[name] = seen.get(name, 0) + 1  # a property's getter and setter share a name
    yield (name if seen[name] == 1 else f"{name}@{seen[name]}"), text


def _docstrings_of_node(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
  if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
    text = ast.get_docstring(node, clean=False)
    if text is not None:
      yield prefix or "__doc__", inspect.cleandoc(text)
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      yield from _docstrings_of_node(child, f"{prefix}.{child.name}" if prefix else child.name)
    elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
      yield from _docstrings_of_node(child, prefix)
