"""The counts of `tools/count_code.py` on a package of a few lines."""

import pathlib
import subprocess
import sys

import pytest

_TOOL = pathlib.Path(__file__).parents[2] / "tools" / "count_code.py"


@pytest.fixture
def package(tmp_path):
  """A package with 10 lines: one comment line, two functions, of which one has a return type."""
  (tmp_path / "part").mkdir()
  (tmp_path / "part" / "a.py").write_text(
    '"""A module."""\n\n\n# A reason.\ndef f(x):  # no comment line\n  return x\n'
  )
  (tmp_path / "b.py").write_text("def g() -> int:\n  # is\n  text = '# none'\n  return len(text)\n")
  return tmp_path


def _count(*arguments):
  command = [sys.executable, _TOOL, *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True)


def test_lines_comments_and_return_types_are_counted(package):
  rows = [line.split() for line in _count("--root", package).stdout.splitlines()]
  assert ["part", "1", "6", "16.7%", "1", "100.0%", "2"] in rows
  assert ["together", "2", "10", "20.0%", "2", "50.0%", "4"] in rows


def test_a_reading_path_is_summed_and_an_unknown_file_refused(package):
  rows = [line.split() for line in _count("--root", package, "--path", "b.py").stdout.splitlines()]
  assert [row[:3] for row in rows[1:]] == [["b.py", "1", "4"], ["together", "1", "4"]]
  failed = _count("--root", package, "--path", "c.py")
  assert failed.returncode == 2 and "has no file c.py" in failed.stderr


def test_long_functions_are_named(package):
  (package / "long.py").write_text("def f():\n" + "  pass\n" * 80)
  assert "long.py:1 f has more than 80 lines" in _count("--root", package).stdout
