"""The table that a run prints at its end."""

import textwrap
from typing import Any

from selfimprove_jax.report import formatting as fmt

_WIDTH = 100
_MARKS = {True: "yes", False: "no", None: "-"}


def print_table(report: dict[str, Any]) -> str:
  """Arms, verdict and claims as plain text of at most 100 columns; what is printed is up to main.

  A claim is marked `yes` or `no`, or `-` where the run shows neither.
  """
  arms, comparison = report["arms"], report["comparison"]
  rows = [
    [
      "arm",
      "nats/token",
      "bits/byte",
      "diff",
      "95% of diff",
      "tokens",
      "all-in",
      "wd, drop",
    ]
  ]
  for name in fmt.arm_names(arms):
    arm, difference = arms[name], comparison["differences"].get(name)
    rows.append(
      [
        textwrap.shorten(arm["label"], 22, placeholder="..."),
        fmt.fixed(arm["evals"]["heldout_nll"]["value"]),
        fmt.fixed(arm["evals"]["bits_per_byte"]["value"]),
        fmt.signed(difference["value"]) if difference else fmt.MISSING,
        fmt.interval(difference["interval"]) if difference else fmt.MISSING,
        fmt.short(arm["train_tokens"]),
        fmt.short(arm["all_in_flops"]),
        f"{arm['weight_decay']:g}, {arm['dropout_rate']:g}",
      ]
    )
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = [
    "  ".join(
      cell.ljust(width) if column == 0 else cell.rjust(width)
      for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
  lines += ["", *textwrap.wrap(comparison["verdict"], _WIDTH), ""]
  for claim in comparison["claims"]:
    mark = f"{_MARKS[claim['holds']]:>3}  "
    lines += textwrap.wrap(
      claim["sentence"], _WIDTH, initial_indent=mark, subsequent_indent=" " * len(mark)
    )
  return "\n".join(lines)
