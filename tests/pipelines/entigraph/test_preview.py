"""What a synthesis costs, before its first call and while it runs."""

import io
import re

import pytest

from selfimprove_jax.language_models.chat_api import rough_num_tokens
from selfimprove_jax.pipelines import entigraph
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runtime.config import parse
from selfimprove_jax.runtime.progress import Progress
from tests.pipelines.entigraph import writer


def _rows(told):
  rows = [re.split(r"  +", line) for line in told.splitlines() if "  " in line]
  return {row[0]: dict(zip(rows[0], row)) for row in rows[1:]}


@pytest.fixture
def priced(values, server, tmp_path):
  return writer.page(values, server.url, str(tmp_path / "calls.sqlite"))


def test_calls_that_are_known_are_counted_and_others_are_bounded(priced):
  priced["synthesis"] |= {"spa_samples": 2, "active_reading_samples": 1, "focal_samples": 3}
  for name in ("spa", "active_reading", "focal"):
    priced["arms"][name] = {"corpora": {name: 1.0}, "target_tokens": 900}
  told = entigraph.preview(parse(entigraph.Config, priced))
  assert {step: row["calls"] for step, row in _rows(told).items()} == {
    "entities": "2",
    "relations": "at most 333,300",  # 100 entities: 4,950 pairs and 161,700 triplets
    "rephrasings": "8",
    "spa": "28",
    "strategies": "2",
    "active_reading": "at most 100",
    "focal": "12",
  }


@pytest.mark.parametrize(("limit", "told"), [(5000, "10,000"), (200_000, "333,300")])
def test_a_limit_of_texts_bounds_the_relations(priced, limit, told):
  priced["synthesis"]["relations"]["max_texts_per_document"] = limit
  rows = _rows(entigraph.preview(parse(entigraph.Config, priced)))
  assert rows["relations"]["calls"] == f"at most {told}"


def test_the_price_is_that_of_the_prompts_and_of_the_longest_completions(
  priced, run, server, tmp_path
):
  priced["synthesis"]["relations"]["max_texts_per_document"] = 1
  server.behave = lambda call: writer.behave(call, lambda call: False)
  rows = _rows(told := entigraph.preview(parse(entigraph.Config, priced)))
  run(priced, tmp_path / "run", writer.STAGES)
  prompts = {"entities": 0, "rephrasings": 0}
  for call in server.calls:
    step = {4096: "entities", 8192: "rephrasings"}.get(call.body["max_tokens"])
    if step:
      prompts[step] += rough_num_tokens("\n".join(m["content"] for m in call.body["messages"]))
  for step, number in prompts.items():
    assert rows[step]["prompt tokens"] == f"{number:,}"
  most = 8 * 8192
  assert rows["rephrasings"]["completion tokens"] == f"at most {most:,}"
  usd = (1000 * prompts["rephrasings"] + 2000 * most) / 1e6
  assert rows["rephrasings"]["USD"] == f"at most {usd:,.2f}"
  total = sum(float(row["USD"].removeprefix("at most ")) for row in rows.values())
  assert re.search(rf"at most {total:.1f}\d USD .*no cap: set generator\.endpoint\.max_usd", told)


def test_a_cap_in_dollars_bounds_the_price(priced):
  priced["generator"]["endpoint"]["max_usd"] = 0.5
  told = entigraph.preview(parse(entigraph.Config, priced))
  assert {row["USD"] for row in _rows(told).values()} == {"at most 0.50"}
  assert "at most 0.50 USD without repeated attempts; hard cap 0.50 USD" in told


def test_recorded_texts_are_counted_and_cost_nothing(values):
  told = entigraph.preview(parse(entigraph.Config, values))
  found = {step: row["recorded"] for step, row in _rows(told).items()}
  assert found == {"entities": "2", "relations": "5", "rephrasings": "8"}
  assert "USD" not in told and "tokens" not in told


def test_a_run_without_synthetic_text_says_so(changed, values):
  page = changed(arms={"raw": values["arms"]["raw"]})
  assert "generator recorded: no step" in entigraph.preview(parse(entigraph.Config, page))


def test_the_bar_shows_dollars_spent_and_in_all(priced, run, server, tmp_path):
  server.behave = lambda call: writer.behave(call, lambda call: False)
  stream = io.StringIO()
  progress = Progress(every_seconds=0.0, stream=stream)
  run(priced, tmp_path / "run", writer.STAGES, progress=progress)
  lines = [line for line in stream.getvalue().splitlines() if line.startswith("rephrasings")]
  # A call costs 0.02: 10 tokens at 1,000 and 5 at 2,000 dollars per million.
  assert re.match(r"rephrasings  1/8 texts  12%  .*USD 0\.02  USD in all 0\.16 ", lines[0])
  assert re.match(r"rephrasings  8/8 texts  100%  .*USD 0\.16  USD in all 0\.16 ", lines[-1])
  assert artifacts.open_artifact(tmp_path / "run" / "rephrasings").summary["usd"] == 0.16


def test_a_plan_without_the_source_files_says_what_is_missing(changed):
  page = changed(sources__documents__folder="elsewhere/niche")
  told = entigraph.preview(parse(entigraph.Config, page))
  assert "calls are not counted" in told
  assert "elsewhere/niche" in told
