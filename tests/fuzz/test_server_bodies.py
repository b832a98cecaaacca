"""A few seconds of the fuzzer of requests to the server."""

from tests.fuzz import harness, server_bodies


def test_a_damaged_request_harms_nobody():
  with server_bodies.opened() as try_seed:
    tried, failed = harness.fuzz(try_seed, first_seed=0, seconds=6.0)
  assert tried > 0  # few on a busy machine
  assert failed == []
