"""tools/bench_sampling.py on a tiny model."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
TOOL = pathlib.Path(__file__).parents[2] / "tools" / "bench_sampling.py"


@pytest.fixture(scope="module")
def output(compilation_cache):
  pytest.importorskip("transformers")
  command = [sys.executable, str(TOOL), "--models=tiny", "--batches=2", "--turns=2"]
  command += ["--prompt_tokens=8", "--new_tokens=4", "--rounds=2", "--caches=dynamic"]
  command += ["--threads=1", "--wait_seconds=0"]
  # The spinning threads of two libraries are slow next to other processes.
  environment = os.environ | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
  environment |= {"JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}
  environment |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
  found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
  return found.stdout.splitlines()


def test_the_last_line_holds_the_ratio_and_every_case(output):
  result = json.loads(output[-1])
  cases = {case["lengths"]: case for case in result["cases"]}
  assert set(cases) == {"fixed", "ragged"}
  assert cases["fixed"]["requests"] == 2 and cases["fixed"]["tokens"] == 2 * 4
  assert cases["ragged"]["requests"] == 2 * 2
  assert 4 * 1 <= cases["ragged"]["tokens"] <= 4 * 16
  for case in cases.values():
    ratio = case["ratio"]
    assert 0 < ratio["p10"] <= ratio["median"] <= ratio["p90"]
    assert min(case["tokens_per_second"]) > 0 and min(case["first_token_seconds"]) > 0
  assert result["least"] == min(case["ratio"]["median"] for case in cases.values())


def test_both_sides_give_the_same_greedy_tokens(output):
  """Also for ragged prompts, which the peer pads on the left."""
  for case in json.loads(output[-1])["cases"]:
    assert case["agreement"] == {"first": 1.0, "tokens": 1.0}


def test_a_step_reads_the_weights_and_the_filled_cache(output):
  (case,) = (c for c in json.loads(output[-1])["cases"] if c["lengths"] == "fixed")
  cached = 2 * 2 * 2 * 16 * (8 + 4 / 2)  # keys and values, layers, heads, width, positions
  assert case["step_bytes"] == 4 * (case["parameters"] + 2 * cached)
  assert case["floor"]["bound"] in ("reading", "computing")


def test_it_refuses_an_unknown_name():
  found = subprocess.run([sys.executable, str(TOOL), "--lengths=long"], capture_output=True)
  assert found.returncode == 2 and b"unknown lengths ['long']" in found.stderr
