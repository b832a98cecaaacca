"""A few seconds of the fuzzer of corpora."""

from tests.fuzz import harness, jsonl


def test_a_damaged_corpus_is_read_around_the_damage_or_named():
  with jsonl.opened() as try_seed:
    tried, failed = harness.fuzz(try_seed, first_seed=0, seconds=5.0)
  assert tried > 100
  assert failed == []
