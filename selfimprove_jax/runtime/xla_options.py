"""XLA compiler options per backend and processor, passed to each compilation.

An unknown option in `XLA_FLAGS` aborts the process when it starts. Here each option is tried on a
program of one addition, and those that this version of XLA does not know are dropped and logged.
"""

import functools
import logging
import pathlib

import jax
import jax.numpy as jnp

_logger = logging.getLogger(__name__)

OPTIONS: dict[str, dict[str, str | int | bool]] = {
  "cpu": {},
  # In one try on an Intel Xeon, training was 4 to 9% faster than with 256 bits, XLA's choice.
  "cpu_avx512": {"xla_cpu_prefer_vector_width": 512},
  "gpu": {
    # Overlap communication with computation; combine FSDP's gathers and scatters into a few.
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
  """Returns the `OPTIONS` that this version of XLA knows, for `jax.jit(compiler_options=...)`.

  Args:
    platform: `Device.platform`, or `cuda` or `rocm` for `gpu`. Platforms without a table have none.
  """
  name = "gpu" if platform in ("cuda", "rocm") else platform
  if name != jax.default_backend():
    # An ahead-of-time compilation for another platform: its compiler cannot be probed here.
    return {}
  options = dict(OPTIONS.get(name, {}))
  if name == "cpu" and _has_avx512():
    options |= OPTIONS["cpu_avx512"]
  known = {}
  for option, value in options.items():
    try:
      _probe(option, value)
    except jax.errors.JaxRuntimeError as error:
      _logger.warning("XLA option %s is dropped: %s", option, str(error).splitlines()[0])
    else:
      known[option] = value
  return known


def _has_avx512() -> bool:
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  return cpuinfo.exists() and "avx512f" in cpuinfo.read_text()


def _probe(option: str, value: str | int | bool) -> None:
  jax.jit(lambda x: x + 1, compiler_options={option: value}).lower(jnp.int32(0)).compile()
