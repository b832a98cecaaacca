"""Rotary position embedding (Su et al. 2021), and Llama 3.1's stretch of it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3.1's stretched rotary frequencies, for contexts beyond the one pretrained with.

  Attributes:
    factor: slow frequencies are divided by it.
    low_freq_factor: wavelengths above `original_max_positions / low_freq_factor` are slow.
    high_freq_factor: wavelengths below `original_max_positions / high_freq_factor` stay; those
      between are interpolated.
    original_max_positions: context of the pretraining.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int

  def __post_init__(self):
    if not 0 < self.low_freq_factor < self.high_freq_factor:
      raise ValueError(
        f"rope_scaling has low_freq_factor={self.low_freq_factor} and "
        f"high_freq_factor={self.high_freq_factor}; the first must be the smaller, and positive"
      )


def rope_frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[np.ndarray, " h"]:
  """Radians a position for each pair of a head's coordinates."""
  frequencies_h = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
  if scaling is None:
    return frequencies_h.astype(np.float32)
  s = scaling
  turns_h = s.original_max_positions * frequencies_h / (2 * np.pi)  # over the pretraining's context
  keep_h = (turns_h - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
  keep_h = np.clip(keep_h, 0.0, 1.0)
  scaled_h = (1 - keep_h) * frequencies_h / s.factor + keep_h * frequencies_h
  return scaled_h.astype(np.float32)


def rope(
  x_BTNH: Float[Array, "B T N H"],
  positions_BT: Int[Array, "B T"],
  theta: float,
  scaling: RopeScaling | None = None,
) -> Float[Array, "B T N H"]:
  """Rotary position embedding in float32, Hugging Face's convention (first half with second)."""
  frequencies_h = jnp.asarray(rope_frequencies(x_BTNH.shape[-1], theta, scaling))
  angles_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_h[None, None, None]
  sin, cos = jnp.sin(angles_BT1h), jnp.cos(angles_BT1h)
  x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x_BTNH.dtype)
