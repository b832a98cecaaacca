"""Writes numbers, times, signs and names for tables, figures and sentences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from selfimprove_jax.report.blocks import Bar, Form, Interval, Label, Number, Real, Stack

MISSING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
_DIGITS = {"fixed": 3, "percent": 0, "general": 4}
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def text(cell: Any) -> str:
  """Writes a cell, or a plain value, on one line."""
  match cell:
    case None:
      return MISSING
    case bool():
      return "yes" if cell else "no"
    case Number():
      return _number(cell)
    case Interval():
      return _interval(cell)
    case Label(label):
      return label
    case Stack(lines):
      return ", ".join(text(line) for line in lines)
    case Bar():
      return ""
    case int():
      return f"{cell:,}".replace("-", _MINUS)
    case float():
      return _number(Number(cell, form="general"))
    case list() | tuple():
      return ", ".join(text(item) for item in cell)
    case Mapping():
      return ", ".join(f"{words(key)} {text(item)}" for key, item in cell.items())
  return str(cell)


def _number(number: Number) -> str:
  written = _value(number.value, number, "+" if number.signed else "")
  if number.stderr is None:
    return written
  return f"{written} {PLUS_MINUS} {_value(number.stderr, number, '')}"


def _value(value: Real | None, number: Number, sign: str) -> str:
  if value is None or not math.isfinite(value):
    return MISSING
  digits = _DIGITS.get(number.form) if number.digits is None else number.digits
  match number.form:
    case "short":
      return short(value)
    case "seconds":
      return duration(value)
    case "percent":
      written = f"{100 * value:{sign}.{digits}f}%"
    case "fixed":
      written = f"{value:{sign}.{digits}f}"
    case "general":
      written = f"{value:{sign}.{digits}g}"
  return written.replace("-", _MINUS)


def decimals(stderr: Real) -> int:
  """Returns the number of decimals that show two digits of a standard error."""
  if not stderr or not math.isfinite(stderr):
    return 3
  return min(max(1 - math.floor(math.log10(abs(stderr))), 0), 8)


def plus_minus(stderr: Real, *, form: Form = "fixed") -> str:
  """Writes `0.021` as `\N{PLUS-MINUS SIGN} 0.021`."""
  return f"{PLUS_MINUS} {_number(Number(stderr, form=form))}"


def fixed(value: Real | None) -> str:
  """Writes `0.0571` as `0.057`, and a missing number as a dash."""
  return _number(Number(value))


def signed(value: Real | None) -> str:
  """Writes `0.0571` as `+0.057`."""
  return _number(Number(value, signed=True))


def interval(low_high: Sequence[Real]) -> str:
  """Writes an interval as `+0.019 to +0.095`; an infinite one, of a single group, is unknown."""
  return _interval(Interval(*low_high))


def _interval(found: Interval) -> str:
  ends = (found.low, found.high)
  if not all(map(math.isfinite, ends)):
    return "unknown"
  form = {"form": found.form, "digits": found.digits, "signed": found.signed}
  return " to ".join(_number(Number(end, **form)) for end in ends)


def percent(share: Real | None, digits: int = 0) -> str:
  """Writes `0.4` as `40%`."""
  return _number(Number(share, form="percent", digits=digits))


def short(number: Real | None, *, pad: bool = True) -> str:
  """Writes three digits and a metric prefix: 1.56M, 4.90T; ticks have no `pad`: 4.9T."""
  if number is None or not math.isfinite(number):
    return MISSING
  exponent = 0
  while abs(number) >= 999.5 and exponent < len(_PREFIXES) - 1:
    number /= 1000
    exponent += 1
  digits = f"{number:#.3g}".rstrip(".") if pad and exponent else f"{number:.3g}"
  return f"{digits}{_PREFIXES[exponent]}".replace("-", _MINUS)


def duration(seconds: Real | None) -> str:
  """Writes a time as `4.2 s`, `2 min 05 s`, `3 h 10 min`."""
  if seconds is None:
    return MISSING
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest:02d} s"
  return f"{minutes // 60} h {minutes % 60:02d} min"


def words(key: Any) -> str:
  """Writes `num_pairs_dropped` as `pairs dropped`."""
  return str(key).removeprefix("num_").replace("_", " ").replace("flops", "FLOPs")


def flatten(tree: Any, path: str = "") -> list[tuple[str, Any]]:
  """Lists the leaves of nested dicts with their dotted paths, in order."""
  if not (isinstance(tree, Mapping) and tree):
    return [(path, tree)]
  return [
    leaf
    for key, item in tree.items()
    for leaf in flatten(item, f"{path}.{key}" if path else str(key))
  ]
