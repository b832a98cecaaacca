"""`--retry_failed`: failed calls alone are made again, and what was made from their records."""

import json
import re

import pytest

from selfimprove_jax.pipelines import entigraph
from selfimprove_jax.runs import artifacts
from tests.pipelines.entigraph import writer

_TO_ROWS = [*writer.STAGES, "initial", "tokenizer", "corpora"]


@pytest.fixture
def page(values, server, tmp_path):
  return writer.page(values, server.url, str(tmp_path / "calls.sqlite"))


def _records(folder, stage):
  return [
    record
    for path in sorted((folder / stage).glob("[0-9]*.jsonl"))
    for record in map(json.loads, path.read_text().splitlines())
  ]


def test_failed_units_alone_are_asked_again_by_other_samples(run, page, server, tmp_path, capsys):
  server.behave = lambda call: writer.behave(call, lambda call: _asks_about(call, "Ada Orn"))
  run(page, tmp_path / "run", _TO_ROWS)
  before = {r["id"]: r for r in _records(tmp_path / "run", "relations")}
  failed = {id_ for id_, record in before.items() if "failure" in record}
  assert 0 < len(failed) < len(before)
  seeds = {call.body["seed"] for call in server.calls}
  untouched = (tmp_path / "run" / "corpora/rephrase/rows/manifest.json").stat()
  server.calls.clear()
  server.behave = lambda call: writer.behave(call, lambda call: False)
  run(page, tmp_path / "run", _TO_ROWS, retry_failed=True)
  assert len(server.calls) == len(failed)
  assert all(_asks_about(call, "Ada Orn") for call in server.calls)
  assert not {call.body["seed"] for call in server.calls} & seeds
  after = {r["id"]: r for r in _records(tmp_path / "run", "relations")}
  assert not any("failure" in record for record in after.values())
  assert {id_ for id_ in after if after[id_] != before[id_]} == failed
  summary = artifacts.open_artifact(tmp_path / "run" / "relations").summary
  assert (summary["records"], summary["failed"]) == (len(before), 0)
  # What was made from the failures is made again, and nothing else.
  corpus = artifacts.open_artifact(tmp_path / "run" / "corpora/entigraph/documents").summary
  assert corpus["passages"]["train"] == 2 + len(before)
  now = (tmp_path / "run" / "corpora/rephrase/rows/manifest.json").stat()
  assert (now.st_ino, now.st_mtime_ns) == (untouched.st_ino, untouched.st_mtime_ns)
  printed = capsys.readouterr().out
  assert f"relations: {len(failed)} failures; it is opened again" in printed
  assert "corpora/entigraph/rows: reads a stage with failures" in printed


def _asks_about(call, name):
  """Whether the task of a call, which follows the document, names something."""
  return name in call.asked.split("\n----\n")[-1]


def test_texts_of_other_documents_are_kept_when_a_list_of_entities_had_failed(
  run, page, server, tmp_path
):
  def refuses(call):
    return "response_format" in call.body and writer.document(call) == "mill"

  server.behave = lambda call: writer.behave(call, refuses)
  run(page, tmp_path, writer.STAGES)
  assert [r["document"] for r in _records(tmp_path, "relations")] == ["moth"]
  server.calls.clear()
  server.behave = lambda call: writer.behave(call, lambda call: False)
  run(page, tmp_path, writer.STAGES, retry_failed=True)
  assert {writer.document(call) for call in server.calls} == {"mill"}
  assert len(server.calls) == 1 + 3 + 1  # the entities, pairs and a triplet
  assert [r["document"] for r in _records(tmp_path, "relations")] == ["mill"] * 4 + ["moth"]


def test_failures_of_an_unfinished_step_are_retried_too(run, page, server, tmp_path, closed_models):
  def behave(call):
    if call.number > 4:  # after two lists of entities and three of four texts
      return writer.say("", status=401)
    return writer.behave(call, lambda call: "response_format" not in call.body)

  server.behave = behave
  page["generator"]["endpoint"]["max_concurrent"] = 1
  page["synthesis"]["generation"]["max_attempts"] = 1
  with pytest.raises(RuntimeError, match="401"):
    run(page, tmp_path, writer.STAGES)
  closed_models()
  (log,) = (tmp_path / "relations").glob(".*.unfinished")
  assert b'"failure"' in log.read_bytes()
  server.behave = lambda call: writer.behave(call, lambda call: False)
  run(page, tmp_path, writer.STAGES, retry_failed=True)
  records = _records(tmp_path, "relations")
  assert len(records) == 5
  assert not any("failure" in record for record in records)


def test_units_that_fail_again_count_all_their_attempts(run, page, server, tmp_path):
  server.behave = lambda call: writer.behave(call, lambda call: _asks_about(call, "Ada Orn"))
  run(page, tmp_path, writer.STAGES)
  run(page, tmp_path, writer.STAGES, retry_failed=True)
  failures = [r["failure"] for r in _records(tmp_path, "relations") if "failure" in r]
  assert {failure["attempts"] for failure in failures} == {4}
  assert all(re.match("I'm sorry", failure["raw"]) for failure in failures)


def test_a_run_without_failures_is_left_as_it_is(run, page, server, tmp_path, capsys):
  server.behave = lambda call: writer.behave(call, lambda call: False)
  run(page, tmp_path, writer.STAGES)
  before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")}
  server.calls.clear()
  run(page, tmp_path, writer.STAGES, retry_failed=True)
  before.pop(tmp_path / "config.json")
  assert before == {path: path.stat().st_mtime_ns for path in before}
  assert server.calls == []
  assert "nothing has failed" in capsys.readouterr().out


def test_texts_that_are_replayed_are_not_retried(run, values, tmp_path):
  config = run(values, tmp_path, ["sources"])
  assert not any(stage.failures for stage in entigraph.stages(config))
