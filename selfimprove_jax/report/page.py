"""Renders a report as one HTML page that loads nothing from elsewhere."""

import importlib.resources
import itertools

import jinja2
from markupsafe import Markup

import selfimprove_jax.report.figures as figures
import selfimprove_jax.report.formatting as formatting
from selfimprove_jax.report.blocks import Report

MAX_TEXT = 1600  # characters of an excerpt; the artifacts hold the whole text

_GLYPHS = {
  "circle": "\N{BLACK CIRCLE}",
  "square": "\N{BLACK SQUARE}",
  "up": "\N{BLACK UP-POINTING TRIANGLE}",
  "down": "\N{BLACK DOWN-POINTING TRIANGLE}",
  "diamond": "\N{BLACK DIAMOND}",
  "plus": "\N{HEAVY GREEK CROSS}",
  "hollow": "\N{WHITE CIRCLE}",
}
_MARKS = {
  True: {"kind": "yes", "sign": "\N{CHECK MARK}", "meaning": "supported"},
  False: {"kind": "no", "sign": "\N{MULTIPLICATION X}", "meaning": "contradicted"},
  None: {"kind": "open", "sign": "\N{EN DASH}", "meaning": "undecided"},
}


def render(report: Report) -> str:
  """Returns the page; the same report gives the same bytes (with the same matplotlib)."""
  folder = importlib.resources.files(__package__)
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
  )
  numbers = itertools.count(1)
  environment.filters |= {
    "kind": lambda block: type(block).__name__,
    "text": formatting.text,
    "words": formatting.words,
    "shortened": shortened,
    # Safe as it is: `figures` escapes the title, and matplotlib the texts that it draws.
    "svg": lambda figure: Markup(figures.svg(figure, name=f"figure{next(numbers)}")),
  }
  template = environment.from_string(folder.joinpath("page.html.jinja").read_text("utf-8"))
  css = Markup(folder.joinpath("style.css").read_text("utf-8"))
  return template.render(report=report, css=css, glyphs=_GLYPHS, marks=_MARKS)


def shortened(text: str | None) -> str:
  """Cuts a long text and appends the number of characters that are missing."""
  if not text:
    return formatting.MISSING
  if len(text) <= MAX_TEXT:
    return text
  return f"{text[:MAX_TEXT]}\N{HORIZONTAL ELLIPSIS} ({len(text) - MAX_TEXT:,} more characters)"
