import dataclasses

from selfimprove_jax import report
from selfimprove_jax.report.blocks import Column, Excerpt, Label, Section, Style, Table, TextPair


def test_the_summary_lead_and_claims_are_printed(made):
  printed = report.to_terminal(made)
  lines = printed.splitlines()
  assert lines[0] == "plain text"
  header = next(line for line in lines if line.startswith("arm "))
  assert header.split() == ["arm", "difference", "(95%)", "nats/token", "tokens"]
  row = next(line for line in lines if line.startswith("baseline"))
  assert row.split() == ["baseline", "\N{EN DASH}", "3.995", "±", "0.020", "1.58M"]
  assert "\N{MINUS SIGN}0.095 to +0.019" in printed
  assert "1.5 " not in printed  # the column of bits is not brief
  assert lines[-3:] == [
    "yes  plain text: True",
    " no  plain text: False",
    "  -  plain text: None",
  ]
  assert "Everything" not in printed


def test_examples_print_every_section_and_the_title(made):
  printed = report.to_terminal(made, examples=True)
  for words in (
    "plain text: title",
    "Everything\n==========",
    "pairs       4,312",
    "--- Seed  plain text\n    plain text",
    "Group\nplain text",
    "plain text  ████████████████████  4.2 s",
    "all                                   1",
  ):
    assert words in printed, words
  assert "Nothing" not in printed
  assert "a.b" not in printed  # details


def test_lines_are_no_longer_than_the_width(make_report):
  long = make_report("a text that is much too long for a cell " * 4)
  for width in (80, 100):
    for line in report.to_terminal(long, width=width).splitlines():
      assert len(line) <= width, line


def test_a_long_name_is_wrapped_and_no_cell_is_cut(make_report):
  name = "a label that is much too long for the table"
  rows = ((Label(name, Style("blue")), 1.25), ("x" * 40, 2.5))
  table = Table((Column("arm", is_text=True), Column("a number that has a long header")), rows)
  printed = report.to_terminal(make_report(sections=(Section("", (table,), in_summary=True),)))
  flat = "".join(printed.split())
  assert "1.25" in flat
  assert "x" * 40 not in printed
  assert flat.count("x") >= 40
  assert "…" not in printed


def test_markup_of_the_table_library_is_printed_as_it_is(make_report):
  printed = report.to_terminal(make_report("[bold]a[/bold] :smile:"), examples=True)
  row = next(line for line in printed.splitlines() if line.endswith("1.58M"))
  assert row.startswith("[bold]a[/bold] :smile:  ")


def test_control_characters_of_a_sampled_text_do_not_reach_the_terminal(make_report):
  pair = TextPair(Excerpt("Seed", "", "a\x1b[31mred\x07\tb\nc"), Excerpt("Synthesis", "", None))
  made = make_report(sections=(Section("Texts", (pair,)),))
  printed = report.to_terminal(made, examples=True)
  assert "a\N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER}" in printed
  assert not any(ord(character) < 32 and character != "\n" for character in printed)


def test_a_report_without_results_prints_its_lead(made):
  empty = dataclasses.replace(made, sections=(), claims=())
  assert report.to_terminal(empty) == "plain text: lead"
