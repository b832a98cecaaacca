"""Answers to mathematical questions: extraction from text, and comparison with the right answer.

The caller chooses one of two checkers. "math_verify" compares expressions (fractions, sets,
intervals, matrices); it needs the extra `math`. "numbers" compares numbers only, needs nothing, and
refuses a question whose right answer is not a number.
"""

import concurrent.futures
import fractions
import importlib.util
import itertools
import logging
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

CHECKERS = ("math_verify", "numbers")

_START_SECONDS = 120.0  # imports sympy, on a busy machine
_MEMORY_BYTES = 4 * 2**30  # per process: 9^9^9 allocates all there is

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANNOUNCED = re.compile(r"(?:final answer|answer is|answer)\s*(?:is\s*)?:|answer is", re.IGNORECASE)
_HASHES = "####"
_NUMBER = re.compile(
  r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?/\s?\d+(?:\.\d+)?)?|[-+\u2212]?\.\d+"
)
_MATH = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))")
# Removed one after another: a removal may join the parts of the next one.
_DROPPED = (
  *(r"\left", r"\right", r"\!", r"\,", r"\;", r"\ ", r"\$", r"\%", "$", "%"),
  *(r"^{\circ}", r"^\circ"),
)


def extract_answer(text: str, *, numbers_only: bool) -> str | None:
  r"""Returns the answer in a text, or None if there is none.

  It is the first that exists of: the last \boxed{...}; the rest of the line after the last "Final
  Answer:" (or "the answer is"); the line after the last "####" (GSM8K); the last number.

  Args:
    numbers_only: return the last number of the first of these that contains a number.
  """
  _, hashes, after_hashes = text.rpartition(_HASHES)
  marked = itertools.chain(_boxed(text), _announced(text), _line(after_hashes) if hashes else ())
  for found in marked:
    if not numbers_only:
      return found
    if numbers := _NUMBER.findall(found):
      return numbers[-1]
  numbers = _NUMBER.findall(text)
  return numbers[-1] if numbers else None


def _boxed(text: str) -> Iterator[str]:
  """Yields the contents of closed boxes, the last one first."""
  for match in reversed(list(_BOXED.finditer(text))):
    depth = 1  # braces nest, which no regular expression matches
    for at in range(match.end(), len(text)):
      depth += {"{": 1, "}": -1}.get(text[at], 0)
      if depth == 0:
        if inside := text[match.end() : at].strip():
          yield inside
        break


def _announced(text: str) -> Iterator[str]:
  """Yields what follows the words that announce an answer, the last one first."""
  for match in reversed(list(_ANNOUNCED.finditer(text))):
    yield from _line(text[match.end() :])


def _line(text: str) -> Iterator[str]:
  """Yields the first line that is not empty, or its formula if it contains exactly one."""
  line = text.strip().split("\n", 1)[0].strip().removesuffix(".").strip(" *")
  pieces = ["".join(groups).strip() for groups in _MATH.findall(line)]
  if found := pieces[0] if len(pieces) == 1 else line:
    yield found


def normalize(answer: str) -> str:
  """Returns a canonical spelling, for votes: most answers that differ only in form become equal.

  Numbers become fractions in lowest terms, so 0.5, 1/2 and \\frac{1}{2} are equal.
  """
  number = as_number(answer)
  return _plain(answer) if number is None else str(number)


def as_number(answer: str) -> fractions.Fraction | None:
  """Returns the number that an answer is, or None; ignores thousands separators, $ and %."""
  plain = _plain(answer)
  if not _NUMBER.fullmatch(plain):
    return None
  numerator, _, denominator = plain.replace(",", "").replace("\u2212", "-").partition("/")
  try:
    return fractions.Fraction(numerator) / fractions.Fraction(denominator or 1)
  except ZeroDivisionError:
    return None


def _plain(answer: str) -> str:
  text = _TEXT.sub(r"\1", answer)
  text = _FRACTION.sub(lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}", text)
  for piece in _DROPPED:
    text = text.replace(piece, "")
  return "".join(text.split()).removesuffix(".").lower()


class Grade(NamedTuple):
  """The grade of one answer.

  Attributes:
    status: `equal`, `different`, `no_answer`, or `timeout` and `error`, where the comparison failed
      and the answer counts as wrong.
  """

  correct: bool
  status: str


def grade(
  pairs: Sequence[tuple[str, str | None]],
  *,
  checker: str,
  timeout_seconds: float,
  num_processes: int,
) -> list[Grade]:
  """Compares answers with the right ones.

  Equal spellings and numbers are compared directly; the other pairs go to `checker`.

  Args:
    pairs: (right answer, answer or None).
    timeout_seconds: limit for one comparison; its process is killed then.
    num_processes: comparisons at a time.

  Raises:
    ValueError: the checker is unknown or not installed; or it is "numbers" and a right answer is
      not a number.
  """
  check_checker(checker)
  statuses = {pair: _quick(*pair) for pair in pairs}
  left = sorted(pair for pair, status in statuses.items() if status is None)
  if checker == "numbers":
    for gold, _ in pairs:
      if as_number(gold) is None:
        raise ValueError(
          f"the right answer {gold!r} is not a number; use the checker 'math_verify' (extra `math`)"
        )
    found = ["different"] * len(left)
  else:
    found = compare(left, timeout_seconds=timeout_seconds, num_processes=num_processes)
  statuses.update(zip(left, found, strict=True))
  return [Grade(statuses[pair] == "equal", statuses[pair]) for pair in pairs]


def check_checker(checker: str) -> None:
  """Raises ValueError for a checker that is unknown or is not installed."""
  if checker not in CHECKERS:
    raise ValueError(f"checker={checker!r} is unknown; there are {sorted(CHECKERS)}")
  if checker == "numbers":
    return
  for name in ("math_verify", "antlr4", "pebble"):
    if importlib.util.find_spec(name) is None:
      raise ValueError(
        f"the checker 'math_verify' needs the package {name}: pip install 'selfimprove_jax[math]'; "
        f"or choose the checker 'numbers', if every right answer is a number"
      )


def _quick(gold: str, answer: str | None) -> str | None:
  """Returns the status of an answer that needs no checker, or None."""
  if answer is None:
    return "no_answer"
  if normalize(gold) == normalize(answer):
    return "equal"
  if as_number(gold) is not None and as_number(answer) is not None:
    return "different"
  return None


def compare(
  pairs: Sequence[tuple[str, str]], *, timeout_seconds: float, num_processes: int
) -> list[str]:
  """Compares expressions by math-verify; returns `equal`, `different`, `timeout` or `error`.

  A comparison may never end (9^9^9^9), and math-verify's own time limit works only in the main
  thread of a process. So it runs in processes that can be killed.

  Args:
    pairs: (right answer, answer); math-verify is not symmetric.
    timeout_seconds: wall-clock time of one comparison.

  Raises:
    RuntimeError: a process does not start.
  """
  if not pairs:
    return []
  import pebble

  # spawn: a fork of a process with JAX's threads may deadlock.
  context = multiprocessing.get_context("spawn")
  workers = min(num_processes, len(pairs))
  with pebble.ProcessPool(workers, initializer=_prepare_process, context=context) as pool:
    # A process that cannot start would otherwise look like errors of all comparisons.
    started = pool.schedule(_verify, args=("1", "1"), timeout=_START_SECONDS)
    if _status(started) != "equal":
      raise RuntimeError("a process that runs math-verify does not start")
    futures = [pool.schedule(_verify, args=pair, timeout=timeout_seconds) for pair in pairs]
    return [_status(future) for future in futures]


def _status(future: Any) -> str:
  import pebble

  try:
    return future.result()
  except concurrent.futures.TimeoutError:
    return "timeout"
  except (pebble.ProcessExpired, MemoryError):
    return "error"


def _prepare_process() -> None:
  """Prepares a worker process: limits its memory, and loads what comparisons need."""
  import resource

  resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
  logging.disable(logging.CRITICAL)
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # sympy prints
  _verify("1", "1")  # imports sympy and the parser, which no comparison's time limit should cover


def _verify(gold: str, answer: str) -> str:
  """Compares two expressions, in a worker process."""
  import math_verify

  configs = [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]

  def parse(text: str) -> list[Any]:
    boxed = f"\\boxed{{{text}}}"  # outside of a box, only text between dollars is read as LaTeX
    return math_verify.parse(boxed, configs, parsing_timeout=None, raise_on_error=True)

  try:
    same = math_verify.verify(parse(gold), parse(answer), timeout_seconds=None, raise_on_error=True)
  except Exception:
    return "error"
  return "equal" if same else "different"
