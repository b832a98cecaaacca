"""Jobs of one process; training/test_multiprocess.py has jobs of several."""

import os
import subprocess
import sys

import portpicker
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


_JOB = """
import os, sys
import jax, jax.numpy as jnp
from selfimprove_jax.runtime import distributed

distributed.initialize(
  coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]),
  connect_seconds=60, heartbeat_seconds=60, hang_seconds=60,
)
mesh = jax.make_mesh((2,), ("x",))
x = jax.device_put(jnp.arange(2.0), jax.NamedSharding(mesh, jax.P("x")))
print("sum", jax.jit(jnp.sum)(x))
os.write(1, b"from a library")
"""


def test_a_job_on_cpus_prints_what_it_prints_and_nothing_of_gloo():
  port = portpicker.pick_unused_port()
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _JOB, f"localhost:{port}", str(index)],
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
    )
    for index in range(2)
  ]
  told = [process.communicate(timeout=120)[0] for process in processes]
  assert told == ["sum 1.0\nfrom a library"] * 2
