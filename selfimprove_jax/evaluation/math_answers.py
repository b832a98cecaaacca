"""Answers to mathematical questions: found in text, and compared with the right one.

Two ways to compare, of which a caller chooses one. "math_verify" knows expressions: fractions,
sets, intervals, matrices; it needs the extra `math`, and runs in processes of its own that are
killed when they take too long (`math_process`). "numbers" knows numbers alone, needs nothing, and
refuses a question whose right answer is none.
"""

import dataclasses
import fractions
import itertools
import re
from collections.abc import Iterator, Sequence

from selfimprove_jax.evaluation import math_process

CHECKERS = ("math_verify", "numbers")

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANNOUNCED = re.compile(r"(?:final answer|answer is|answer)\s*(?:is\s*)?:|answer is", re.IGNORECASE)
_HASHES = "####"
_NUMBER = re.compile(
  r"[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?/\s?\d+(?:\.\d+)?)?|[-+\u2212]?\.\d+"
)
_MATH = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))")
_DROPPED = (
  *(r"\left", r"\right", r"\!", r"\,", r"\;", r"\ ", r"\$", r"\%", "$", "%"),
  *(r"^{\circ}", r"^\circ"),
)


def extract_answer(text: str, *, numbers_only: bool) -> str | None:
  r"""The answer that a text gives, or None where it gives none.

  The first that there is of: the last \boxed{...}; what follows the last "Final Answer:" (or "the
  answer is") on its line; what follows the last "####" (GSM8K); the last number in the text.

  Args:
    numbers_only: what holds no number is passed over, and of what does the last number is taken.
  """
  for found in itertools.chain(_boxed(text), _announced(text), _behind_hashes(text)):
    if not numbers_only:
      return found
    if numbers := _NUMBER.findall(found):
      return numbers[-1]
  numbers = _NUMBER.findall(text)
  return numbers[-1] if numbers else None


def _boxed(text: str) -> Iterator[str]:
  """What stands in the boxes that are closed, from the last."""
  for match in reversed(list(_BOXED.finditer(text))):
    depth = 1
    for at in range(match.end(), len(text)):
      depth += {"{": 1, "}": -1}.get(text[at], 0)
      if depth == 0:
        if inside := text[match.end() : at].strip():
          yield inside
        break


def _announced(text: str) -> Iterator[str]:
  for match in reversed(list(_ANNOUNCED.finditer(text))):
    yield from _line(text[match.end() :])


def _behind_hashes(text: str) -> Iterator[str]:
  _, hashes, rest = text.rpartition(_HASHES)
  if hashes:
    yield from _line(rest)


def _line(text: str) -> Iterator[str]:
  """The first line that is not empty; of it what is set as mathematics, if that is one piece."""
  line = text.strip().split("\n", 1)[0].strip().removesuffix(".").strip(" *")
  pieces = ["".join(groups).strip() for groups in _MATH.findall(line)]
  if found := pieces[0] if len(pieces) == 1 else line:
    yield found


def normalize(answer: str) -> str:
  """A spelling in which answers that differ in form alone are mostly equal; for votes.

  Numbers become fractions in lowest terms, so that 0.5, 1/2 and \\frac{1}{2} are one.
  """
  number = as_number(answer)
  return _plain(answer) if number is None else str(number)


def as_number(answer: str) -> fractions.Fraction | None:
  """The number that an answer is, or None; thousands may have commas, and a currency or % stands
  for nothing."""
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


@dataclasses.dataclass(frozen=True)
class Grade:
  """Whether an answer is right, and how that was found.

  Attributes:
    status: `equal`, `different`, `no_answer`, or, where the comparison gave none and the answer
      counts as wrong: `timeout`, `error`.
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
  """Compares answers with the right ones: (right answer, answer or None) for each.

  Answers that are spelled alike, and numbers, are compared here; what is left goes to `checker`.

  Args:
    checker: one of `CHECKERS`.
    timeout_seconds: for one comparison; the process is killed then.
    num_processes: comparisons at a time.

  Raises:
    ValueError: the checker is unknown, or its package is not installed; or it is "numbers" and a
      right answer is no number.
  """
  check_checker(checker)
  grades = [_quick(gold, answer) for gold, answer in pairs]
  left = sorted({pair for pair, found in zip(pairs, grades, strict=True) if found is None})
  if checker == "numbers":
    for gold, _ in pairs:
      if as_number(gold) is None:
        raise ValueError(
          f"the right answer {gold!r} is no number; use the checker 'math_verify' (extra `math`)"
        )
    statuses = {pair: "different" for pair in left}
  else:
    results = math_process.compare(
      left, timeout_seconds=timeout_seconds, num_processes=num_processes
    )
    statuses = dict(zip(left, results, strict=True))
  return [
    Grade(statuses[pair] == "equal", statuses[pair]) if found is None else found
    for pair, found in zip(pairs, grades, strict=True)
  ]


def check_checker(checker: str) -> None:
  """Refuses a checker that is unknown or can't run here.

  Raises:
    ValueError: it is.
  """
  if checker not in CHECKERS:
    raise ValueError(f"checker={checker!r} is unknown; there are {sorted(CHECKERS)}")
  if checker == "math_verify":
    math_process.check_installed()


def _quick(gold: str, answer: str | None) -> Grade | None:
  if answer is None:
    return Grade(False, "no_answer")
  if normalize(gold) == normalize(answer):
    return Grade(True, "equal")
  if as_number(gold) is not None and as_number(answer) is not None:
    return Grade(False, "different")
  return None
