import re
from html.parser import HTMLParser

from selfimprove_jax.report import page
from selfimprove_jax.report.blocks import Column, Excerpt, Section, Table, TextPair

_VOID = {"meta", "br", "use"}
_NASTY = "</div><script>alert('x')</script><b>&amp;"


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


def test_every_block_is_on_the_page(html):
  text = " ".join(_text(html).split())
  for words in (
    "plain text: title",
    "plain text: lead",
    "\N{MINUS SIGN}0.038 \N{MINUS SIGN}0.095 to +0.019",
    "3.957 ± 0.021",
    "1.58M",
    "4.2 s",
    "pairs 4,312",
    "is done yes",
    "empty \N{EN DASH}",
    "x_y a 1, b 2",
    "Group plain text",
    "a.b plain text",
    "Seed plain text plain text Synthesis plain text \N{EN DASH}",
  ):
    assert words in text, words
  assert html.count("<svg") == html.count("<figcaption>") == 5
  assert 'class="warning"' in html
  assert '<code class="command">plain text</code>' in html
  assert 'class="bar" style="width:50.0%"' in html
  assert '<tr class="total"><td class="name">all</td>' in html


def test_claims_are_marked_as_supported_contradicted_or_undecided(html):
  assert re.findall(r'class="mark (\w+)"', html) == ["yes", "no", "open"]
  assert re.findall(r'class="hidden">(\w+)<', html) == ["supported", "contradicted", "undecided"]
  assert '<span class="claim">gain x</span>' in html


def test_a_section_without_blocks_is_not_on_the_page(html):
  assert "<h2>Nothing</h2>" not in html


def test_the_page_loads_nothing(html):
  assert "://" not in html
  assert "<script" not in html
  assert "@import" not in html
  assert not re.search(r'(?:src|href)="(?!#)', html)
  assert not re.search(r"url\((?!#)", html)


def test_ids_are_unique_and_every_reference_has_one(html):
  ids = re.findall(r' id="([^"]+)"', html)
  assert ids
  assert len(ids) == len(set(ids))
  assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) == set(ids)


def test_texts_are_escaped_wherever_they_stand(make_report):
  html = page.render(make_report(_NASTY))
  assert "<script" not in html
  assert "<b>&amp;<" not in html
  assert html.count("&lt;script&gt;") > 20
  parser = _Balance()
  parser.feed(html)
  assert parser.open == []


def test_every_color_is_defined_for_light_and_dark(html):
  defined = re.findall(r"--([\w-]+):", html)
  assert all(defined.count(role) == 2 for role in defined)
  assert set(re.findall(r"var\(--([\w-]+)\)", html)) <= set(defined)


def _scrolls(columns):
  table = Table(tuple(Column(f"c{i}") for i in range(columns)), (tuple(range(columns)),))
  return Section("Wide", (table,))


def test_a_wide_table_says_that_it_scrolls(make_report):
  html = page.render(make_report(sections=(_scrolls(7),)))
  assert '<p class="hint" aria-hidden="true">7 columns: scroll sideways &rarr;</p>' in html
  # The keyboard can reach it, and a screen reader announces it.
  assert 'class="scroll wide" role="region" tabindex="0" aria-label="Table of 7 columns"' in html

  css = html[html.index("<style>") : html.index("</style>")]
  narrow = css[css.index("@media (max-width: 40rem)") :]
  assert ".hint { display: none" in css
  assert ".hint { display: block" in narrow
  assert "position: sticky" in narrow
  assert re.search(r"\.wide \{[^}]*var\(--shade\)", css)
  assert "4 columns: scroll" not in page.render(make_report(sections=(_scrolls(4),)))


def test_a_long_text_is_cut_and_the_page_says_so(make_report):
  pair = TextPair(Excerpt("Seed", "", "x" * 5000), Excerpt("Synthesis", "", "short"))
  html = page.render(make_report(sections=(Section("Long", (pair,)),)))
  assert "3,400 more characters" in html
  assert "x" * 1601 not in html
