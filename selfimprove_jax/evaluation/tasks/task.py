"""A benchmark: where its records are, and how each becomes an example with its shots."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from selfimprove_jax.evaluation.tasks.items import Choices, Document, Example, Item

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hub:
  """A data set on the Hugging Face hub, by the name that lm-eval uses.

  Attributes:
    split: records to evaluate.
    shots_split: records that the shots are taken from; None without shots.
    convert: record of the data set -> record of the task's file.
  """

  path: str
  name: str | None = None
  split: str
  shots_split: str | None = None
  convert: Callable[[Row], Row]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A benchmark.

  Attributes:
    version: raised when prompts or scoring change; results of other versions are not comparable.
    definition: digest of the file that defines a user's task; empty for one of ours.
    file: its records, a JSON-lines file in the data folder.
    fields: the fields of a record.
    make: record -> item.
    metrics: names in `metrics.METRICS`; the first one is the headline.
    rows: line of the file -> its records, such as the questions of an article.
    shots_file: records that the shots are taken from; may be `file`.
    num_shots: examples with their answers before the question.
    group_field: items with equal values are not independent; None if all are.
    description: a text before the shots, from a record. Shots are of the record's group then.
    hub: where the records are on the Hugging Face hub; None if lm-eval has no such task.
  """

  name: str
  version: int
  definition: str = ""
  file: str
  fields: tuple[str, ...]
  make: Callable[[Row], Item]
  metrics: tuple[str, ...]
  rows: Callable[[Row], Iterable[Row]] = lambda record: (record,)
  shots_file: str | None = None
  num_shots: int = 0
  group_field: str | None = None
  description: Callable[[Row], str] | None = None
  hub: Hub | None = None

  def examples(self, lines: Iterable[Row], shots: Iterable[Row]) -> Iterator[Example]:
    """Yields the examples of a file's lines, with their shots, the first ones of their file.

    A shot that is the example itself would give its answer away, so the next one replaces it, or
    there is one less.

    Raises:
      ValueError: a record lacks a field or is not what the task takes; names its line.
    """
    by_subject: dict[Any, list[Row]] = {}
    for shot in (row for line in shots for row in self.rows(line)):
      kept = by_subject.setdefault(self._subject(shot), [])
      if len(kept) <= self.num_shots:
        kept.append(shot)
    for number, line in enumerate(lines, 1):
      where = f"{self.name}, line {number}"
      rows = list(self._checked_rows(line, where))
      for place, record in enumerate(rows, 1):
        id_ = f"{self.name}:{number}" + (f".{place}" if len(rows) > 1 else "")
        given = by_subject.get(self._subject(record), []) if self.num_shots else []
        if len(given) < self.num_shots:
          raise ValueError(
            f"{where}: {len(given)} shots for {self._subject(record)!r}, and "
            f"num_shots={self.num_shots}"
          )
        chosen = [shot for shot in given if shot != record][: self.num_shots]
        try:
          item = self._with_shots(record, chosen)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
          raise ValueError(f"{where}: {error}") from error
        group = id_ if self.group_field is None else str(record[self.group_field])
        yield Example(id=id_, group=group, item=item)

  def _checked_rows(self, line: Row, where: str) -> Iterator[Row]:
    try:
      rows = list(self.rows(line))
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    for row in rows:
      if missing := [field for field in self.fields if field not in row]:
        raise ValueError(
          f"{where}: there is no {', '.join(missing)}; a record has {', '.join(self.fields)}"
        )
      yield row

  def _subject(self, record: Row) -> Any:
    return None if self.description is None else record.get(self.group_field)

  def _with_shots(self, record: Row, shots: list[Row]) -> Item:
    item = self.make(record)
    preamble = self.description(record) if self.description else ""
    preamble += "".join(_solved(self.make(shot)) + "\n\n" for shot in shots)
    if not preamble or isinstance(item, Document):
      return item
    if isinstance(item, Choices):
      contexts = tuple(preamble + context for context in item.contexts)
      return dataclasses.replace(item, contexts=contexts, preamble=len(preamble))
    return dataclasses.replace(item, prompt=preamble + item.prompt, preamble=len(preamble))


def _solved(item: Item) -> str:
  if isinstance(item, Choices):
    context, continuation = item.pairs()[item.gold[0]]
    return (context + continuation).rstrip("\n")
  return f"{item.prompt} {item.shown}"
