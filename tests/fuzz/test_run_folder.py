"""A few seconds of the fuzzer of run folders."""

from tests.fuzz import harness, run_folder


def test_a_damaged_run_is_made_again_or_names_the_file():
  with run_folder.opened() as try_seed:
    tried, failed = harness.fuzz(try_seed, first_seed=0, seconds=5.0)
  assert tried > 0
  assert failed == []
