"""The devices that a model is compiled for, and what their matrix products need."""

from typing import Any

import jax
import jax.numpy as jnp


def platform() -> str:
  """Returns "cpu", "gpu" or "tpu" for the mesh in scope, or for the default devices."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = jax.default_backend() if device is None else device.platform
  return "gpu" if name == "cuda" else name


def precision(*operands: Any) -> jax.lax.Precision | None:
  """Returns the precision of a product of arrays: float32 operands are multiplied as float32.

  By default XLA rounds float32 operands to 10 bits (TF32) on NVIDIA GPUs and to 7 (bfloat16) on
  TPUs; with that default on an H200, log-likelihoods under a random model of 30 layers were up to
  4 nats from PyTorch's (benchmarks/gpu.md).
  Where `jax_default_matmul_precision` is set, that holds. CPUs multiply float32 as it is.
  """
  if jax.config.jax_default_matmul_precision is not None or platform() == "cpu":
    return None
  return jax.lax.Precision.HIGHEST if jnp.result_type(*operands) == jnp.float32 else None
