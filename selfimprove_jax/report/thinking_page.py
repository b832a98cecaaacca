"""report.html of a comparison of test-time compute: curves, methods, arms."""

from typing import Any

from selfimprove_jax.report import elements, page, plots
from selfimprove_jax.report import formatting as fmt
from selfimprove_jax.report.style import CSS

_ROLES = (
  *("arm-sbp", "arm-unconditional", "arm-oracle", "arm-random-pairs", "arm-other0"),
  *("arm-other1", "arm-other2", "arm-baseline"),
)
_MARKERS = {
  "o": "\N{BLACK CIRCLE}",
  "s": "\N{BLACK SQUARE}",
  "^": "\N{BLACK UP-POINTING TRIANGLE}",
  "v": "\N{BLACK DOWN-POINTING TRIANGLE}",
  "D": "\N{BLACK DIAMOND}",
}
_Z95 = 1.959964


def render(report: dict[str, Any]) -> str:
  """The page as a string; the same report gives the same bytes."""
  sections = (_curves, _methods, _arms, page.stages_section, page.reproduce_section)
  body = "".join(section(report) for section in sections)
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{fmt.escape(report['title'])}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n"
    '<header>\n<p class="eyebrow">selfimprove_jax \N{MIDDLE DOT} report</p>\n'
    f"<h1>{fmt.escape(report['title'])}</h1>\n{elements.paragraph(_lead(report), 'lead')}\n"
    f"</header>\n<main>\n{body}</main>\n"
    "<footer>Every number on this page, unrounded, is in report.json beside it.</footer>\n"
    "</body>\n</html>\n"
  )


def _lead(report):
  """What the slopes say, each by itself: above or below zero only where 95% of it is."""
  says = {1: "rises with", -1: "falls with", 0: "is not shown to change with"}
  sentences = [
    f"The accuracy of {method} {says[_sign(found['scaling'])]} thinking tokens."
    for method, found in report["methods"].items()
    if found["scaling"] is not None and not found["is_control"]
  ]
  return " ".join([f"{report['questions']:,} questions, one seed.", *sentences])


def _sign(estimate: dict[str, Any]) -> int:
  if abs(estimate["value"]) <= _Z95 * estimate["stderr"]:
    return 0
  return 1 if estimate["value"] > 0 else -1


def _look(report: dict[str, Any], method: str) -> tuple[str, str]:
  """Colour role and marker of a method, through the whole page."""
  index = list(report["methods"]).index(method)
  return _ROLES[index % len(_ROLES)], list(_MARKERS)[index % len(_MARKERS)]


def _name(report: dict[str, Any], method: str) -> str:
  role, marker = _look(report, method)
  key = (
    f'<span class="key" style="color:var(--{role})" aria-hidden="true">{_MARKERS[marker]}</span>'
  )
  return key + fmt.escape(method)


def _curves(report: dict[str, Any]) -> str:
  methods = report["methods"]
  main = [method for method in methods if not methods[method]["is_control"]]
  controls = [method for method in methods if methods[method]["is_control"]]
  figures = [
    elements.figure(
      scaling_curves(report, main, name="scaling"),
      "Sequential and parallel: accuracy against thinking tokens, all samples of a question "
      "together; bars are 95% over questions.",
    )
  ]
  if controls:
    figures.append(
      elements.figure(
        scaling_curves(report, controls, name="controls"), "The other ways to control length."
      )
    )
  return elements.section(
    "Accuracy against test-time compute",
    elements.legend(_name(report, method) for method in methods),
    elements.grid(*figures),
  )


def scaling_curves(report: dict[str, Any], methods: list[str], *, name: str) -> str:
  """Accuracy of every run of the methods over its thinking tokens, a line for each method."""
  highs = [p["accuracy"]["value"] + _Z95 * p["accuracy"]["stderr"] for p in report["points"]]
  top = 1.05 * max(highs) or 1.0  # the same in every figure

  def draw(figure):
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    for method in methods:
      role, marker = _look(report, method)
      points = sorted(
        (p["thinking_tokens"]["value"], p["accuracy"]["value"], _Z95 * p["accuracy"]["stderr"])
        for p in report["points"]
        if p["method"] == method and p["thinking_tokens"]["value"] > 0
      )
      if points:
        x, y, halves = zip(*points)
        colour = plots.PLACEHOLDER[role]
        axes.errorbar(
          x,
          y,
          yerr=halves,
          color=colour,
          marker=marker,
          markersize=5,
          linewidth=1.4,
          elinewidth=0.8,
        )
    axes.set_ylim(0, top)
    axes.xaxis.set_major_formatter(lambda number, _: fmt.short(number, pad=False))
    axes.yaxis.set_major_formatter(lambda number, _: fmt.percent(number))
    plots.labelled(axes, "thinking tokens per question", "accuracy")

  return plots.svg(name, 3.4, "Accuracy against thinking tokens", draw)


def _methods(report: dict[str, Any]) -> str:
  rows = [
    [
      _name(report, method),
      str(found["num_runs"]),
      fmt.percent(found["control"]),
      fmt.with_error(found["scaling"], 2),
      fmt.with_error(found["performance"]),
    ]
    for method, found in report["methods"].items()
  ]
  headers = ["method", "runs", "control", "scaling", "performance"]
  return elements.section(
    "Control, Scaling, Performance",
    elements.paragraph(
      "Control: share of the runs whose mean thinking is as long as was demanded. Scaling: mean "
      "slope over all pairs of runs, in accuracy points per 1,000 thinking tokens. Performance: "
      "accuracy of the best run, which is too high where it was picked by luck."
    ),
    elements.table(headers, rows),
  )


def _arms(report: dict[str, Any]) -> str:
  rows = [
    [
      fmt.escape(point["arm"]),
      _name(report, point["method"]),
      str(point["num_samples"]),
      fmt.with_error(point["accuracy"]),
      f"{point['thinking_tokens']['value']:,.1f}",
      f"{point['sampled_tokens']:,.1f}",
      _demanded(point["demanded"]),
      fmt.percent(point["share_within"]),
      fmt.escape(fmt.value(point["forced"])),
      fmt.escape(fmt.value(point["statuses"])),
    ]
    for point in report["points"]
  ]
  headers = [
    *("arm", "method", "samples", "accuracy", "thinking tokens", "sampled tokens", "demanded"),
    *("questions within", "thoughts ended", "answers"),
  ]
  return elements.section(
    "The arms",
    elements.paragraph(
      f"Tokens are per question. Sampled tokens count answers and rejected tries too. Answers were "
      f"compared {report['checker']}."
    ),
    elements.table(headers, rows, text_columns=2, kind="pinned"),
  )


def _demanded(bounds: list[int | None]) -> str:
  low, high = bounds
  if high is None:
    return f"\N{GREATER-THAN OR EQUAL TO} {low:,}" if low else fmt.MISSING
  return f"{low:,} to {high:,}"
