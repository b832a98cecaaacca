"""XLA's options for each backend, asked for one compilation at a time.

In `XLA_FLAGS` an option that a version of XLA does not know ends the process at its start; here
each is tried on a program of one addition, and one that is unknown is left out, with a log line.
"""

import functools
import logging

import jax
import jax.numpy as jnp

_logger = logging.getLogger(__name__)

OPTIONS: dict[str, dict[str, str | int | bool]] = {
  "cpu": {},
  "gpu": {
    # Communication beside computation; FSDP's gathers and scatters in few large pieces.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_while_loop_double_buffering": True,
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 1 << 30,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 1 << 30,
    "xla_gpu_all_reduce_combine_threshold_bytes": 1 << 30,
  },
  "tpu": {
    "xla_tpu_enable_latency_hiding_scheduler": True,
    "xla_tpu_scoped_vmem_limit_kib": 98304,
  },
}


@functools.cache
def for_platform(platform: str) -> dict[str, str | int | bool]:
  """The options of `OPTIONS` that this version of XLA knows, for `jax.jit(compiler_options=...)`.

  Args:
    platform: as a device names its own; `cuda` and `rocm` are `gpu`. Others have none.
  """
  name = "gpu" if platform in ("cuda", "rocm") else platform
  if name != jax.default_backend():
    # Compiled for a machine that is not this one: nothing here can say what its XLA knows.
    return {}
  known = {}
  for option, value in OPTIONS.get(name, {}).items():
    try:
      _probe(option, value)
    except jax.errors.JaxRuntimeError as error:
      _logger.warning("XLA option %s is left out: %s", option, str(error).splitlines()[0])
    else:
      known[option] = value
  return known


def _probe(option: str, value: str | int | bool) -> None:
  jax.jit(lambda x: x + 1, compiler_options={option: value}).lower(jnp.int32(0)).compile()
