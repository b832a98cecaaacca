"""Jobs of one process; training/test_multiprocess.py has jobs of several."""

import pytest

from selfimprove_jax.runtime import distributed

_SECONDS = dict(connect_seconds=1, heartbeat_seconds=10, hang_seconds=1)


def test_a_process_by_itself_is_the_main_one_and_waits_for_nobody():
  assert distributed.is_main()
  distributed.barrier("alone")
  with distributed.main_first("alone"):
    assert distributed.from_main(lambda: {"a": [1]}) == {"a": [1]}
  with distributed.watched("alone") as beat:
    beat()


def test_a_part_of_what_a_job_needs_is_refused():
  with pytest.raises(ValueError, match=r"num_processes=2 and process_id=None must be given tog"):
    distributed.initialize(coordinator="a:1", num_processes=2, process_id=None, **_SECONDS)
