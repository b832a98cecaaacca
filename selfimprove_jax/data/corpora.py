"""Sources of documents: a config section for each kind, and the reader that it configures.

Ids and groups contain no absolute path, so that a corpus is split the same way on every machine.
"""

import ast
import contextlib
import dataclasses
import glob
import gzip
import importlib.metadata
import importlib.util
import inspect
import json
import os
import pathlib
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import Field

from selfimprove_jax.runtime.config import section

_LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


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
    min_chars: shorter texts are left out; their indentation does not count.
    max_chars: longer texts are left out; None keeps all.
  """

  kind: Literal["docstrings"] = "docstrings"
  packages: tuple[str, ...] = ()
  min_chars: Annotated[int, Field(ge=0)] = 400
  max_chars: Annotated[int, Field(ge=1)] | None = None


@section
class JsonlConfig:
  """Selects records of JSON-lines files: plain, `.gz` or `.zst`.

  Attributes:
    paths: paths or glob patterns; `**` matches nested folders.
    id_field: None makes ids of the form "file:line".
    group_field: the field that holds the group (a book, a site); None makes each document its own
      group.
  """

  kind: Literal["jsonl"] = "jsonl"
  paths: Annotated[tuple[str, ...], Field(min_length=1)]
  text_field: str = "text"
  id_field: str | None = "id"
  group_field: str | None = None


@section
class TextFolderConfig:
  """Selects the files of a folder, one document each."""

  kind: Literal["text_folder"] = "text_folder"
  folder: str
  pattern: str = "**/*.txt"


@section
class HuggingFaceConfig:
  """Selects the records of a Hugging Face dataset (needs the extra `hub`).

  Attributes:
    name: a name on the hub, or a local folder.
    config_name: the dataset's configuration; None for its default.
    streaming: read records as they arrive instead of downloading the whole dataset first.
  """

  kind: Literal["huggingface"] = "huggingface"
  name: str
  split: str = "train"
  text_field: str = "text"
  config_name: str | None = None
  streaming: bool = True


SourceConfig = Annotated[
  DocstringsConfig | JsonlConfig | TextFolderConfig | HuggingFaceConfig,
  Field(discriminator="kind"),
]


def _raise(message: str) -> None:
  raise CorpusError(message)


def read_documents(
  source: SourceConfig, *, on_bad: Callable[[str], None] = _raise
) -> Iterator[Document]:
  """Yields the documents of a source in a fixed order.

  Args:
    on_bad: called with a message (file, line, fault) for each record that is not a document; the
      record is left out if it returns.

  Raises:
    CorpusError: while iterating: the source is missing; or, by default, a record is bad.
  """
  match source:
    case DocstringsConfig():
      return docstrings(source)
    case JsonlConfig():
      return jsonl(source, on_bad=on_bad)
    case TextFolderConfig():
      return text_folder(source, on_bad=on_bad)
    case _:
      return huggingface(source, on_bad=on_bad)


def docstrings(config: DocstringsConfig) -> Iterator[Document]:
  """Yields documentation strings in order of package, file and line; groups are module files.

  Files are parsed, never imported. Skips invalid Python and folders named test or tests.

  Raises:
    CorpusError: a package is not installed.
  """
  low, high = config.min_chars, config.max_chars
  for package in sorted(set(config.packages)) or _installed_packages():
    for name, path in sorted(_python_files(package).items()):
      for qualified_name, text in _docstrings_of_file(path):
        if low <= len(text) and (high is None or len(text) <= high):
          yield Document(f"{name}:{qualified_name}", name, text)


def jsonl(config: JsonlConfig, *, on_bad: Callable[[str], None] = _raise) -> Iterator[Document]:
  """Yields the records of JSON-lines files in order of path and line; skips blank lines.

  Raises:
    CorpusError: no file matches; or, by default, a line is not UTF-8, is not JSON or lacks a field.
  """
  files = set()
  for pattern in config.paths:
    matches = [m for m in glob.glob(pattern, recursive=True) if os.path.isfile(m)]
    if not matches:
      raise CorpusError(f"no file matches {pattern!r}")
    files.update(os.path.abspath(match) for match in matches)
  root = os.path.commonpath([os.path.dirname(file) for file in files])
  for file in sorted(files):
    name = pathlib.Path(file).relative_to(root).as_posix()
    for number, line in _numbered_lines(file, on_bad):
      try:
        record = json.loads(line.decode("utf-8"))
        text = _field(record, config.text_field)
        id_ = f"{name}:{number}" if config.id_field is None else _field(record, config.id_field)
        group = id_ if config.group_field is None else _field(record, config.group_field)
      except ValueError as error:
        on_bad(f"{file}, line {number}: {_fault(error)}")
      else:
        yield Document(id_, group, text)


def text_folder(
  config: TextFolderConfig, *, on_bad: Callable[[str], None] = _raise
) -> Iterator[Document]:
  """Yields one document per file in order of path; its group is its folder.

  Raises:
    CorpusError: no file matches; or, by default, a file is not UTF-8.
  """
  root = pathlib.Path(config.folder)
  files = sorted(path for path in root.glob(config.pattern) if path.is_file())
  if not files:
    raise CorpusError(f"no file of {config.folder} matches {config.pattern!r}")
  for path in files:
    try:
      text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
      on_bad(f"{path}: {_fault(error)}")
      continue
    relative = path.relative_to(root)
    yield Document(relative.as_posix(), relative.parent.as_posix(), text)


def huggingface(
  config: HuggingFaceConfig, *, on_bad: Callable[[str], None] = _raise
) -> Iterator[Document]:
  """Yields the records of a Hugging Face dataset, each its own group; ids are "name:split:index".

  Raises:
    CorpusError: the package `datasets` is not installed; or, by default, a record has no text.
  """
  try:
    import datasets
  except ImportError as error:
    raise CorpusError(
      "the source 'huggingface' needs the package `datasets`: pip install 'selfimprove_jax[hub]'"
    ) from error
  records = datasets.load_dataset(
    config.name, config.config_name, split=config.split, streaming=config.streaming
  )
  for index, record in enumerate(records):
    id_ = f"{config.name}:{config.split}:{index}"
    try:
      text = _field(record, config.text_field)
    except ValueError as error:
      on_bad(f"{config.name}, split {config.split}, record {index}: {_fault(error)}")
    else:
      yield Document(id_, id_, text)


def _field(record: Any, field: str) -> str:
  """Returns a field as text; an integer, which may be an id or a group, is converted."""
  if not isinstance(record, dict) or field not in record:
    have = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise CorpusError(f"no field {field!r}; the record has {have}")
  value = record[field]
  if isinstance(value, int) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str):
    raise CorpusError(f"field {field!r} is {type(value).__name__}, not text")
  value.encode("utf-8")  # raises for half a surrogate pair: JSON can spell it, UTF-8 cannot
  return value


def _fault(error: ValueError) -> str:
  """Describes what is wrong with a record."""
  if isinstance(error, UnicodeDecodeError):
    return f"not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x})"
  if isinstance(error, UnicodeEncodeError):
    return f"half a surrogate pair at character {error.start}"
  if isinstance(error, json.JSONDecodeError):
    return f"not JSON: {error}"
  return str(error)


def _numbered_lines(file: str, on_bad: Callable[[str], None]) -> Iterator[tuple[int, bytes]]:
  """Yields the lines of a file that are not blank, with their numbers from 1."""
  number = 0
  try:
    with contextlib.ExitStack() as stack:
      if file.endswith(".gz"):
        lines = stack.enter_context(gzip.open(file, "rb"))
      else:
        lines = stack.enter_context(open(file, "rb"))
        if file.endswith(".zst"):
          lines = _zstd_lines(lines)
      for number, line in enumerate(lines, 1):
        if line.strip():
          yield number, line
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    on_bad(f"{file}, after line {number}: cannot be decompressed ({error})")


def _zstd_lines(file: BinaryIO) -> Iterator[bytes]:
  """Yields the lines of a file of zstd frames.

  Raises:
    EOFError: the last frame is truncated, which `zstandard`'s own stream readers do not report.
  """
  import zstandard

  decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
  frame, tail = None, b""
  while chunk := file.read(1 << 20):
    while chunk:
      if frame is None:
        frame = decompressor.decompressobj()
      try:
        *lines, tail = (tail + frame.decompress(chunk)).split(b"\n")
      except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error
      yield from lines
      chunk = frame.unused_data
      frame = None if frame.eof else frame
  if frame is not None:
    raise EOFError("the last zstd frame is truncated")
  if tail:
    yield tail


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
  """Maps names ("numpy/linalg/_linalg.py") to paths, for each Python file of a package."""
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
      if not _LEFT_OUT_FOLDERS.intersection(relative.parts[:-1]):
        files.setdefault(f"{package}/{relative.as_posix()}", path)
  return files


def _docstrings_of_file(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields (qualified name, text) for each documentation string of a file."""
  source = path.read_bytes()
  if b'"""' not in source and b"'''" not in source:
    return  # avoids parsing most files; one-line strings are too short to keep
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # invalid escapes in other people's strings
      tree = ast.parse(source)
  except (SyntaxError, ValueError):  # ValueError: a null byte, before Python 3.11.4
    return
  seen: dict[str, int] = {}
  for name, text in _docstrings_of_node(tree, ""):
    try:
      text.encode("utf-8")
    except UnicodeEncodeError:
      continue  # it contains a lone surrogate, which UTF-8 cannot encode
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
