"""tools/compare_runs.py on two small folders."""

import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "compare_runs.py"


@pytest.fixture
def runs(tmp_path):
  for name in ("a", "b"):
    for path, text in (
      ("config.json", "{}"),
      ("tokens/manifest.json", "{}"),
      ("tokens/rows", "1"),
      ("timings.jsonl", name),
      ("seed/checkpoints/1/data", name),
    ):
      file = tmp_path / name / path
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(text)
  return tmp_path / "a", tmp_path / "b"


def compare(a, b):
  return subprocess.run(
    [sys.executable, str(TOOL), str(a), str(b)], capture_output=True, text=True, check=False
  )


def test_runs_that_differ_only_in_times_and_checkpoint_files_are_the_same(runs):
  found = compare(*runs)
  assert (found.returncode, found.stdout) == (0, "the same 3 files\n")


def test_a_changed_and_a_missing_file_are_named(runs):
  (runs[1] / "tokens" / "rows").write_text("2")
  (runs[0] / "tokens" / "manifest.json").unlink()
  found = compare(*runs)
  assert found.returncode == 1
  assert "differs: tokens/rows" in found.stdout
  assert f"only in {runs[1]}: tokens/manifest.json" in found.stdout


def test_a_folder_that_holds_no_run_is_refused(runs, tmp_path):
  found = compare(runs[0], tmp_path)
  assert found.returncode == 2
  assert "holds no run" in found.stderr
