"""What devices can do at most: peaks by data sheet, or measured where there is none."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Dense bf16 peak, FLOP/s per chip, from the vendors' data sheets.
PEAK_FLOPS = {
  "v4": 275e12,
  "v5e": 197e12,
  "v5p": 459e12,
  "v6e": 918e12,
  "a100": 312e12,
  "h100": 989e12,
  "h200": 989e12,
  "b200": 2250e12,
}
# Parts of `Device.device_kind`, lower case.
_KINDS = (
  ("tpu v4", "v4"),
  ("tpu v5 lite", "v5e"),
  ("tpu v5e", "v5e"),
  ("tpu v5", "v5p"),
  ("tpu v6", "v6e"),
  *((name, name) for name in ("a100", "h100", "h200", "b200")),
)


def kind(device: Any) -> str | None:
  """The key of `PEAK_FLOPS` for a device; None for those that are not in the table."""
  found = device.device_kind.lower()
  return next((name for part, name in _KINDS if part in found), None)


def peak(devices: Sequence[Any], dtype: str) -> tuple[float, str] | None:
  """FLOP/s of all devices together at most, and what that is called; None where nobody knows.

  On CPUs it is the speed of a large matrix product here and now; a data sheet's peak is for
  bfloat16, and is not given for another dtype.
  """
  if devices[0].platform == "cpu":
    return _measured_matmul_flops(dtype), f"{dtype} matrix product measured on these CPUs"
  name = kind(devices[0])
  if name is None or dtype != "bfloat16":
    return None
  return PEAK_FLOPS[name] * len(devices), f"bf16 peak of {len(devices)} {name}"


@functools.cache
def _measured_matmul_flops(dtype: str) -> float:
  size = 1024
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
  product = jax.jit(lambda a: a @ a)
  product(x).block_until_ready()
  least = float("inf")
  for _ in range(5):
    began = time.perf_counter()
    product(x).block_until_ready()
    least = min(least, time.perf_counter() - began)
  return 2 * size**3 / least
