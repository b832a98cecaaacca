"""A few seconds of the fuzzer of GGUF files."""

import pytest

pytest.importorskip("gguf", reason="the extra gguf is not installed")
from tests.fuzz import gguf, harness


def test_a_damaged_file_loads_or_is_named():
  with gguf.opened() as try_seed:
    tried, failed = harness.fuzz(try_seed, first_seed=0, seconds=5.0)
  assert tried > 0
  assert failed == []
