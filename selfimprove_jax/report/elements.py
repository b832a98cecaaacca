"""The pieces that the page's sections are made of: tables, lists of facts, figures, texts.

Arguments called `*_html` are markup already; every other text is escaped here.
"""

from collections.abc import Iterable
from typing import Any

from selfimprove_jax.report import formatting as fmt

_GLYPHS = {
  "baseline": "\N{BLACK CIRCLE}",
  "sbp": "\N{BLACK SQUARE}",
  "unconditional": "\N{BLACK UP-POINTING TRIANGLE}",
  "random_pairs": "\N{BLACK DOWN-POINTING TRIANGLE}",
  "oracle": "\N{BLACK DIAMOND}",
  "baseline_all_in": "\N{WHITE CIRCLE}",
}
_MAX_TEXT = 1600  # characters of one text; the artefacts hold the whole


def section(title: str, *parts_html: str) -> str:
  """A titled section, or nothing where all its parts are empty."""
  body = "".join(parts_html)
  return f"<section><h2>{fmt.escape(title)}</h2>{body}</section>\n" if body else ""


def paragraph(text: str, kind: str = "") -> str:
  attribute = f' class="{kind}"' if kind else ""
  return f"<p{attribute}>{fmt.escape(text)}</p>" if text else ""


def table(
  headers: list[str],
  rows_html: Iterable[list[str]],
  *,
  text_columns: int = 1,
  kind: str = "",
  total_html: list[str] | None = None,
) -> str:
  """A table that scrolls sideways where it does not fit.

  Args:
    rows_html: cells as markup.
    text_columns: the first so many columns are text, the others numbers, set to the right.
    total_html: a last row that is set apart.
  """

  def row(cells: list[str], tag: str) -> str:
    return "".join(
      f"<{tag}{_class(index, tag, text_columns)}>{cell}</{tag}>" for index, cell in enumerate(cells)
    )

  head = row([fmt.escape(header) for header in headers], "th")
  body = "".join(f"<tr>{row(cells, 'td')}</tr>\n" for cells in rows_html)
  if total_html:
    body += f'<tr class="total">{row(total_html, "td")}</tr>\n'
  return (
    f'<div class="scroll {kind}"><table><thead><tr>{head}</tr></thead>\n'
    f"<tbody>\n{body}</tbody></table></div>\n"
  )


def _class(index: int, tag: str, text_columns: int) -> str:
  if index >= text_columns:
    return ' class="n"'
  return ' class="arm"' if index == 0 and tag == "td" else ""


def facts(values: dict[str, Any] | None, *, verbatim: bool = False) -> str:
  """Names and values, one line each; nothing for nothing. `verbatim` names are no words."""
  if not values:
    return ""
  lines = "".join(
    f"<dt>{fmt.escape(key if verbatim else fmt.words(key))}</dt>"
    f"<dd>{fmt.escape(fmt.value(value))}</dd>"
    for key, value in values.items()
  )
  return f"<dl{' class=verbatim' if verbatim else ''}>{lines}</dl>\n"


def bars(rows: list[tuple[str, dict[str, Any] | float]]) -> str:
  """Estimates with a bar each, on one scale from zero."""
  numbers = [value["value"] if isinstance(value, dict) else value for _, value in rows]
  longest = max([abs(number) for number in numbers] + [1e-12])
  cells = [
    [
      fmt.escape(label),
      f'<span class="bar" style="width:{100 * max(number, 0) / longest:.1f}%"></span>',
      fmt.with_error(value),
    ]
    for (label, value), number in zip(rows, numbers, strict=True)
  ]
  return table(["", "", "cosine"], cells, text_columns=2, kind="barred")


def figure(svg: str, caption: str) -> str:
  return f"<figure>{svg}<figcaption>{fmt.escape(caption)}</figcaption></figure>\n"


def grid(*parts_html: str) -> str:
  """Parts side by side, or below each other on a narrow screen; nothing for no parts."""
  parts = "".join(f"<div>{part}</div>" for part in parts_html if part)
  return f'<div class="grid">{parts}</div>\n' if parts else ""


def arm(name: str, label: str, names: list[str]) -> str:
  """An arm's marker in its colour, and its label."""
  role = fmt.arm_role(name, names)
  glyph = _GLYPHS.get(name, "\N{HEAVY GREEK CROSS}")
  key = f'<span class="key" style="color:var(--{role})" aria-hidden="true">{glyph}</span>'
  return key + fmt.escape(label)


def legend(entries_html: Iterable[str]) -> str:
  return '<div class="legend">' + "".join(f"<span>{e}</span>" for e in entries_html) + "</div>\n"


def swatch(role: str, label: str) -> str:
  return f'<span class="swatch" style="background:var(--{role})"></span>{fmt.escape(label)}'


def texts(left: tuple[str, str, str | None], right: tuple[str, str, str | None]) -> str:
  """Two texts side by side, each as (heading, what it is, text)."""
  columns = "".join(
    f"<div><h4><b>{fmt.escape(heading)}</b> {fmt.escape(about)}</h4>"
    f'<div class="text">{fmt.escape(_shortened(text))}</div></div>'
    for heading, about, text in (left, right)
  )
  return f'<div class="texts">{columns}</div>\n'


def _shortened(text: str | None) -> str:
  if not text:
    return fmt.MISSING
  if len(text) <= _MAX_TEXT:
    return text
  return f"{text[:_MAX_TEXT]}\N{HORIZONTAL ELLIPSIS} ({len(text) - _MAX_TEXT:,} more characters)"


def details(summary: str, body_html: str) -> str:
  """Markup that opens on a click."""
  return f"<details><summary>{fmt.escape(summary)}</summary>{body_html}</details>\n"
