"""Reads documents from installed packages, JSON lines, Parquet, text folders and Hugging Face.

Ids and groups contain no absolute path, so a corpus is split the same way on every machine.
"""

import ast
import dataclasses
import functools
import importlib.metadata
import importlib.util
import inspect
import pathlib
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.data import files
from selfimprove_jax.data.files import CorpusError
from selfimprove_jax.runtime.config import section

_PARQUET_BATCH_ROWS = 64
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclasses.dataclass(frozen=True)
class Document:
  """A document; a split never separates the documents of one group (a book, a module)."""

  id: str
  group: str
  text: str


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
  for line in files.jsonl_lines(config.paths):
    if isinstance(line, CorpusError):
      yield line
    else:
      yield _document(config, line.parsed, line.id, line.where)


def _document(
  config: _RecordsConfig, read: Callable[[], Any], id_: str, where: str
) -> Document | CorpusError:
  """Makes a document of the record that `read` returns; `where` tells its place in errors."""
  try:
    record = read()
    text = files.field(record, config.text_field)
    id_ = id_ if config.id_field is None else files.field(record, config.id_field)
    group = id_ if config.group_field is None else files.field(record, config.group_field)
  except (ValueError, RecursionError) as error:
    return CorpusError(f"{where}: {files.fault(error)}")
  return Document(id_, group, text)


def _parquet(config: ParquetConfig) -> Iterator[Document | CorpusError]:
  """Yields the rows of Parquet files in order of path and row."""
  import pyarrow
  import pyarrow.parquet

  fields = {config.text_field, config.id_field, config.group_field} - {None}
  for file, name in files.matching_files(config.paths):
    number = 0
    with files.opened(file) as opened:
      try:
        table = pyarrow.parquet.ParquetFile(opened)
        columns = table.schema_arrow.names
        if missing := sorted(field for field in fields if columns.count(field) != 1):
          yield CorpusError(f"{files.utf8(file)}: not one column {missing[0]!r}; it has {columns}")
          continue
        for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=sorted(fields)):
          for row in range(batch.num_rows):
            number += 1
            where, read = f"{files.utf8(file)}, row {number}", functools.partial(_row, batch, row)
            yield _document(config, read, f"{name}:{number}", where)
      except (pyarrow.ArrowException, OSError) as error:
        yield CorpusError(f"{files.utf8(file)}, after row {number}: cannot be read ({error})")


def _row(batch: Any, row: int) -> dict[str, Any]:
  return {field: batch.column(field)[row].as_py() for field in batch.schema.names}


def _text_folder(config: TextFolderConfig) -> Iterator[Document | CorpusError]:
  """Yields one document per file in order of path."""
  root = pathlib.Path(config.folder)
  paths = files.folder_files(config.folder, config.pattern)
  alone = {pathlib.Path("."), *([paths[0].parent] if len({p.parent for p in paths}) == 1 else [])}
  for path in paths:
    text = files.read_text(root / path)
    if isinstance(text, CorpusError):
      yield text
    else:
      by_file = config.group_by == "file" or (config.group_by == "auto" and path.parent in alone)
      yield Document(files.utf8(path), files.utf8(path if by_file else path.parent), text)


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
  found = {}
  for root in roots:
    for path in root.rglob("*.py"):
      relative = path.relative_to(root)
      if path.is_file() and not _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
        found.setdefault(f"{package}/{relative.as_posix()}", path)
  return found


def _docstrings_of_file(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields (qualified name, text) for each documentation string of a file."""
  with files.opened(path) as opened:
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
