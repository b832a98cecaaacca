"""Renders a report as plain text of a given width."""

import io
import re
import textwrap
from collections.abc import Iterable

import selfimprove_jax.report.blocks as blocks
import selfimprove_jax.report.formatting as formatting
from selfimprove_jax.report.page import shortened

_MARKS = {True: "yes", False: "no", None: "-"}
_MAX_TEXT_COLUMN = 24  # longer names are wrapped
_BAR_WIDTH = 20
# Escape sequences in sampled text could move the cursor or change the terminal's colors.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def render(report: blocks.Report, *, examples: bool, width: int) -> str:
  """Returns the summary sections, the lead, the claims and, with `examples`, every section."""
  claims = (
    textwrap.fill(
      claim.sentence,
      width,
      initial_indent=f"{_MARKS[claim.holds]:>3}  ",
      subsequent_indent=" " * 5,
    )
    for claim in report.claims
  )
  parts = [_blocks(section.blocks, width) for section in report.sections if section.in_summary]
  parts += [textwrap.fill(report.lead, width), "\n".join(claims)]
  if examples:
    others = [section for section in report.sections if not section.in_summary]
    parts = [report.title, *parts, *(_section(section, width) for section in others)]
  return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", "\n\n".join(part for part in parts if part))


def _section(section: blocks.Section, width: int) -> str:
  body = _blocks(section.blocks, width)
  return f"{section.title}\n{'=' * len(section.title)}\n\n{body}" if body else ""


def _blocks(shown: Iterable[blocks.Block], width: int) -> str:
  return "\n\n".join(text for text in (_block(block, width) for block in shown) if text)


def _block(block: blocks.Block, width: int) -> str:
  match block:
    case blocks.Table():
      return _table(block, width)
    case blocks.Text(text, kind):
      return text if kind == "code" else textwrap.fill(text, width)
    case blocks.Facts(values):
      names = [name if block.verbatim else formatting.words(name) for name in values]
      longest = max(map(len, names), default=0)
      return "\n".join(
        f"{name.ljust(longest)}  {formatting.text(value)}"
        for name, value in zip(names, values.values(), strict=True)
      )
    case blocks.TextPair(left, right):
      return f"{_excerpt(left, width)}\n{_excerpt(right, width)}"
    case blocks.Grid(inner):
      return _blocks(inner, width)
    case blocks.Section(title, inner):
      body = _blocks(inner, width)
      return f"{title}\n{body}" if title and body else body
  return ""  # figures, their legends and details need a page


def _excerpt(excerpt: blocks.Excerpt, width: int) -> str:
  lines = [f"--- {excerpt.heading}  {excerpt.about}".rstrip()]
  for line in shortened(excerpt.text).splitlines():
    lines.append(textwrap.fill(line, width, initial_indent="    ", subsequent_indent="    "))
  return "\n".join(lines)


def _table(table: blocks.Table, width: int) -> str:
  from rich import box, console
  from rich.cells import cell_len
  from rich.table import Table
  from rich.text import Text  # a plain string would be read as markup

  kept = [index for index, column in enumerate(table.columns) if column.brief]
  drawn = Table(
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
    drawn.add_row(*(Text(_cell(row[index], table.largest_bar)) for index in kept))
  out = io.StringIO()
  console.Console(file=out, width=width, color_system=None, force_terminal=False).print(drawn)
  return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _cell(cell: blocks.Cell, largest: blocks.Real) -> str:
  if isinstance(cell, blocks.Bar):
    return "\N{FULL BLOCK}" * round(_BAR_WIDTH * max(cell.value, 0) / (largest or 1))
  if isinstance(cell, blocks.Stack):
    return "\n".join(formatting.text(line) for line in cell.lines)
  return formatting.text(cell)
