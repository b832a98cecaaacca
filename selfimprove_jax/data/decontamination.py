"""Finds documents that contain items of benchmarks, so that they can be left out of training text.

A document contains an item if it has 13 consecutive words of it, or the whole of a shorter item, up
to case, punctuation and white space. 13 words are those of GPT-3 (arXiv 2005.14165, appendix C).
Containment, since a question in a long document overlaps too little with it for Jaccard. Documents
stream by; memory holds hashes of the benchmarks.
"""

import array
import collections
import gzip
import heapq
import itertools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from selfimprove_jax.data import shingles
from selfimprove_jax.data.corpora import Document
from selfimprove_jax.runtime.config import section

# The fields of a record that ask; the first one that it has is read. Passages (`support`,
# `article`) are not checked: a text about them is what a model may learn from.
_PROMPTS = ("question", "query", "problem", "qText", "prompt", "context", "text")
_ANSWERS = ("correct_answer", "solution", "continuation", "answers", "answer")
_CHOICES = ("choices", "options")
_NUM_SHOWN_ITEMS = 3
_SUFFIXES = (".jsonl", ".jsonl.gz")


@section
class DecontaminationConfig:
  """Configures the search for items of benchmarks in training text.

  Attributes:
    data_dir: a folder with a JSON-lines file for each task (`.jsonl` or `.jsonl.gz`), whose name is
      that of the file. With None, a pipeline checks against the benchmarks that it scores, if any.
    tasks: the tasks that are read; empty reads all files.
    action: "drop" leaves out the documents that contain an item, "mark" only lists them, "off"
      checks nothing.
    run_words: items share this many consecutive words with a document that contains them; two
      characters of a script without spaces count as one word.
    min_words: texts of items that are shorter are not looked for; the items that have no others are
      counted. In 3.6 M words of encyclopedia, textbooks and stories, those of 3 or 4 words were
      found 17 times ("oxygen is used"), those of 5 words 3 times, those of 6 to 12 words never.
    num_worst: documents to show, those with the most items.
  """

  data_dir: str | None = None
  tasks: tuple[str, ...] = ()
  action: Literal["drop", "mark", "off"] = "drop"
  run_words: Annotated[int, Field(ge=2)] = 13
  min_words: Annotated[int, Field(ge=1)] = 5
  num_worst: Annotated[int, Field(ge=0)] = 10

  def __post_init__(self) -> None:
    if self.min_words > self.run_words:
      raise ValueError(
        f"min_words={self.min_words} must be at most run_words={self.run_words}: items of as many "
        f"words are found by their runs"
      )


class ItemText(NamedTuple):
  """One of the texts of a benchmark's item; a document that contains any of them has the item."""

  task: str
  item: str
  text: str


class Benchmarks:
  """Looks up which items of benchmarks a text contains.

  Attributes:
    items: (task, id) of every item.
    unchecked: task -> number of items without a text to look for: all are shorter than `min_words`,
      or shared with other items of the task ("Which of the following is true?").
  """

  def __init__(self, texts: Iterable[ItemText], *, run_words: int = 13, min_words: int = 5):
    self._run_words, self._min_words = run_words, min_words
    numbers: dict[tuple[str, str], int] = {}
    hashes, owners = array.array("Q"), array.array("i")
    short: dict[int, set[str]] = {}  # item -> its texts that are shorter than a run
    checked: set[int] = set()
    last, known = -1, set()
    for task, item, text in texts:
      number = numbers.setdefault((task, item), len(numbers))
      if number != last:
        last, known = number, set()
      tokens = shingles.words(text)
      if runs := shingles.runs(tokens, run_words):
        checked.add(number)
        new = set(runs) - known  # a question's own runs come again with each of its answers
        known |= new
        hashes.extend(map(shingles.run_hash, new))
        owners.extend([number] * len(new))
      elif shingles.num_words(tokens) >= min_words:
        short.setdefault(number, set()).add(" ".join(tokens))
    self.items = list(numbers)
    order = np.argsort(np.frombuffer(hashes, np.uint64), kind="stable")
    self._hashes = np.frombuffer(hashes, np.uint64)[order]
    self._owners = np.frombuffer(owners, np.int32)[order]
    # First words -> (all words, the items).
    self._short: dict[str, list[tuple[list[str], list[int]]]] = {}
    for text, holders in self._identifying(short).items():
      checked.update(holders)
      tokens = text.split()
      first = shingles.runs(tokens, min_words)[0]
      self._short.setdefault(first, []).append((tokens, holders))
    self.unchecked = collections.Counter(
      task for number, (task, _) in enumerate(self.items) if number not in checked
    )

  def _identifying(self, short: Mapping[int, set[str]]) -> dict[str, list[int]]:
    """Returns text -> items, without texts that different items of one task share."""
    holders = collections.defaultdict(list)
    for number, texts in short.items():
      for text in texts:
        holders[text].append(number)

    def identifies(numbers: Sequence[int]) -> bool:
      # Items of a task with all texts in common are one item that is there twice.
      different = {(self.items[n][0], frozenset(short[n])) for n in numbers}
      return len(different) == len({task for task, _ in different})

    return {text: numbers for text, numbers in sorted(holders.items()) if identifies(numbers)}

  @property
  def num_items(self) -> dict[str, int]:
    """Task -> number of its items."""
    return dict(collections.Counter(task for task, _ in self.items))

  def contained(self, text: str) -> dict[int, str]:
    """Returns the items that a text contains: number in `items` -> the shared words."""
    tokens = shingles.words(text)
    found: dict[int, str] = {}
    runs = shingles.runs(tokens, self._run_words)
    hashes = np.fromiter(map(shingles.run_hash, runs), np.uint64, len(runs))
    first = np.searchsorted(self._hashes, hashes, "left")
    last = np.searchsorted(self._hashes, hashes, "right")
    for i in np.flatnonzero(last > first):
      for number in self._owners[first[i] : last[i]]:
        found.setdefault(int(number), runs[i])
    for start, run in enumerate(shingles.runs(tokens, self._min_words)):
      for item_tokens, numbers in self._short.get(run, ()):
        if tokens[start : start + len(item_tokens)] == item_tokens:
          for number in numbers:
            found.setdefault(number, " ".join(item_tokens))
    return found


class Findings:
  """Checks documents one by one and counts what they contain.

  Attributes:
    drops: documents that contain an item are to be left out.
    num_documents: checked so far.
    num_contaminated: documents among them that contain an item.
  """

  def __init__(self, benchmarks: Benchmarks, config: DecontaminationConfig):
    self.drops = config.action == "drop"
    self.num_documents = self.num_contaminated = 0
    self._benchmarks, self._num_worst = benchmarks, config.num_worst
    self._documents: collections.Counter[str] = collections.Counter()
    self._items: set[int] = set()
    self._worst: list[tuple[int, int, dict[str, Any]]] = []  # a heap

  def check(self, id_: str, text: str) -> dict[str, Any] | None:
    """Returns what a document contains, or None if it contains no item.

    Returns:
      {"id", "items" (their number), "tasks" (task -> number of items), "examples" (of the first
      items: "task", "item" and "words", which it shares with the document)}.
    """
    self.num_documents += 1
    found = self._benchmarks.contained(text)
    if not found:
      return None
    self.num_contaminated += 1
    self._items |= found.keys()
    items = self._benchmarks.items
    tasks = collections.Counter(items[number][0] for number in sorted(found))
    self._documents.update(tasks.keys())
    examples = [
      {"task": items[number][0], "item": items[number][1], "words": found[number]}
      for number in sorted(found)[:_NUM_SHOWN_ITEMS]
    ]
    record = {"id": id_, "items": len(found), "tasks": dict(tasks), "examples": examples}
    # Among equals the first document goes first; no two have the same number.
    heapq.heappush(self._worst, (len(found), -self.num_documents, record))
    if len(self._worst) > self._num_worst:
      heapq.heappop(self._worst)
    return record

  def kept(
    self, documents: Iterable[Document], *, on_found: Callable[[dict[str, Any]], None]
  ) -> Iterator[Document]:
    """Checks documents and yields those to train on.

    Args:
      on_found: called with the result of `check` for each document that contains an item.

    Raises:
      ValueError: at the end: there were documents, and all are dropped.
    """
    for document in documents:
      found = self.check(document.id, document.text)
      if found is not None:
        on_found(found)
      if found is None or not self.drops:
        yield document
    if self.drops and self.num_documents == self.num_contaminated > 0:
      raise ValueError(f"nothing is left to train on: {self.sentence}")

  @property
  def sentence(self) -> str:
    """The result in a sentence."""
    return (
      f"{self.num_contaminated} of {self.num_documents} documents contain an item of a benchmark "
      f"and are {'dropped' if self.drops else 'kept, but listed'}"
    )

  def summary(self) -> dict[str, Any]:
    """Returns the counts so far.

    Returns:
      {"documents", "contaminated" (documents), "dropped" (whether they are), "tasks" (task ->
      "items", "unchecked" items, "items_hit", "documents_hit"), "worst" (records of `check`, the
      most items first)}.
    """
    items_hit = collections.Counter(self._benchmarks.items[number][0] for number in self._items)
    tasks = {
      task: {
        "items": number,
        "unchecked": self._benchmarks.unchecked[task],
        "items_hit": items_hit[task],
        "documents_hit": self._documents[task],
      }
      for task, number in self._benchmarks.num_items.items()
    }
    return {
      "documents": self.num_documents,
      "contaminated": self.num_contaminated,
      "dropped": self.drops,
      "tasks": tasks,
      "worst": [record for *_, record in sorted(self._worst, key=lambda w: w[:2], reverse=True)],
    }


def open_benchmarks(config: DecontaminationConfig, more: Iterable[ItemText] = ()) -> Benchmarks:
  """Reads the benchmarks of `config.data_dir`, if it names one.

  Args:
    more: items besides those.

  Raises:
    ValueError: there is no such folder, a task has no file there, or a line is not a JSON object
      with text (file and line are named).
  """
  files = {} if config.data_dir is None else _files(pathlib.Path(config.data_dir), config.tasks)
  texts = (text for task, file in files.items() for text in read_items(task, file))
  return Benchmarks(
    itertools.chain(texts, more), run_words=config.run_words, min_words=config.min_words
  )


def task_of(file_name: str) -> str:
  """Returns the task whose items a file holds: its name without the suffix."""
  suffix = next((suffix for suffix in _SUFFIXES if file_name.endswith(suffix)), "")
  return file_name.removesuffix(suffix)


def _files(folder: pathlib.Path, tasks: Sequence[str]) -> dict[str, pathlib.Path]:
  """Returns task -> file, by name."""
  files = {}
  for path in sorted(folder.glob("*")):
    if path.name.endswith(_SUFFIXES) and path.is_file() and not path.name.startswith("."):
      files[task_of(path.name)] = path
  if not files:
    raise ValueError(
      f"decontamination.data_dir={str(folder)!r} must be a folder with a JSON-lines file for each "
      f"task; it has no *.jsonl or *.jsonl.gz"
    )
  if missing := sorted(set(tasks) - files.keys()):
    raise ValueError(
      f"decontamination.tasks: {folder} has no {missing[0]}.jsonl or {missing[0]}.jsonl.gz; there "
      f"are {sorted(files)}"
    )
  return {task: file for task, file in files.items() if not tasks or task in tasks}


def read_items(task: str, file: pathlib.Path) -> Iterator[ItemText]:
  """Yields the texts of a task's items, whose ids are "line 7", or "line 7, question 2".

  Raises:
    ValueError: a line is not a JSON object with text, or the file cannot be read.
  """
  where = str(file)
  try:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
      for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        if line.strip():
          for item, texts in _items(json.loads(line)):
            for text in texts:
              text.encode()  # raises for half a surrogate pair, which JSON can spell
              yield ItemText(task, f"line {number}{item}", text)
  except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
    raise ValueError(f"{where}: {error}") from error


def _items(record: Any) -> Iterator[tuple[str, list[str]]]:
  """Yields (what its id ends with, texts) of the items of a line."""
  questions = record.get("questions") if isinstance(record, dict) else None
  if isinstance(questions, list) and all(isinstance(q, dict) for q in questions):  # of an article
    for number, question in enumerate(questions, 1):
      yield f", question {number}", item_texts(question)
  else:
    yield "", item_texts(record)


def item_texts(record: Any) -> list[str]:
  """Returns what a benchmark's record asks, alone and with each of its answers and choices.

  With answers, a question that is too short to be looked for can be found. All choices are taken,
  since a copy of the item lists them. A record without a field that we know has all its texts.

  Raises:
    ValueError: the record is no JSON object, or has no text.
  """
  if not isinstance(record, dict):
    raise ValueError(f"must be a JSON object with a question or a text, and is {record!r:.80}")
  if isinstance(options := record.get("context_options"), list):  # winogrande's filled-in blank
    words = zip(*(str(option).split() for option in options))
    common = " ".join(first for first, *others in words if {first} >= set(others))
    return [f"{start} {record.get('continuation', '')}" for start in (*options, f"{common} _")]
  prompt = next((record[name] for name in _PROMPTS if _is_text(record.get(name))), None)
  if prompt is None:
    lists = (value if isinstance(value, list) else [value] for value in record.values())
    texts = [text for values in lists for text in values if _is_text(text)]
    if not texts:
      raise ValueError(f"has no text; its fields are {sorted(record)}")
    return texts
  # Templates that came with the data are no words of the question.
  question = prompt.strip().removeprefix("Question:").removesuffix("Answer:").strip()
  choices = next((record[name] for name in _CHOICES if isinstance(record.get(name), list)), None)
  if choices is not None:
    answers = choices
  else:
    values = [record.get(name) for name in _ANSWERS]
    answers = [a for value in values for a in (value if isinstance(value, list) else [value])]
  return [question, *(f"{question} {answer}" for answer in answers if _is_text(answer))]


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value.strip())
