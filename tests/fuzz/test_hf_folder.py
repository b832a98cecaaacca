"""A few seconds of the fuzzer of Hugging Face folders."""

from tests.fuzz import harness, hf_folder


def test_a_damaged_folder_loads_or_is_named():
  with hf_folder.opened() as try_seed:
    tried, failed = harness.fuzz(try_seed, first_seed=0, seconds=5.0)
  assert tried > 0
  assert failed == []
