"""Reads source documents and the questions that are asked about them.

A document that occurs twice with one text is one document with the questions of both, so that a
split cannot have it on both sides. Texts are compared without their white space.
"""

import contextlib
import dataclasses
import difflib
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.data import files
from selfimprove_jax.data.files import CorpusError
from selfimprove_jax.runtime.config import section

_HEADING = re.compile(r"\s*(\S[^\n]{0,99})\n\s*by\s+(\S[^\n]{0,99})\n", re.IGNORECASE)
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", ".org", ".adoc")
_CODE_SUFFIXES = (
  *(".py", ".js", ".ts", ".java", ".kt", ".scala", ".go", ".rs", ".rb", ".jl", ".r", ".hs", ".ml"),
  *(
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".cs",
    ".swift",
    ".lua",
    ".pl",
    ".php",
    ".sh",
    ".sql",
  ),
)


@dataclasses.dataclass(frozen=True)
class SourceQuestion:
  """A question about a document.

  Attributes:
    id: unique among the questions of all documents.
    choices: empty for an open question.
    gold: index of the right choice; None without choices.
    short_answers: accepted answers of a few words; the first one is the main one.
    kind: what the source calls such questions, such as "fact" or "relation"; may be empty.
    is_hard: None where the source does not say.
    references: long reference answers, such as summaries.
  """

  id: str
  question: str
  choices: tuple[str, ...]
  gold: int | None
  short_answers: tuple[str, ...]
  kind: str = ""
  is_hard: bool | None = None
  references: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SourceDocument:
  """A document to learn from; `title`, `author` and `year` may be empty."""

  id: str
  title: str
  author: str
  year: str
  text: str
  questions: tuple[SourceQuestion, ...]

  @property
  def name(self) -> str:
    """What prompts call the document: its title, or its id where it has none."""
    return self.title or self.id


@section
class _SelectionConfig:
  """Selects documents of a source.

  Attributes:
    documents: ids of the documents to keep; empty keeps all.
    max_documents: keeps the first ones of those; None keeps all.
  """

  documents: tuple[str, ...] = ()
  max_documents: Annotated[int, Field(ge=1)] | None = None


@section
class QualityConfig(_SelectionConfig):
  """Selects QuALITY articles (arXiv 2112.08608): its JSON-lines files, plain, `.gz` or `.zst`.

  A line holds an article and the questions of one writer. Lines of equal title and author are one
  document, and so are lines without a title of equal `article_id`.

  Attributes:
    paths: paths or glob patterns; `**` matches nested folders.
  """

  kind: Literal["quality"] = "quality"
  paths: Annotated[tuple[str, ...], Field(min_length=1)]


@section
class SqualityConfig(_SelectionConfig):
  """Selects SQuALITY stories (arXiv 2205.11465), whose summaries become `references`.

  Attributes:
    paths: as in `QualityConfig`.
  """

  kind: Literal["squality"] = "squality"
  paths: Annotated[tuple[str, ...], Field(min_length=1)]


@section
class QuestionFieldsConfig:
  """Names the fields of a question's record; a record may lack all but `question`.

  Attributes:
    choices: a list of texts; a record that has them must have `gold`, too.
    gold: the number of the right choice.
    first_gold: the number of the first choice.
    short_answers: a text or a list of texts.
    is_hard: true or false, or 1 or 0.
  """

  id: str = "id"
  question: str = "question"
  choices: str = "choices"
  gold: str = "gold"
  first_gold: Literal[0, 1] = 0
  short_answers: str = "short_answers"
  kind: str = "kind"
  is_hard: str = "is_hard"


@section
class JsonlSourcesConfig(_SelectionConfig):
  """Selects records of JSON-lines files: plain, `.gz` or `.zst`.

  Attributes:
    paths: as in `QualityConfig`.
    id_field: None makes ids of the form "file:number", where the number counts lines.
    title_field, author_field, year_field, questions_field: a record may lack these fields.
    questions_field: a list of records with the fields that `question_fields` names.
  """

  kind: Literal["jsonl"] = "jsonl"
  paths: Annotated[tuple[str, ...], Field(min_length=1)]
  text_field: str = "text"
  id_field: str | None = "id"
  title_field: str = "title"
  author_field: str = "author"
  year_field: str = "year"
  questions_field: str = "questions"
  question_fields: QuestionFieldsConfig = QuestionFieldsConfig()


@section
class FolderSourcesConfig(_SelectionConfig):
  """Selects the files of a folder, one document each, whose id and title are its path in it.

  Skips hidden files, and empty ones, such as an `__init__.py`.

  Attributes:
    suffixes: ends of the names of files to read; empty reads all that match the pattern.
  """

  kind: Literal["folder"] = "folder"
  folder: str
  pattern: str = "**/*"
  suffixes: tuple[str, ...] = (*_TEXT_SUFFIXES, *_CODE_SUFFIXES)


@section
class NicheConfig(_SelectionConfig):
  """Selects the subfolders of a folder, one document each.

  A subfolder has `document.jsonl`, one record with `id`, `title` and `text`; and
  `questions.jsonl`, whose records have `document` (the id), `question`, and where they apply `id`,
  `choices`, `answer` (from 0), `short_answers` and `kind`.
  """

  kind: Literal["niche"] = "niche"
  folder: str


SourceDocumentsConfig = Annotated[
  QualityConfig | SqualityConfig | JsonlSourcesConfig | FolderSourcesConfig | NicheConfig,
  Field(discriminator="kind"),
]

_QUALITY_QUESTION = QuestionFieldsConfig(
  id="question_unique_id",
  choices="options",
  gold="gold_label",
  first_gold=1,
  is_hard="difficult",
)
_NICHE_QUESTION = QuestionFieldsConfig(gold="answer")


def read_sources(config: SourceDocumentsConfig) -> list[SourceDocument]:
  """Returns the documents of a source in a fixed order.

  Raises:
    CorpusError: a file is missing or cannot be read, a record is not a document or a question, an
      id stands for two texts or two questions, or no document is left.
  """
  documents = _merged(_READERS[type(config)](config))
  if not documents:
    raise CorpusError(f"the source {config.kind!r} has no documents: its files are empty")
  ids = [document.id for document in documents]
  for id_ in config.documents:
    if id_ not in ids:
      nearest = ", ".join(map(repr, difflib.get_close_matches(id_, ids, n=3, cutoff=0.0)))
      raise CorpusError(f"documents: there is no document {id_!r}; the nearest ids are {nearest}")
  kept = [one for one in documents if not config.documents or one.id in config.documents]
  return kept[: config.max_documents]


@dataclasses.dataclass(frozen=True)
class SourceSplit:
  """The ids of the documents in each split, in order of title."""

  validation: tuple[str, ...]
  test: tuple[str, ...]


def split_sources(documents: Sequence[SourceDocument], validation_fraction: float) -> SourceSplit:
  """Splits documents in order of title; the first ones are for validation (the paper: 20%).

  Documents of equal title and author, such as two editions of a story, are in one split.

  Raises:
    ValueError: the fraction is not in [0, 1].
  """
  if not 0 <= validation_fraction <= 1:
    raise ValueError(f"validation_fraction is {validation_fraction}; it must be in [0, 1]")
  ordered = sorted(documents, key=lambda document: (*_folded(document), document.id))
  cut = round(validation_fraction * len(ordered))
  while 0 < cut < len(ordered) and _folded(ordered[cut]) == _folded(ordered[cut - 1]):
    cut += 1
  ids = tuple(document.id for document in ordered)
  return SourceSplit(ids[:cut], ids[cut:])


def _folded(document: SourceDocument) -> tuple[str, str]:
  return document.name.casefold(), document.author.casefold()


@dataclasses.dataclass
class _Found:
  """A document as one record has it; its questions may lack ids.

  Attributes:
    where: its place, for errors.
    keys: records that share one of these are one document.
  """

  where: str
  document: SourceDocument
  keys: tuple[str, ...] = ()

  @property
  def id(self) -> str:
    return self.document.id

  @property
  def plain_text(self) -> str:
    return " ".join(self.document.text.split())


def _merged(records: Iterable[_Found]) -> list[SourceDocument]:
  """Joins the records of one document, and gives ids to questions without one."""
  first_by_key: dict[tuple[str, str], _Found] = {}
  questions: dict[str, list[SourceQuestion]] = {}
  documents: dict[str, SourceDocument] = {}
  for found in records:
    plain_text = found.plain_text
    if not plain_text:
      raise CorpusError(f"{found.where}: the text of document {found.id!r} is empty")
    keys = [("id", found.id), *(("key", key) for key in found.keys), ("text", plain_text)]
    first = next((first_by_key[key] for key in keys if key in first_by_key), found)
    if first.plain_text != plain_text:
      raise CorpusError(
        f"{found.where}: document {found.id!r} is also in {first.where}, with another text; "
        f"remove one of them or give it another id"
      )
    for key in keys:
      first_by_key.setdefault(key, first)
    documents.setdefault(first.id, first.document)
    questions.setdefault(first.id, []).extend(found.document.questions)
  merged = [
    dataclasses.replace(document, questions=_numbered(id_, questions[id_]))
    for id_, document in documents.items()
  ]
  owners: dict[str, str] = {}
  for document in merged:
    for question in document.questions:
      if question.id in owners:
        raise CorpusError(
          f"the id {question.id!r} is that of two questions, about {owners[question.id]!r} and "
          f"about {document.id!r}; each question needs an id of its own"
        )
      owners[question.id] = document.id
  return merged


def _numbered(id_: str, questions: Iterable[SourceQuestion]) -> tuple[SourceQuestion, ...]:
  """Returns the questions without duplicates, those without an id as "document:number"."""
  unique: dict[Any, SourceQuestion] = {}
  for question in questions:
    # The id and the hardness are the annotators', and may differ for one question.
    unique.setdefault(dataclasses.replace(question, id="", is_hard=None), question)
  return tuple(
    dataclasses.replace(question, id=question.id or f"{id_}:{number}")
    for number, question in enumerate(unique.values(), 1)
  )


def _quality(config: QualityConfig) -> Iterator[_Found]:
  for line, record in _records(config.paths):
    with _explained(line.where):
      text, id_ = files.field(record, "article"), files.field(record, "article_id")
      title, author = _optional(record, "title"), _first_last(_optional(record, "author"))
      keys = (f"{title} by {author}",) if title else ()
      if not title:
        title, author = _heading(text)
      questions = _questions(record, "questions", _QUALITY_QUESTION)
      year = _optional(record, "year")
      yield _Found(line.where, SourceDocument(id_, title, author, year, text, questions), keys)


def _squality(config: SqualityConfig) -> Iterator[_Found]:
  for line, record in _records(config.paths):
    with _explained(line.where):
      text = files.field(record, "document")
      id_ = files.field(record.get("metadata"), "passage_id")
      questions = []
      for number, asked in enumerate(_list(record, "questions"), 1):
        with _explained(f"question {number} of document {id_!r}"):
          questions.append(
            SourceQuestion(
              id="",
              question=_stripped(asked, "question_text"),
              choices=(),
              gold=None,
              short_answers=(),
              kind="plot" if asked.get("question_number") == 1 else "",
              references=tuple(_stripped(r, "response_text") for r in _list(asked, "responses")),
            )
          )
      title, author = _heading(text)
      yield _Found(line.where, SourceDocument(id_, title, author, "", text, tuple(questions)))


def _jsonl(config: JsonlSourcesConfig) -> Iterator[_Found]:
  for line, record in _records(config.paths):
    with _explained(line.where):
      text = files.field(record, config.text_field)
      document = SourceDocument(
        id=line.id if config.id_field is None else _stripped(record, config.id_field),
        title=_optional(record, config.title_field),
        author=_optional(record, config.author_field),
        year=_optional(record, config.year_field),
        text=text,
        questions=_questions(record, config.questions_field, config.question_fields),
      )
      yield _Found(line.where, document)


def _folder(config: FolderSourcesConfig) -> Iterator[_Found]:
  root = pathlib.Path(config.folder)
  suffixes = config.suffixes
  paths = files.folder_files(config.folder, config.pattern)
  kept = [path for path in paths if not suffixes or path.name.lower().endswith(suffixes)]
  if not kept:
    raise CorpusError(
      f"no file of {config.folder} that matches {config.pattern!r} has one of the suffixes "
      f"{', '.join(suffixes)}"
    )
  for path in kept:
    text, name = files.read_text(root / path), files.utf8(path)
    if isinstance(text, CorpusError):
      raise text
    if text.strip():
      yield _Found(files.utf8(root / path), SourceDocument(name, name, "", "", text, ()))


def _niche(config: NicheConfig) -> Iterator[_Found]:
  root = pathlib.Path(config.folder)
  if not root.is_dir():
    raise CorpusError(f"folder={config.folder!r} is not a folder")
  folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
  if not folders:
    raise CorpusError(f"folder={config.folder!r} has no subfolders; each document is one")
  for folder in folders:
    lines = list(_records((str(files.plain_or_compressed(folder / "document.jsonl")),)))
    if len(lines) != 1:
      raise CorpusError(f"{folder / 'document.jsonl'}: {len(lines)} records; there must be one")
    [(line, record)] = lines
    with _explained(line.where):
      id_ = _stripped(record, "id")
      title, author, year = (_optional(record, name) for name in ("title", "author", "year"))
      text = files.field(record, "text")
    questions = []
    asked_file = files.plain_or_compressed(folder / "questions.jsonl")
    for asked, question in _records((str(asked_file),)):
      with _explained(asked.where):
        if (owner := files.field(question, "document")) != id_:
          raise CorpusError(f"document is {owner!r}; the document of this folder is {id_!r}")
        questions.append(_question(question, _NICHE_QUESTION))
    document = SourceDocument(id_, title, author, year, text, tuple(questions))
    yield _Found(line.where, document)


_READERS: dict[type, Callable[[Any], Iterator[_Found]]] = {
  QualityConfig: _quality,
  SqualityConfig: _squality,
  JsonlSourcesConfig: _jsonl,
  FolderSourcesConfig: _folder,
  NicheConfig: _niche,
}


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
  """Turns errors about a record into errors that name its place."""
  try:
    yield
  except (ValueError, RecursionError) as error:
    raise CorpusError(f"{where}: {files.fault(error)}") from error


def _records(paths: Iterable[str]) -> Iterator[tuple[files.Line, Any]]:
  """Yields the records of JSON-lines files, each with its line."""
  for line in files.jsonl_lines(paths):
    if isinstance(line, CorpusError):
      raise line
    with _explained(line.where):
      record = line.parsed()
    yield line, record


def _questions(record: Any, name: str, fields: QuestionFieldsConfig) -> tuple[SourceQuestion, ...]:
  """Returns the questions of a document's record."""
  questions = []
  for number, asked in enumerate(_list(record, name), 1):
    with _explained(f"question {number}"):
      questions.append(_question(asked, fields))
  return tuple(questions)


def _question(record: Any, fields: QuestionFieldsConfig) -> SourceQuestion:
  question = _stripped(record, fields.question)
  id_ = _optional(record, fields.id)
  with _explained(f"the question {id_ or question!r}"):
    choices = _texts(record, fields.choices)
    if len(choices) == 1:
      raise CorpusError(f"{fields.choices!r} has one choice; there must be two or more, or none")
    return SourceQuestion(
      id=id_,
      question=question,
      choices=choices,
      gold=_gold(record, fields, len(choices)) if choices else None,
      short_answers=_texts(record, fields.short_answers),
      kind=_optional(record, fields.kind),
      is_hard=_flag(record, fields.is_hard),
    )


def _gold(record: dict[str, Any], fields: QuestionFieldsConfig, number: int) -> int:
  """Returns the index of the right choice, from 0."""
  first, gold = fields.first_gold, record.get(fields.gold)
  rule = f"the number of the right choice, from {first} to {first + number - 1}"
  if gold is None:
    raise CorpusError(f"there is no {fields.gold!r}, {rule}")
  if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold - first < number:
    raise CorpusError(f"{fields.gold!r} is {gold!r}; it must be {rule}")
  return gold - first


def _flag(record: dict[str, Any], name: str) -> bool | None:
  value = record.get(name)
  if value is not None and value not in (0, 1):
    raise CorpusError(f"{name!r} is {value!r}; it must be true or false, or 1 or 0")
  return None if value is None else bool(value)


def _texts(record: dict[str, Any], name: str) -> tuple[str, ...]:
  """Returns a field's texts, which may be one text; none where the field is missing or null."""
  value = record.get(name)
  if value is None:
    return ()
  texts = [value] if isinstance(value, str) else value
  if not isinstance(texts, list):
    raise CorpusError(f"{name!r} is {type(value).__name__}, not a list of texts")
  return tuple(_stripped({name: text}, name) for text in texts)


def _list(record: Any, name: str) -> list[Any]:
  """Returns a field's list; an empty one where the field is missing or null."""
  value = record.get(name) if isinstance(record, dict) else None
  if value is not None and not isinstance(value, list):
    raise CorpusError(f"{name!r} is {type(value).__name__}, not a list of records")
  return value or []


def _stripped(record: Any, name: str) -> str:
  text = files.field(record, name).strip()
  if not text:
    raise CorpusError(f"{name!r} is empty")
  return text


def _optional(record: Any, name: str) -> str:
  """Returns a field as text; an empty one where the field is missing or null."""
  return "" if record.get(name) is None else files.field(record, name).strip()


def _first_last(author: str) -> str:
  """Turns "Last, First" into "First Last", and keeps what follows, such as "Jr."."""
  last, *rest = (part.strip() for part in author.split(","))
  return ", ".join([f"{rest[0]} {last}", *rest[1:]]) if rest else last


def _heading(text: str) -> tuple[str, str]:
  """Returns title and author of a text that begins with a title and a line "By ..."."""
  match = _HEADING.match(text)
  if match is None:
    return "", ""
  title, author = (" ".join(part.split()) for part in match.groups())
  return title, author
