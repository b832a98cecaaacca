"""A synthesis that is killed and continued makes no recorded call twice; its bytes are equal."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_killed_synthesis_continues_at_the_call(values, data_files, tmp_path, subprocess_options):
  page, whole, killed = (tmp_path / name for name in ("page.json", "whole", "killed"))
  page.write_text(json.dumps(values))
  process = subprocess.run(
    [sys.executable, "-m", "tests.pipelines.entigraph.kill_at_calls", page, whole, killed],
    capture_output=True,
    **subprocess_options,
  )
  assert process.returncode == 0, process.stdout + process.stderr
  told = json.loads(process.stdout)
  kinds = {point.split(":")[0] for point in told["points"]}
  assert kinds == {"before", "within", "after"}
  assert {"before:relations/00000-of-00002.jsonl", "after:relations/00000-of-00002.jsonl"} <= set(
    told["points"]
  )
  assert len(told["points"]) > 20
  assert told["repeated"] == []
  expected, found = data_files(whole), data_files(killed)
  assert found.keys() == expected.keys()
  assert [name for name in found if found[name] != expected[name]] == []
  failed = [name for name, content in expected.items() if b'"failure"' in content]
  assert failed, "some calls must fail, so that their units are asked again"
