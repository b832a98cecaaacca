"""tools/compare_runs.py on two small folders."""

import json
import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "compare_runs.py"
MANIFEST = {
  "shards": {"rows": {"records": 1}},
  "summary": {"model": {"unrolled": False}, "step": 9},
}


@pytest.fixture
def runs(tmp_path):
  for name in ("a", "b"):
    for path, text in (
      ("config.json", "{}"),
      ("tokens/config.json", "{}"),
      ("tokens/manifest.json", json.dumps(MANIFEST)),
      ("tokens/rows", "1"),
      ("export/model/config.json", "{}"),
      ("timings.jsonl", name),
      ("seed/checkpoints/1/data", name),
    ):
      file = tmp_path / name / path
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(text)
  return tmp_path / "a", tmp_path / "b"


def compare(*arguments):
  return subprocess.run(
    [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, check=False
  )


def test_runs_that_differ_only_in_times_and_checkpoint_files_are_the_same(runs):
  found = compare(*runs)
  assert (found.returncode, found.stdout) == (0, "the same 5 files\n")


def test_a_changed_and_a_missing_file_are_named(runs):
  (runs[1] / "tokens" / "rows").write_text("2")
  (runs[0] / "tokens" / "manifest.json").unlink()
  for options in ([], ["--ignore_configs"]):
    found = compare(*runs, *options)
    assert found.returncode == 1
    assert "data that differ: 2" in found.stdout
    assert "differs: tokens/rows" in found.stdout
    assert f"only in {runs[1]}: tokens/manifest.json" in found.stdout


def test_configs_that_differ_come_last_and_can_be_ignored(runs):
  (runs[1] / "config.json").write_text('{"seed": 0}')
  (runs[1] / "tokens" / "config.json").write_text('{"seed": 0}')
  (runs[1] / "tokens" / "manifest.json").write_text(
    json.dumps(MANIFEST | {"summary": {"model": {"attention": "cpu"}, "step": 9}})
  )
  found = compare(*runs)
  assert found.returncode == 1
  assert found.stdout.splitlines() == [
    "configs that differ: 3",
    "  differs: config.json",
    "  differs: tokens/config.json",
    "  differs: tokens/manifest.json (summary.model.attention: None -> 'cpu'; "
    "summary.model.unrolled: False -> None)",
    "the same 2 files of data",
  ]
  assert compare(*runs, "--ignore_configs").returncode == 0


def test_a_manifest_with_other_numbers_and_an_exported_config_are_data(runs):
  (runs[1] / "tokens" / "config.json").write_text('{"seed": 0}')
  (runs[1] / "export" / "model" / "config.json").write_text('{"vocab_size": 9}')
  (runs[1] / "tokens" / "manifest.json").write_text(
    json.dumps(MANIFEST | {"summary": {"model": {}, "step": 8}})
  )
  found = compare(*runs, "--ignore_configs")
  assert found.returncode == 1
  assert found.stdout.splitlines() == [
    "data that differ: 2",
    "  differs: export/model/config.json",
    "  differs: tokens/manifest.json (summary.step: 9 -> 8)",
    "configs that differ: 1",
    "  differs: tokens/config.json",
  ]


def test_a_folder_that_holds_no_run_is_refused(runs, tmp_path):
  found = compare(runs[0], tmp_path)
  assert found.returncode == 2
  assert "holds no run" in found.stderr
