"""Peak FLOP/s of devices: from data sheets, or measured on CPUs."""

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
# Substring of `Device.device_kind` in lower case -> key of `PEAK_FLOPS`; the first match counts.
_KINDS = (
  ("tpu v4", "v4"),
  ("tpu v5 lite", "v5e"),
  ("tpu v5e", "v5e"),
  ("tpu v5", "v5p"),
  ("tpu v6", "v6e"),
  *((name, name) for name in ("a100", "h100", "h200", "b200")),
)


def kind(device: Any) -> str | None:
  """Returns a device's key in `PEAK_FLOPS`, or None if it is not in the table."""
  found = device.device_kind.lower()
  return next((name for part, name in _KINDS if part in found), None)


def peak(devices: Sequence[Any], dtype: str) -> tuple[float, str] | None:
  """Returns the peak FLOP/s of all devices together, and a description of it; None if unknown.

  On CPUs it is the measured speed of a large matrix product. Data sheets give it for bfloat16 only.
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
  best = float("inf")
  for _ in range(5):
    began = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - began)
  return 2 * size**3 / best
