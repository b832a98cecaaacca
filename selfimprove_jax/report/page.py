"""report.html: one page that needs nothing but itself, from a report dict.

Every section is a function of the report and is empty where the run had no such stage.
"""

from typing import Any

from selfimprove_jax.report import elements, plots
from selfimprove_jax.report import formatting as fmt
from selfimprove_jax.report.style import CSS

_MARKS = {
  True: ("yes", "\N{CHECK MARK}", "holds"),
  False: ("no", "\N{MULTIPLICATION X}", "does not hold"),
  None: ("open", "\N{EN DASH}", "is not shown"),
}


def render(report: dict[str, Any]) -> str:
  """The page as a string; the same report gives the same bytes."""
  sections = (
    arms_section,
    controls_section,
    all_in_section,
    corpus_section,
    pairs_section,
    synthesis_section,
    stages_section,
    reproduce_section,
  )
  body = "".join(section(report) for section in sections)
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{fmt.escape(report['title'])}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n"
    f"{_header(report)}<main>\n{body}</main>\n"
    "<footer>Every number on this page, unrounded, is in report.json beside it.</footer>\n"
    "</body>\n</html>\n"
  )


def _header(report: dict[str, Any]) -> str:
  comparison = report["comparison"]
  claims = "".join(_claim(claim) for claim in comparison["claims"])
  caveats = "".join(f"<li>{fmt.escape(line)}</li>\n" for line in comparison["caveats"])
  return (
    f'<header>\n<p class="eyebrow">selfimprove_jax \N{MIDDLE DOT} report</p>\n'
    f"<h1>{fmt.escape(report['title'])}</h1>\n"
    f"{elements.paragraph(comparison['verdict'], 'lead')}\n"
    + (f'<ul class="claims">\n{claims}</ul>\n' if claims else "")
    + (f'<ul class="caveats">\n{caveats}</ul>\n' if caveats else "")
    + "</header>\n"
  )


def _claim(claim: dict[str, Any]) -> str:
  kind, mark, meaning = _MARKS[claim["holds"]]
  return (
    f'<li><span class="mark {kind}"><b aria-hidden="true">{mark}</b><span class="claim">'
    f'{fmt.escape(fmt.words(claim["claim"]))}</span> <span class="hidden">{meaning}</span></span>'
    f"<span>{fmt.escape(claim['sentence'])}</span></li>\n"
  )


def arms_section(report: dict[str, Any]) -> str:
  """The table of the arms, their curves and their losses."""
  arms, comparison = report["arms"], report["comparison"]
  names = fmt.arm_names(arms)
  rows = [_arm_row(name, names, arms[name], comparison) for name in names]
  headers = [
    "arm",
    "held-out nats/token",
    "bits/byte",
    "difference to the baseline (95%)",
    "oracle's gain recovered",
    "validation, best / final",
    "passes over its data",
    "training tokens",
    "FLOPs, own / all-in",
    "weight decay / dropout",
  ]
  curves = ""
  if any(arm.get("curve") for arm in arms.values()):
    curves = elements.figure(
      plots.loss_curves(arms),
      "Validation loss (solid) and training loss (dashed) over the arm's training tokens. The "
      "first steps are cut off.",
    )
  points = elements.figure(
    plots.arm_points(arms),
    "Each arm by itself. Documents differ much in difficulty, which widens these intervals; the "
    "paired differences below are what is compared.",
  )
  return elements.section(
    "The arms",
    elements.paragraph(
      f"Loss on {comparison['num_documents']:,} held-out documents "
      f"({comparison['num_tokens']:,} tokens) at the end of training, \N{PLUS-MINUS SIGN} its "
      "standard error over documents. Differences are paired by document; negative is better."
    ),
    elements.table(headers, rows, kind="pinned"),
    elements.legend(elements.arm(name, arms[name]["label"], names) for name in names),
    elements.grid(curves, points),
  )


def _arm_row(
  name: str, names: list[str], arm: dict[str, Any], comparison: dict[str, Any]
) -> list[str]:
  difference = comparison["differences"].get(name)
  share = comparison["recovered"].get(name)
  passes = [
    f"{fmt.escape(fmt.words(source))} {number:.3g}"
    for source, number in (arm.get("passes") or {}).items()
  ]
  return [
    elements.arm(name, arm["label"], names),
    _two_lines(*_estimate(arm["evals"]["heldout_nll"])),
    _two_lines(*_estimate(arm["evals"]["bits_per_byte"])),
    _two_lines(fmt.signed(difference["value"]), fmt.interval(difference["interval"]))
    if difference
    else fmt.MISSING,
    _two_lines(fmt.percent(share["value"]), f"\N{PLUS-MINUS SIGN} {fmt.percent(share['stderr'])}")
    if share
    else fmt.MISSING,
    _two_lines(fmt.fixed(arm["best_validation"]), fmt.fixed(arm["final_validation"])),
    "<br>".join(passes) or fmt.MISSING,
    fmt.short(arm["train_tokens"]),
    _two_lines(fmt.short(arm["train_flops"]), fmt.short(arm["all_in_flops"])),
    _two_lines(f"{arm['weight_decay']:g}", f"{arm['dropout_rate']:g}"),
  ]


def _estimate(estimate: dict[str, Any]) -> tuple[str, str]:
  return fmt.fixed(estimate["value"]), f"\N{PLUS-MINUS SIGN} {fmt.fixed(estimate['stderr'])}"


def _two_lines(first: str, second: str) -> str:
  return f"{first}<br><small>{second}</small>"


def controls_section(report: dict[str, Any]) -> str:
  """What else could explain a gain: the conditioning gap, relevance, unconditional samples."""
  comparison, arms = report["comparison"], report["arms"]
  conditioning, relevance = report.get("conditioning"), report.get("relevance")
  left = right = warning = ""
  if conditioning:
    gap = conditioning["gap"]
    if gap["value"] < conditioning["gate"]:
      warning = (
        f'<div class="warning"><strong>The conditioning gap is '
        f"{fmt.fixed(gap['value'])} nats per token, below the gate of "
        f"{conditioning['gate']:g}.</strong> A synthesizer that does not read d1 can at best do "
        "what unconditional samples do: any gain here is not synthesis from related documents."
        "</div>\n"
      )
    left += "<h3>Does the synthesizer read d1?</h3>" + elements.facts(
      {
        "NLL of d2, given its neighbour": f"{conditioning['true_nll']:.3f}",
        "NLL of d2, given a random d1": f"{conditioning['random_nll']:.3f}",
        "conditioning gap (nats/token)": fmt.with_error(gap),
        "gate": conditioning["gate"],
        "held-out pairs": conditioning["num_pairs"],
      }
    )
  if relevance:
    left += "<h3>Is a sample about its seed?</h3>" + elements.bars(
      [
        ("a real pair", relevance["real"]),
        ("a sample and its seed", relevance["own"]),
        ("a sample and a random seed", relevance["random"]),
      ]
    )
    left += elements.paragraph(
      f"A sample keeps {fmt.percent(relevance['retained_share'], 1)} of the similarity of a real "
      "pair, chance taken off.",
      "note",
    )
  rows = _difference_rows(report)
  if rows:
    oracle = comparison["differences"].get(comparison["oracle"])
    caption = (
      "First arm minus second, paired by document. Thick: 95% over documents; thin: with "
      f"{comparison['seed_noise']:g} nats of training-seed noise, which decides."
    )
    if oracle:
      caption += f" The oracle, at {fmt.signed(oracle['value'])}, is not drawn."
    right = "<h3>Differences</h3>" + elements.figure(
      plots.differences(rows, fmt.arm_names(arms)), caption
    )
  return elements.section(
    "Controls: what else could explain it", warning, elements.grid(left, right)
  )


def _difference_rows(report: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
  comparison, arms = report["comparison"], report["arms"]
  differences = comparison["differences"]
  pairs = [
    (name, differences[name]) for name in fmt.arm_names(differences) if name != comparison["oracle"]
  ]
  pairs += [(item["first"], item) for item in comparison["versus"].values()]
  return [
    (name, f"{arms[d['first']]['label']} \N{MINUS SIGN} {arms[d['second']]['label']}", d)
    for name, d in pairs
  ]


def all_in_section(report: dict[str, Any]) -> str:
  """The second comparison: what the synthetic text cost, and what repeating costs as much."""
  arms = report["arms"]
  names = [name for name in fmt.arm_names(arms) if arms[name].get("flops_parts")]
  if not names:
    return ""
  claims = [c for c in report["comparison"]["claims"] if c["claim"] == "gain_at_equal_flops"]
  sentence = claims[0]["sentence"] if claims else "No arm of equal all-in FLOPs was trained."
  parts = plots.FLOP_PARTS
  rows = [
    [elements.arm(name, arms[name]["label"], fmt.arm_names(arms))]
    + [fmt.short(arms[name]["flops_parts"].get(part, 0)) for part in parts]
    + [fmt.short(arms[name]["all_in_flops"])]
    for name in names
  ]
  figure = elements.figure(
    plots.flops_bars(arms),
    "FLOPs that had to be spent for each arm: its own training, and what came before it.",
  )
  return elements.section(
    "At equal all-in FLOPs",
    elements.grid(
      elements.legend(elements.swatch(f"part-{part}", part) for part in parts) + figure,
      elements.paragraph(sentence),
    ),
    elements.table(["FLOPs", *parts, "all-in"], rows, kind="pinned"),
  )


def corpus_section(report: dict[str, Any]) -> str:
  documents, tokenizer = report.get("corpus"), report.get("tokenizer")
  return elements.section(
    "Corpus",
    elements.grid(
      "<h3>Documents</h3>" + elements.facts(documents) if documents else "",
      "<h3>Tokenizer</h3>" + elements.facts(tokenizer) if tokenizer else "",
    ),
  )


def pairs_section(report: dict[str, Any]) -> str:
  """How many pairs, how alike, and some of them."""
  pairs = report.get("pairs") or {}
  counts = dict(pairs.get("counts") or {})
  if pairs.get("recall"):
    counts["recall of the exact neighbours"] = pairs["recall"]
  right = ""
  if pairs.get("similarities"):
    right = elements.figure(
      plots.similarity_histogram(pairs["similarities"]),
      f"{len(pairs['similarities']):,} pairs by their similarity.",
    )
  examples = "".join(
    elements.texts(
      ("d1", pair["d1"], pair["d1_text"]),
      (
        "d2",
        f"{pair['d2']} \N{MIDDLE DOT} similarity {fmt.fixed(pair['similarity'], 2)}",
        pair["d2_text"],
      ),
    )
    for pair in report.get("pair_examples") or []
  )
  return elements.section("Pairs", elements.grid(elements.facts(counts), right), examples)


def synthesis_section(report: dict[str, Any]) -> str:
  """What was sampled, what the filters dropped, and samples beside their seeds."""
  synthesis = report.get("synthesis") or {}
  columns = {source: _synthesis_column(found) for source, found in synthesis.items()}
  keys = list(dict.fromkeys(key for column in columns.values() for key in column))
  rows = [
    [fmt.escape(key), *(fmt.escape(fmt.value(column.get(key))) for column in columns.values())]
    for key in keys
  ]
  labels = {name: arm["label"] for name, arm in report["arms"].items()}
  headers = ["documents", *(labels.get(source, fmt.words(source)) for source in columns)]
  return elements.section(
    "Synthetic documents",
    elements.table(headers, rows) if rows else "",
    "".join(_example(example) for example in report.get("examples") or []),
  )


def _synthesis_column(found: dict[str, Any]) -> dict[str, Any]:
  column = {fmt.words(key): count for key, count in (found.get("counts") or {}).items()}
  for reason, count in (found.get("finish_reasons") or {}).items():
    column[f"ended by {fmt.words(reason)}"] = count
  for key, estimate in (found.get("quality") or {}).items():
    column[f"{fmt.words(key)} ({estimate['unit']})"] = {**estimate, "unit": ""}
  return column


def _example(example: dict[str, Any]) -> str:
  about = f"{fmt.words(example['source'])} \N{MIDDLE DOT} ended by {example['finish_reason']}"
  if example.get("similarity") is not None:
    about += f" \N{MIDDLE DOT} similarity to its seed {fmt.fixed(example['similarity'], 2)}"
  seed = ("Seed", example["seed_id"] or "", example["seed_text"])
  if not example["seed_text"]:
    seed = ("Seed", "none: sampled unconditionally", None)
  return elements.texts(seed, ("Synthesis", about, example["text"]))


def stages_section(report: dict[str, Any]) -> str:
  """What every stage took."""
  stages = report.get("stages") or []
  if not stages:
    return ""
  total = {key: sum(stage[key] or 0 for stage in stages) for key in ("seconds", "tokens", "flops")}
  longest = max(max(stage["seconds"] or 0 for stage in stages), 1e-9)
  rows = [
    [
      fmt.escape(fmt.words(stage["name"])),
      f'<span class="bar" style="width:{100 * (stage["seconds"] or 0) / longest:.1f}%"></span>',
      fmt.duration(stage["seconds"]),
      fmt.short(stage["tokens"]),
      fmt.short(stage["flops"]),
    ]
    for stage in stages
  ]
  totals = ["all", "", fmt.duration(total["seconds"]), fmt.short(total["tokens"])]
  return elements.section(
    "Stages",
    elements.table(
      ["stage", "", "time", "tokens", "FLOPs"],
      rows,
      text_columns=2,
      kind="barred",
      total_html=[*totals, fmt.short(total["flops"])],
    ),
  )


def reproduce_section(report: dict[str, Any]) -> str:
  """The command, the machine, the versions and the whole config."""
  config = [
    [f"<code>{fmt.escape(path)}</code>", f"<code>{fmt.escape(fmt.value(leaf))}</code>"]
    for path, leaf in fmt.flatten(report["config"])
  ]
  facts = {"commit": report.get("commit") or fmt.MISSING, **report["hardware"]}
  return elements.section(
    "How this was made",
    f'<code class="command">{fmt.escape(report["command"])}</code>',
    elements.grid(
      elements.facts(facts, verbatim=True), elements.facts(report["versions"], verbatim=True)
    ),
    elements.details(
      f"Config ({len(config)} values)", elements.table(["field", "value"], config, text_columns=2)
    ),
  )
