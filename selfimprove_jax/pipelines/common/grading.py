"""Compares generated answers with the accepted ones."""

import os
from collections.abc import Iterable
from typing import Any

from selfimprove_jax.evaluation.tasks import metrics
from selfimprove_jax.evaluation.tasks.items import Example, Generation, Record
from selfimprove_jax.reasoning import math_answers

_CHECKERS = {"numbers": "numbers", "math": "math_verify"}
_TIMEOUT_SECONDS = 10.0


def check(examples: Iterable[Example]) -> None:
  """Raises ValueError if the grader of an example is not installed."""
  graders = {e.item.grader for e in examples if isinstance(e.item, Generation)}
  for grader in sorted(graders & _CHECKERS.keys()):
    math_answers.check_checker(_CHECKERS[grader])


def graded(records: Iterable[Record]) -> list[dict[str, Any]]:
  """Returns the records; those with a generation get `prediction` and `correct`."""
  made = [dict(record) for record in records]
  for record in made:
    _compare_text(record)
  for grader in _CHECKERS:
    if some := [record for record in made if record.get("grader") == grader]:
      _compare_answers(some, grader)
  return made


def _compare_text(record: dict[str, Any]) -> None:
  match record.get("grader"):
    case "words" | "squad" as grader:
      fold = metrics.plain if grader == "words" else metrics.squad_words
      record["prediction"] = record["generation"].strip()
      folded = fold(record["generation"])
      record["correct"] = any(fold(answer) == folded for answer in record["answers"])
    case "letter":
      record["prediction"] = metrics.stated_letter(record)
      record["correct"] = record["prediction"] in record["answers"]


def _compare_answers(records: list[dict[str, Any]], grader: str) -> None:
  pairs = []
  for record in records:
    found = math_answers.extract_answer(record["generation"], numbers_only=grader == "numbers")
    record["prediction"] = found
    pairs.append([(answer, found) for answer in record["answers"]])
  grades = iter(
    math_answers.grade(
      [pair for some in pairs for pair in some],
      checker=_CHECKERS[grader],
      timeout_seconds=_TIMEOUT_SECONDS,
      num_processes=os.cpu_count() or 1,
    )
  )
  for record, some in zip(records, pairs, strict=True):
    record["correct"] = any([next(grades).correct for _ in some])
