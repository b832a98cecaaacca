"""A few seconds of the fuzzer of endpoint replies."""

from tests.fuzz import endpoint_replies, harness


def test_a_damaged_response_is_a_reply_or_its_error():
  with endpoint_replies.opened() as try_seed:
    tried, failed = harness.fuzz(try_seed, first_seed=0, seconds=5.0)
  assert tried > 5
  assert failed == []
