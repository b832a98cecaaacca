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
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

CHECKERS = ("math_verify", "numbers")

_START_SECONDS = 120.0  # imports sympy, on a busy machine
_MEMORY_BYTES = 4 * 2**30  # per process: 9^9^9 allocates all there is

# A longer text is no answer, and Python converts no integer of more than 4,300 digits.
_MAX_CHARACTERS = 1000

_BRACES = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{|[^\s$\\{}]+)|\\.|[{}]")
_ANNOUNCED = re.compile(r"(?:final answer|answer is|answer)\s*(?:is\s*)?:|answer is", re.IGNORECASE)
_HASHES = "####"
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?"
# A mixed number, or a number or fraction. A sign after an operand is an operator; digits of a name,
# an index or an exponent are no number.
_NUMBER = re.compile(
  r"(?<![A-Za-z_^\d])(?<![_^]\{)(?:(?<![)}])[-+])?"
  rf"(?:(?P<whole>\d+) (?P<part>\d+/\d+)(?![\d.])|{_UNSIGNED}(?: ?/ ?-?{_UNSIGNED})?)"
)
# Dollars around mathematics touch it; those of prices do not (pandoc's rule).
_MATH = re.compile(r"\$(?!\s)([^$]+)(?<!\s)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_TEXT = re.compile(r"\\(?:text(?:bf|rm|it)?|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(
  r"(?:(?<=\d)(?P<mixed> ?))?\\[dtc]?frac ?"
  r"(?:\{ ?(-?[\d.,]+) ?\}|(\d)) ?(?:\{ ?(-?[\d.,]+) ?\}|(\d))"
)
_VULGAR_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\[,;: !]|[~\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_POWER_OF_TEN = re.compile(r"(?<=\d) ?(?:\\times|\\cdot|\u00d7) ?10\^(?:\{(-?\d{1,3})\}|(\d))")
# Replaced one after another: a replacement may join the parts of the next one.
_SPELLINGS = {
  **{"\u2212": "-", "\u2044": "/", "{,}": ",", r"\ ": " ", r"\%": "%", "**": ""},
  **dict.fromkeys((r"\left", r"\right", r"\!", r"\,", r"\;", r"\:", r"\$", "$", "\u20ac"), ""),
  **dict.fromkeys((r"\(", r"\)", r"\[", r"\]", r"^{\circ}", r"^\circ", "\u00b0"), ""),
}
_REMARK = re.compile(r"(?<=\S)\s+\((?=[^()]*[a-z]{2,}\s)[^()]*\)", re.IGNORECASE)
_ASSIGNED = re.compile(r"(?:\\?[A-Za-z](?:_\w|_\{\w+\})?)? ?= ?")
_EQUALS = re.compile(r"=|\\approx|\u2248")
# What follows a number that is only the beginning of an expression or of a list.
_CONTINUED = re.compile(
  r" ?[-+*/\u00b7\u00d7\u00f7] ?(?:[\d({\\]|[A-Za-z](?![A-Za-z]))|\^|[({]|\\"
  r"| ?(?:[,;:]|and|or|to) ?[-+]?\.?\d|[A-Za-z](?![A-Za-z])"
)
_UNIT_WORD = re.compile(r"%|[A-Za-z]{2,}\.?(?:\^\{?[23]\}?)?|[mgshlLFCKNJWV](?:\^\{?[23]\}?)?")
_NO_UNITS = {
  *("and", "or", "to", "mod", "pi", "plus", "minus", "times", "sqrt"),
  *("hundred", "thousand", "million", "billion", "trillion", "dozen"),
}


def extract_answer(text: str, *, numbers_only: bool) -> str | None:
  r"""Returns the answer in a text, or None if there is none.

  It is the first that exists of: the last \boxed{...}; the rest of the line after the last "Final
  Answer:" (or "the answer is"); the line after the last "####" (GSM8K); the last number. A box that
  is not closed was cut, so nothing in it is read.

  Args:
    numbers_only: return the number that the first of these with a digit states, which stands behind
      its last "=" and before a unit, a remark or a reason. An expression or a list of numbers is
      returned as it is, so it equals no number.
  """
  boxes, text = _boxed(text)
  _, hashes, after_hashes = text.rpartition(_HASHES)
  for found in itertools.chain(boxes, _announced(text), _line(after_hashes) if hashes else ()):
    if not numbers_only:
      return _REMARK.sub("", found) if _NUMBER.match(found) else found
    if any(map(str.isdigit, found)):
      return _stated_number(found) or found
  numbers = [match[0] for match in _NUMBER.finditer(_spell(text))]
  return numbers[-1] if numbers else None


def _boxed(text: str) -> tuple[list[str], str]:
  """Returns the contents of closed boxes, the last one first, and the text before a cut box."""
  boxes: list[tuple[int, str]] = []
  opened: list[tuple[int, bool]] = []  # open braces: where they begin, whether it is a box
  for match in _BRACES.finditer(text):
    if match[0] == "}":
      if opened:
        start, is_box = opened.pop()
        if is_box:
          boxes.append((start, text[start : match.start()].strip()))
    elif match[0].endswith("{") and match[0] != r"\{":
      opened.append((match.end(), match[1] is not None))
    elif match[1]:  # a box without braces
      boxes.append((match.end(), match[1].rstrip(".,")))
  cut = next((start for start, is_box in opened if is_box), len(text))
  return [inside for _, inside in sorted(boxes, reverse=True) if inside], text[:cut]


def _announced(text: str) -> Iterator[str]:
  """Yields what follows the words that announce an answer, the last one first."""
  for match in reversed(list(_ANNOUNCED.finditer(text))):
    yield from _line(text[match.end() : match.end() + _MAX_CHARACTERS])


def _line(text: str) -> Iterator[str]:
  """Yields the first line that is not empty, or its formula if it contains exactly one."""
  line = text.strip().split("\n", 1)[0].strip().removesuffix(".").strip(" *")
  pieces = ["".join(groups).strip() for groups in _MATH.findall(line)]
  if found := pieces[0] if len(pieces) == 1 else line:
    yield found


def _stated_number(found: str) -> str | None:
  """Returns the number that a statement begins or ends with, or None for anything else."""
  text = _without_parentheses(_REMARK.sub("", _spell(found)).strip())
  for side in map(str.strip, reversed(_EQUALS.split(text))):
    if (match := _NUMBER.match(side)) and not _CONTINUED.match(side, match.end()):
      return match[0]
  if re.match("[A-Za-z]{2}", text) and (numbers := list(_NUMBER.finditer(text))):
    return numbers[-1][0]
  return None


def normalize(answer: str) -> str:
  """Returns a canonical spelling, for votes: most answers that differ only in form become equal.

  Numbers become fractions in lowest terms, so 0.5, 1/2 and \\frac{1}{2} are equal.
  """
  number = as_number(answer)
  return _compact(answer) if number is None else str(number)


def as_number(answer: str) -> fractions.Fraction | None:
  """Returns the number that an answer is, or None; ignores thousands separators, units, $ and %."""
  found = _quantity(answer)
  return None if found is None else found[0]


def _quantity(answer: str) -> tuple[fractions.Fraction, str] | None:
  """Returns the number that an answer is and its unit, such as "%" or "cm"; None for others."""
  if len(answer) > _MAX_CHARACTERS:
    return None
  text = _without_parentheses(_spell(answer).strip().removesuffix("."))
  text = _ASSIGNED.sub("", text, count=1) if _ASSIGNED.match(text) else text
  match = _NUMBER.match(text)
  if match is None:
    return None
  rest = text[match.end() :]
  words = rest.replace("/", " ").split()
  if rest[:1].isalpha() and len(words[0]) == 1:  # 5m is a product, 5 m is a length
    return None
  if any(not _UNIT_WORD.fullmatch(w) or w.lower() in _NO_UNITS for w in words):
    return None
  try:
    if match["part"]:
      sign = -1 if match[0].startswith("-") else 1
      number = sign * (int(match["whole"]) + fractions.Fraction(match["part"]))
    else:
      above, _, below = match[0].replace(",", "").replace(" ", "").partition("/")
      number = fractions.Fraction(above) / fractions.Fraction(below or 1)
  except ZeroDivisionError:
    return None
  return number, " ".join(words).lower()


def _spell(text: str) -> str:
  """Returns a text with its numbers spelled without LaTeX, and single spaces."""
  text = _VULGAR_FRACTION.sub(lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
  text = _TEXT.sub(r" \1 ", _THOUSANDS.sub("", text))
  text = " ".join(text.split())
  text = _FRACTION.sub(
    lambda m: (" " if m["mixed"] is not None else "") + f"{m[2] or m[3]}/{m[4] or m[5]}", text
  )
  text = _POWER_OF_TEN.sub(lambda m: f"e{m[1] or m[2]}", text)
  for piece, plain in _SPELLINGS.items():
    text = text.replace(piece, plain)
  return text


def _without_parentheses(text: str) -> str:
  is_whole = text.startswith("(") and text.find(")") == len(text) - 1
  return text[1:-1].strip() if is_whole else text


def _compact(answer: str) -> str:
  """Returns a spelling without spaces, except those between two numbers, and in lower case."""
  text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", _spell(answer))
  return re.sub(r"(?<!\d) | (?!\d)", "", text.strip()).removesuffix(".").lower()


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
  right, found = _quantity(gold), _quantity(answer)
  if right is None or found is None:
    return "equal" if _compact(gold) == _compact(answer) else None
  (right, right_unit), (found, unit) = right, found
  if right_unit and unit and right_unit != unit:
    return None  # 1 m and 100 cm: only a checker knows units
  equal = right == found
  if (right_unit == "%") != (unit == "%"):  # 50% is given as 50 and as 0.5
    equal = equal or (right / 100 == found if right_unit == "%" else found / 100 == right)
  return "equal" if equal else "different"


def compare(
  pairs: Sequence[tuple[str, str]], *, timeout_seconds: float, num_processes: int
) -> list[str]:
  """Compares expressions by math-verify; returns `equal`, `different`, `timeout` or `error`.

  A comparison may never end (9^9^9^9), and math-verify's own time limit works only in the main
  thread of a process. So it runs in processes that can be killed.

  Args:
    pairs: (right answer, answer); math-verify is not symmetric. Texts of more than 1,000
      characters are an `error`.
    timeout_seconds: wall-clock time of one comparison.

  Raises:
    RuntimeError: a process does not start.
  """
  if not pairs:
    return []
  import pebble

  tested = [pair for pair in pairs if max(map(len, pair)) <= _MAX_CHARACTERS]
  # spawn: a fork of a process with JAX's threads may deadlock.
  context = multiprocessing.get_context("spawn")
  workers = max(1, min(num_processes, len(tested)))
  with pebble.ProcessPool(workers, initializer=_prepare_process, context=context) as pool:
    # A process that cannot start would otherwise look like errors of all comparisons.
    started = pool.schedule(_verify, args=("1", "1"), timeout=_START_SECONDS)
    if _status(started) != "equal":
      raise RuntimeError("a process that runs math-verify does not start")
    futures = {pair: pool.schedule(_verify, args=pair, timeout=timeout_seconds) for pair in tested}
    return [_status(futures[pair]) if pair in futures else "error" for pair in pairs]


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
