"""Where documents come from: each source is a generator of `Document` in a fixed order.

Ids and groups never hold an absolute path, so the same text gives the same split on any machine.
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

_LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclasses.dataclass(frozen=True)
class Document:
  """One document; documents of one group (book, module) are never parted by a split."""

  id: str
  group: str
  text: str


class CorpusError(ValueError):
  """A source is missing, or holds a record that is no document."""


def _raise(message: str) -> None:
  raise CorpusError(message)


def read_corpus(
  source: str,
  *,
  on_error: str = "raise",
  on_rejected: Callable[[str], None] | None = None,
  **options: Any,
) -> Iterator[Document]:
  """Documents of a source: "docstrings", "jsonl", "text_folder" or "huggingface".

  Args:
    on_error: "raise" ends at the first bad record; "skip" leaves it out and reports it.
    on_rejected: Called with one message (file, line, fault) for each record left out.
    options: The arguments of the function of that name.

  Raises:
    ValueError: unknown source or `on_error`, or "skip" with nobody to report to.
    CorpusError: while iterating; see the functions.
  """
  if source not in _READERS:
    raise ValueError(f"unknown corpus source {source!r}; known are {sorted(_READERS)}")
  if on_error not in ("raise", "skip"):
    raise ValueError(f"on_error is {on_error!r}; it is 'raise' or 'skip'")
  if on_error == "skip":
    if on_rejected is None:
      raise ValueError("on_error='skip' needs on_rejected, so that no record is lost unseen")
    if source != "docstrings":  # which has no records that could be bad
      options["on_bad"] = on_rejected
  return _READERS[source](**options)


def docstrings(
  packages: Sequence[str] = (), *, min_chars: int = 400, max_chars: int | None = None
) -> Iterator[Document]:
  """Documentation strings of installed packages, in order of package, file and line.

  Files are parsed, never imported; files that are not valid Python, and folders named test or
  tests, are passed over. The group of a document is its module file.

  Args:
    packages: Top-level import names; "stdlib" is the standard library. Empty means the standard
      library and every installed package but this one.
    min_chars: Shorter texts are left out, counted without their indentation.
    max_chars: Longer texts are left out.

  Raises:
    CorpusError: a package is not installed.
  """
  for package in sorted(set(packages)) if packages else _installed_packages():
    for name, path in sorted(_python_files(package).items()):
      for qualified_name, text in _docstrings_of_file(path):
        if len(text) >= min_chars and (max_chars is None or len(text) <= max_chars):
          yield Document(f"{name}:{qualified_name}", name, text)


def jsonl(
  paths: str | Sequence[str],
  *,
  text_field: str = "text",
  id_field: str | None = "id",
  group_field: str | None = None,
  on_bad: Callable[[str], None] = _raise,
) -> Iterator[Document]:
  """Records of JSON-lines files (plain, `.gz` or `.zst`), in order of path and line.

  Args:
    paths: Paths or glob patterns (`**` goes into folders). Blank lines are passed over.
    id_field: None gives ids "file:line".
    group_field: The field whose value is the group (a book, a site); None makes each document a
      group of its own.
    on_bad: Called with a message for a bad record; the record is left out if it returns.

  Raises:
    CorpusError: no file matches; or, by the default of `on_bad`, a line is not UTF-8, does not
      parse, or lacks a field.
  """
  patterns = [paths] if isinstance(paths, str) else list(paths)
  files = set()
  for pattern in patterns:
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
        text = _field(record, text_field)
        id_ = f"{name}:{number}" if id_field is None else _field(record, id_field)
        group = id_ if group_field is None else _field(record, group_field)
      except ValueError as error:
        on_bad(f"{file}, line {number}: {_fault(error)}")
      else:
        yield Document(id_, group, text)


def text_folder(
  folder: str, *, pattern: str = "**/*.txt", on_bad: Callable[[str], None] = _raise
) -> Iterator[Document]:
  """One document a file, in order of path; its group is the folder that holds it.

  Raises:
    CorpusError: no file matches; or, by the default of `on_bad`, a file is not UTF-8.
  """
  root = pathlib.Path(folder)
  files = sorted(path for path in root.glob(pattern) if path.is_file())
  if not files:
    raise CorpusError(f"no file of {folder} matches {pattern!r}")
  for path in files:
    try:
      text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
      on_bad(f"{path}: {_fault(error)}")
      continue
    relative = path.relative_to(root)
    yield Document(relative.as_posix(), relative.parent.as_posix(), text)


def huggingface(
  name: str,
  *,
  split: str = "train",
  text_field: str = "text",
  config_name: str | None = None,
  streaming: bool = True,
  on_bad: Callable[[str], None] = _raise,
) -> Iterator[Document]:
  """Records of a Hugging Face dataset, each a group of its own; ids are "name:split:index".

  Raises:
    CorpusError: `datasets` is not installed; or, by the default of `on_bad`, a record has no
      such text.
  """
  try:
    import datasets
  except ImportError as error:
    raise CorpusError(
      "the source 'huggingface' needs the package `datasets`: pip install 'selfimprove_jax[hub]'"
    ) from error
  records = datasets.load_dataset(name, config_name, split=split, streaming=streaming)
  for index, record in enumerate(records):
    id_ = f"{name}:{split}:{index}"
    try:
      text = _field(record, text_field)
    except ValueError as error:
      on_bad(f"{name}, split {split}, record {index}: {_fault(error)}")
    else:
      yield Document(id_, id_, text)


_READERS = {
  "docstrings": docstrings,
  "jsonl": jsonl,
  "text_folder": text_folder,
  "huggingface": huggingface,
}


def _field(record: Any, field: str) -> str:
  """The text in a field; numbers serve as ids and groups."""
  if not isinstance(record, dict) or field not in record:
    have = sorted(record) if isinstance(record, dict) else type(record).__name__
    raise CorpusError(f"no field {field!r}; the record has {have}")
  value = record[field]
  if isinstance(value, int) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str):
    raise CorpusError(f"field {field!r} is {type(value).__name__}, not text")
  value.encode("utf-8")  # JSON can spell half a surrogate pair, which no UTF-8 file can hold
  return value


def _fault(error: ValueError) -> str:
  if isinstance(error, UnicodeDecodeError):
    return f"not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x})"
  if isinstance(error, UnicodeEncodeError):
    return f"half a surrogate pair at character {error.start}"
  if isinstance(error, json.JSONDecodeError):
    return f"not JSON: {error}"
  return str(error)


def _numbered_lines(file: str, on_bad: Callable[[str], None]) -> Iterator[tuple[int, bytes]]:
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
  """Lines of a file of zstd frames; EOFError where the last frame is cut short.

  `zstandard`'s own stream readers end quietly there.
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
    raise EOFError("the last zstd frame is cut short")
  if tail:
    yield tail


def _installed_packages() -> list[str]:
  own = __name__.partition(".")[0]
  names = {
    name
    for name in importlib.metadata.packages_distributions()
    if name.isidentifier() and name != own and importlib.util.find_spec(name) is not None
  }
  return sorted({"stdlib"} | names)


def _python_files(package: str) -> dict[str, pathlib.Path]:
  """Name ("numpy/linalg/_linalg.py") -> path, of each Python file of a package."""
  if package == "stdlib":
    roots = [pathlib.Path(sysconfig.get_path("stdlib"))]
  else:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
      raise CorpusError(f"package {package!r} is not installed here; name import names or 'stdlib'")
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
  source = path.read_bytes()
  if b'"""' not in source and b"'''" not in source:
    return  # spares the parser most files; a text of one line is never long
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # odd escapes in other people's strings
      tree = ast.parse(source)
  except (SyntaxError, ValueError):  # ValueError: a null byte, before Python 3.11.4
    return
  seen: dict[str, int] = {}
  for name, text in _docstrings_of_node(tree, ""):
    try:
      text.encode("utf-8")
    except UnicodeEncodeError:
      continue  # a docstring about surrogates that holds one
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
