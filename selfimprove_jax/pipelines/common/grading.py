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
  for grader in ("words", *_CHECKERS):
    some = [record for record in made if record.get("grader") == grader]
    if grader == "words":
      _compare_words(some)
    elif some:
      _compare_answers(some, grader)
  return made


def _compare_words(records: list[dict[str, Any]]) -> None:
  for record in records:
    record["prediction"] = record["generation"].strip()
    accepted = {metrics.plain(answer) for answer in record["answers"]}
    record["correct"] = metrics.plain(record["generation"]) in accepted


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
