import copy
import re
from html.parser import HTMLParser

import pytest

from selfimprove_jax.report import formatting as fmt
from selfimprove_jax.report import page, write

_OPTIONAL = {  # key of the report -> what is on the page only for its sake
  "stages": "<h2>Stages</h2>",
  "corpus": "<h3>Documents</h3>",
  "tokenizer": "<h3>Tokenizer</h3>",
  "conditioning": "Does the synthesizer read d1?",
  "relevance": "Is a sample about its seed?",
  "pairs": "<dt>candidates</dt>",
  "synthesis": "ended by length</td>",
  "examples": "<b>Seed</b>",
  "pair_examples": "<b>d1</b>",
}
_VOID = {"meta", "br", "use"}


class _Balance(HTMLParser):
  """Raises where a closing tag is not that of the innermost open element."""

  def __init__(self):
    super().__init__()
    self.open = []

  def handle_starttag(self, tag, attrs):
    if tag not in _VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in _VOID:
      assert self.open.pop() == tag


def _text(html: str) -> str:
  return re.sub(r"<[^>]*>", " ", html)


def test_every_arm_is_shown_with_its_numbers(sample_report):
  text = _text(page.render(sample_report))
  comparison = sample_report["comparison"]
  for name, arm in sample_report["arms"].items():
    assert arm["label"] in text
    for estimate in arm["evals"].values():
      assert fmt.fixed(estimate["value"]) in text
      assert fmt.fixed(estimate["stderr"]) in text
    assert fmt.fixed(arm["best_validation"]) in text
    assert fmt.short(arm["all_in_flops"]) in text
    if name in comparison["differences"]:
      assert fmt.signed(comparison["differences"][name]["value"]) in text
      assert fmt.interval(comparison["differences"][name]["interval"]) in text


def test_the_verdict_every_claim_and_every_caveat_are_shown(sample_report):
  html = page.render(sample_report)
  comparison = sample_report["comparison"]
  sentences = [claim["sentence"] for claim in comparison["claims"]]
  for sentence in [comparison["verdict"], *sentences, *comparison["caveats"]]:
    assert fmt.escape(sentence) in html
  marks = re.findall(r'class="mark (\w+)"', html)
  kinds = {True: "yes", False: "no", None: "open"}
  assert marks == [kinds[claim["holds"]] for claim in comparison["claims"]]
  assert len(set(marks)) == 3  # the sample has one of each


def test_the_page_loads_nothing(sample_report):
  html = page.render(sample_report)
  assert "://" not in html
  assert "<script" not in html
  assert "@import" not in html
  assert not re.search(r'(?:src|href)="(?!#)', html)
  assert not re.search(r"url\((?!#)", html)


def test_what_an_id_is_asked_for_is_there_once(sample_report):
  html = page.render(sample_report)
  ids = re.findall(r' id="([^"]+)"', html)
  assert len(ids) == len(set(ids))
  assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) == set(ids)


def test_texts_and_names_are_escaped(sample_report):
  nasty = "</div><script>alert('x')</script><b>&amp;"
  sample_report["title"] = nasty
  sample_report["command"] = nasty
  sample_report["config"] = {nasty: nasty}
  sample_report["corpus"] = {nasty: nasty}
  sample_report["arms"]["sbp"]["label"] = nasty
  sample_report["arms"]["sbp"]["passes"] = {nasty: 1.0}
  sample_report["synthesis"] = {nasty: {"counts": {nasty: 3}, "finish_reasons": {nasty: 1}}}
  sample_report["stages"][0]["name"] = nasty
  sample_report["comparison"]["claims"][0]["sentence"] = nasty
  sample_report["comparison"]["caveats"] = [nasty]
  for example in sample_report["examples"]:
    example |= {"source": nasty, "seed_id": nasty, "seed_text": nasty, "text": nasty}
  for pair in sample_report["pair_examples"]:
    pair |= {"d1": nasty, "d2": nasty, "d1_text": nasty, "d2_text": nasty}
  html = page.render(sample_report)
  assert "<script" not in html
  assert "<b>&amp;<" not in html
  _Balance().feed(html)


def test_tags_are_balanced(sample_report):
  parser = _Balance()
  parser.feed(page.render(sample_report))
  assert parser.open == []


def test_the_same_report_gives_the_same_bytes(sample_report, tmp_path):
  for folder in ("a", "b"):
    write.write_report(copy.deepcopy(sample_report), tmp_path / folder)
  for name in ("report.json", "report.html"):
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_order_in_which_arms_were_run_does_not_matter(sample_report):
  turned = dict(sample_report, arms=dict(reversed(sample_report["arms"].items())))
  assert page.render(turned) == page.render(sample_report)


@pytest.mark.parametrize("key", _OPTIONAL)
def test_a_run_without_a_stage_has_a_page_without_its_section(sample_report, key):
  del sample_report[key]
  html = page.render(sample_report)
  for other, words in _OPTIONAL.items():
    assert (words in html) == (other != key), other
  _Balance().feed(html)


def test_a_run_of_arms_alone_has_a_page(sample_report):
  for key in _OPTIONAL:
    del sample_report[key]
  for arm in sample_report["arms"].values():
    for key in ("curve", "flops_parts", "passes"):
      del arm[key]
  sample_report["comparison"] |= {"claims": [], "caveats": [], "versus": {}, "recovered": {}}
  html = page.render(sample_report)
  assert "The arms" in html
  assert "Pairs" not in html
  assert "Synthetic documents" not in html
  _Balance().feed(html)


def test_a_small_conditioning_gap_is_warned_about_and_a_large_one_is_not(sample_report):
  assert 'class="warning"' in page.render(sample_report)
  sample_report["conditioning"]["gap"]["value"] = 0.12
  assert 'class="warning"' not in page.render(sample_report)


def test_a_long_text_is_cut_and_says_so(sample_report):
  sample_report["examples"][0]["text"] = "x" * 5000
  html = page.render(sample_report)
  assert "3,400 more characters" in html
  assert "x" * 1601 not in html


def test_an_arm_of_another_name_gets_a_colour_and_a_row(sample_report):
  sample_report["arms"]["rephrased"] = dict(sample_report["arms"]["sbp"], label="Rephrased")
  html = page.render(sample_report)
  assert "Rephrased" in html
  assert "--arm-other0)" in html


def test_every_colour_that_is_used_is_defined_for_light_and_dark(sample_report):
  html = page.render(sample_report)
  defined = re.findall(r"--([\w-]+):", html)
  assert all(defined.count(role) == 2 for role in defined)
  assert set(re.findall(r"var\(--([\w-]+)\)", html)) <= set(defined)
