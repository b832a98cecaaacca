"""tools/bench_data.py on a little text."""

import json
import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "bench_data.py"


@pytest.fixture(scope="module")
def output():
  command = [sys.executable, str(TOOL), "--packages", "json", "email", "--chars", "30000"]
  command += ["--vocab_size", "400", "--seq_lens", "32", "64", "--batch_rows", "4"]
  command += ["--wait_seconds=0", "--repeats", "2", "--seconds", "0.02"]
  return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_last_line_holds_the_ratio_and_every_case(output):
  result = json.loads(output[-1])
  low, high = result["ratio_spread"]
  assert 0 < low <= result["ratio"] <= high
  assert "rows of 64" in result["measured"]
  cases = {(case["case"], case["seq_len"]): case for case in result["cases"]}
  assert set(cases) == {(c, t) for c in ("pack", "floor", "load", "wait") for t in (32, 64)}
  assert cases["load", 64]["ratio"]["median"] == result["ratio"]
  for case in cases.values():
    spreads = [value for value in case.values() if isinstance(value, dict) and "median" in value]
    assert len(spreads) >= 2
    assert all(s["min"] <= s["median"] <= s["max"] for s in spreads)
  assert all(0 <= cases["wait", t]["ours"]["min"] <= 1 for t in (32, 64))
  slowest = min(cases["load", t]["ours"]["median"] for t in (32, 64))
  assert result["slowest"]["load"] == slowest


def test_the_table_says_whether_the_targets_are_met(output):
  result = json.loads(output[-1])
  for name, target in (("load", 5.0), ("pack", 1.0)):
    met = result["slowest"][name] >= target * 1e6
    (line,) = (line for line in output if line.startswith(f"{name}: "))
    assert line.endswith(f"target {target}: {'met' if met else 'MISSED'}")


def test_help_names_the_options():
  found = subprocess.run(
    [sys.executable, str(TOOL), "--help"], capture_output=True, text=True, check=True
  )
  assert "--seq_lens" in found.stdout and "--clock {wall,cpu}" in found.stdout
