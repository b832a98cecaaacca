"""Renders a report as plain text of a given width."""

import io
import re
import textwrap
from collections.abc import Iterable

import selfimprove_jax.report.formatting as formatting
from selfimprove_jax.report.page import shortened
from selfimprove_jax.report.report import (
  Bar,
  Block,
  Cell,
  Excerpt,
  Facts,
  Grid,
  Real,
  Report,
  Section,
  Stack,
  Table,
  Text,
  TextPair,
)

_MARKS = {True: "yes", False: "no", None: "-"}
_MAX_TEXT_COLUMN = 24  # longer names are wrapped
_BAR_WIDTH = 20
# A sampled text must not move the cursor or change the terminal's colors.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def render(report: Report, *, examples: bool, width: int) -> str:
  """Returns the summary sections, the lead, the claims and, with `examples`, every section."""
  parts = [_blocks(section.blocks, width) for section in report.sections if section.in_summary]
  parts += [textwrap.fill(report.lead, width)]
  parts += ["\n".join(_claim(claim.holds, claim.sentence, width) for claim in report.claims)]
  if examples:
    others = [section for section in report.sections if not section.in_summary]
    parts = [report.title, *parts, *(_section(section, width) for section in others)]
  return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", "\n\n".join(part for part in parts if part))


def _claim(holds: bool | None, sentence: str, width: int) -> str:
  return textwrap.fill(
    sentence, width, initial_indent=f"{_MARKS[holds]:>3}  ", subsequent_indent=" " * 5
  )


def _section(section: Section, width: int) -> str:
  body = _blocks(section.blocks, width)
  return f"{section.title}\n{'=' * len(section.title)}\n\n{body}" if body else ""


def _blocks(blocks: Iterable[Block], width: int) -> str:
  return "\n\n".join(text for text in (_block(block, width) for block in blocks) if text)


def _block(block: Block, width: int) -> str:
  match block:
    case Table():
      return _table(block, width)
    case Text(text, kind):
      return text if kind == "code" else textwrap.fill(text, width)
    case Facts(values):
      names = [name if block.verbatim else formatting.words(name) for name in values]
      longest = max(map(len, names), default=0)
      return "\n".join(
        f"{name.ljust(longest)}  {formatting.text(value)}"
        for name, value in zip(names, values.values(), strict=True)
      )
    case TextPair(left, right):
      return f"{_excerpt(left, width)}\n{_excerpt(right, width)}"
    case Grid(blocks):
      return _blocks(blocks, width)
    case Section(title, blocks):
      body = _blocks(blocks, width)
      return f"{title}\n{body}" if title and body else body
  return ""  # figures, their legends and details need a page


def _excerpt(excerpt: Excerpt, width: int) -> str:
  lines = [f"--- {excerpt.heading}  {excerpt.about}".rstrip()]
  for line in shortened(excerpt.text).splitlines():
    lines.append(textwrap.fill(line, width, initial_indent="    ", subsequent_indent="    "))
  return "\n".join(lines)


def _table(table: Table, width: int) -> str:
  from rich import box, console
  from rich.cells import cell_len
  from rich.table import Table as RichTable
  from rich.text import Text as RichText  # a plain string would be read as markup

  kept = [index for index, column in enumerate(table.columns) if column.brief]
  drawn = RichTable(
    box=box.Box("    \n    \n -- \n    \n    \n -- \n    \n    \n"),
    show_edge=False,
    pad_edge=False,
    padding=(0, 1, 0, 0),
  )
  lines = [*table.rows, *([table.total] if table.total else [])]
  for index in kept:
    column = table.columns[index]
    cells = [_cell(row[index], table.largest_bar) for row in lines]
    longest = max((cell_len(line) for cell in cells for line in cell.splitlines()), default=0)
    words = max(map(len, column.header.split()), default=0)
    drawn.add_column(
      column.header,
      justify="left" if column.is_text else "right",
      width=max(words, min(longest, _MAX_TEXT_COLUMN) if column.is_text else longest),
      overflow="fold",
    )
  for row in lines:
    drawn.add_row(*(RichText(_cell(row[index], table.largest_bar)) for index in kept))
  out = io.StringIO()
  console.Console(file=out, width=width, color_system=None, force_terminal=False).print(drawn)
  return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _cell(cell: Cell, largest: Real) -> str:
  if isinstance(cell, Bar):
    return "\N{FULL BLOCK}" * round(_BAR_WIDTH * max(cell.value, 0) / (largest or 1))
  if isinstance(cell, Stack):
    return "\n".join(formatting.text(line) for line in cell.lines)
  return formatting.text(cell)
