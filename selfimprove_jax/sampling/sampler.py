"""Logits to tokens: temperature, top-k, top-p, one key a row."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How a token is drawn.

  Attributes:
    temperature: 0 takes the most likely token.
    top_k: only the k most likely tokens; 0 for all.
    top_p: only the most likely tokens that together reach this probability (the one that passes
      it included); 1 for all. Applied after `top_k`, at the given temperature.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(f"{self}: temperature and top_k must be at least 0, top_p in (0, 1]")


def truncate(logits_BV: Float[Array, "B V"], c: SamplingConfig) -> Float[Array, "B V"]:
  """Logits at the temperature, minus infinity where top-k and top-p cut off."""
  logits_BV = logits_BV.astype(jnp.float32) / c.temperature
  if c.top_k and c.top_k < logits_BV.shape[-1]:
    kth_B1 = jax.lax.top_k(logits_BV, c.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  if c.top_p < 1:
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    # The least likely token that stays: the last whose predecessors do not reach top_p.
    lowest_B1 = jnp.min(jnp.where(before_BV < c.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
  return logits_BV


def sample_tokens(
  logits_BV: Float[Array, "B V"], keys_B: Key[Array, "B"], c: SamplingConfig
) -> Int[Array, "B"]:
  """One token a row; a row's token depends on its own logits and key alone."""
  if c.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  return jax.vmap(jax.random.categorical)(keys_B, truncate(logits_BV, c)).astype(jnp.int32)
