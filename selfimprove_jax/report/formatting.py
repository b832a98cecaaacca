"""Numbers, names and texts as the report writes them."""

import html
import math
from typing import Any

MISSING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"
_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"

# The order in which arms are shown; others follow in the order of their names.
_ARMS = ("baseline", "sbp", "unconditional", "random_pairs", "oracle", "baseline_all_in")


def escape(text: Any) -> str:
  """Text that may stand anywhere in the page."""
  return html.escape(str(text), quote=True)


def arm_names(arms: dict[str, Any]) -> list[str]:
  """The arms of a report in the order in which they are shown."""
  known = [name for name in _ARMS if name in arms]
  return known + sorted(name for name in arms if name not in _ARMS)


def arm_role(name: str, names: list[str]) -> str:
  """The colour role of an arm: fixed for the arms of the job, `other0`.. for further ones."""
  if name in _ARMS:
    return "arm-" + name.replace("_", "-")
  others = [other for other in names if other not in _ARMS]
  return f"arm-other{others.index(name) % 3}"


def fixed(number: float | int | None, digits: int = 3) -> str:
  """`-0.0571` as 0.057 with a minus sign; a dash for what is missing."""
  if number is None or not math.isfinite(number):
    return MISSING
  return f"{number:.{digits}f}".replace("-", _MINUS)


def signed(number: float | int | None, digits: int = 3) -> str:
  """`0.0571` as `+0.057`."""
  if number is None or not math.isfinite(number):
    return MISSING
  return f"{number:+.{digits}f}".replace("-", _MINUS)


def with_error(estimate: dict[str, Any] | float | int | None, digits: int = 3) -> str:
  """`3.957 ± 0.021` of an estimate, `3.957` of a plain number."""
  if isinstance(estimate, dict):
    return f"{fixed(estimate['value'], digits)} {_PLUS_MINUS} {fixed(estimate['stderr'], digits)}"
  return fixed(estimate, digits)


def interval(low_high: list[float], digits: int = 3) -> str:
  return f"{signed(low_high[0], digits)} to {signed(low_high[1], digits)}"


def percent(share: float | int | None, digits: int = 0) -> str:
  return MISSING if share is None else f"{fixed(100 * share, digits)}%"


def short(number: float | int | None, *, pad: bool = True) -> str:
  """Three digits and a prefix: 1.56M, 4.90T (4.9T without `pad`)."""
  if number is None or not math.isfinite(number):
    return MISSING
  prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]
  while abs(number) >= 999.5 and len(prefixes) > 1:
    number = number / 1000
    prefixes.pop(0)
  digits = f"{number:#.3g}".rstrip(".") if pad and prefixes[0] else f"{number:.3g}"
  return f"{digits}{prefixes[0]}".replace("-", _MINUS)


def duration(seconds: float | int | None) -> str:
  """`4.2 s`, `2 min 05 s`, `3 h 10 min`."""
  if seconds is None:
    return MISSING
  if seconds < 59.95:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f"{minutes} min {rest:02d} s"
  return f"{minutes // 60} h {minutes % 60:02d} min"


def value(anything: Any) -> str:
  """A leaf of a table of facts: counts with separators, other numbers to four digits."""
  if isinstance(anything, bool) or anything is None:
    return {True: "yes", False: "no", None: MISSING}[anything]
  if isinstance(anything, int):
    return f"{anything:,}".replace("-", _MINUS)
  if isinstance(anything, float):
    return f"{anything:.4g}".replace("-", _MINUS)
  if isinstance(anything, list):
    return ", ".join(value(item) for item in anything)
  if isinstance(anything, dict):
    if "value" in anything and "stderr" in anything:
      unit = f" {anything['unit']}" if anything.get("unit") else ""
      return with_error(anything, _decimals(anything["stderr"])) + unit
    return ", ".join(f"{words(key)} {value(item)}" for key, item in anything.items())
  return str(anything)


def _decimals(stderr: float | None) -> int:
  """As many as show two digits of the standard error."""
  if not stderr or not math.isfinite(stderr):
    return 3
  return min(max(1 - math.floor(math.log10(abs(stderr))), 0), 8)


def words(key: str) -> str:
  """`num_pairs_dropped` as `pairs dropped`."""
  return str(key).removeprefix("num_").replace("_", " ").replace("flops", "FLOPs")


def flatten(tree: Any, path: str = "") -> list[tuple[str, Any]]:
  """The leaves of nested dicts with their dotted paths, in order."""
  if isinstance(tree, dict) and tree:
    leaves = []
    for key, item in tree.items():
      leaves += flatten(item, f"{path}.{key}" if path else str(key))
    return leaves
  return [(path, tree)]
