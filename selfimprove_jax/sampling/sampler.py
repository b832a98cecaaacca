"""Logits to tokens: every row with its own temperature, truncation, penalties and key."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

AnyArray = jax.Array | np.ndarray
"""On devices, or made on the host for them."""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How a token is drawn.

  Attributes:
    temperature: 0 takes the most likely token.
    top_k: only the k most likely tokens; 0 for all.
    top_p: only the most likely tokens that together reach this probability (the one that passes
      it included); 1 for all. Applied after `top_k`, at the given temperature.
    repetition_penalty: logits of tokens that stand in the prompt or were drawn are divided by it if
      positive, else multiplied (Keskar et al. 2019); 1 for none.
    presence_penalty: is taken off the logits of tokens that were drawn (OpenAI's).
    frequency_penalty: is taken off as often as a token was drawn (OpenAI's).
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise ValueError(f"{self}: temperature and top_k must be at least 0, top_p in (0, 1]")
    if not 0 < self.repetition_penalty < math.inf:
      raise ValueError(f"{self}: repetition_penalty must be above 0")
    if not (math.isfinite(self.presence_penalty) and math.isfinite(self.frequency_penalty)):
      raise ValueError(f"{self}: presence_penalty and frequency_penalty must be finite")

  @property
  def truncates(self) -> bool:
    return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

  @property
  def penalizes(self) -> bool:
    changes = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
    return any(changes)


@flax.struct.dataclass
class RowSampling:
  """`SamplingConfig` of each row of a batch."""

  temperature_B: Float[AnyArray, "B"]
  top_k_B: Int[AnyArray, "B"]
  top_p_B: Float[AnyArray, "B"]
  repetition_penalty_B: Float[AnyArray, "B"]
  presence_penalty_B: Float[AnyArray, "B"]
  frequency_penalty_B: Float[AnyArray, "B"]


def row_sampling(configs: Sequence[SamplingConfig]) -> RowSampling:
  columns = {
    f"{field.name}_B": np.array(
      [getattr(c, field.name) for c in configs], np.int32 if field.name == "top_k" else np.float32
    )
    for field in dataclasses.fields(SamplingConfig)
  }
  return RowSampling(**columns)


def penalize(
  logits_BV: Float[Array, "B V"],
  c: RowSampling,
  *,
  in_prompt_BV: Bool[Array, "B V"],
  counts_BV: Int[Array, "B V"],
) -> Float[Array, "B V"]:
  """Logits after the penalties.

  Args:
    in_prompt_BV: whether a token stands in the prompt.
    counts_BV: how often it was drawn.
  """
  drawn_BV = counts_BV > 0
  factor_B1 = c.repetition_penalty_B[:, None]
  repeated_BV = jnp.where(logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1)
  logits_BV = jnp.where(drawn_BV | in_prompt_BV, repeated_BV, logits_BV)
  logits_BV -= c.presence_penalty_B[:, None] * drawn_BV
  return logits_BV - c.frequency_penalty_B[:, None] * counts_BV


def truncate(logits_BV: Float[Array, "B V"], c: RowSampling) -> Float[Array, "B V"]:
  """Minus infinity where top-k and top-p cut off; `logits_BV` are at the temperature already.

  Without sorting: each threshold is found by halving the range of float32, in 32 passes.
  """
  ranks_BV = _ordered(logits_BV)

  def top_k_holds(thresholds_B):
    return jnp.sum(ranks_BV >= thresholds_B[:, None], axis=-1) >= c.top_k_B

  kth_B = _largest(top_k_holds, logits_BV.shape[0])
  logits_BV = jnp.where((c.top_k_B > 0)[:, None] & (ranks_BV < kth_B[:, None]), -jnp.inf, logits_BV)
  weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
  needed_B = c.top_p_B * jnp.sum(weights_BV, axis=-1)

  def top_p_holds(thresholds_B):
    return (
      jnp.sum(jnp.where(ranks_BV >= thresholds_B[:, None], weights_BV, 0.0), axis=-1) >= needed_B
    )

  lowest_B = _largest(top_p_holds, logits_BV.shape[0])
  is_cut_BV = (c.top_p_B < 1)[:, None] & (ranks_BV < lowest_B[:, None])
  return jnp.where(is_cut_BV, -jnp.inf, logits_BV)


def draw(
  logits_BV: Float[Array, "B V"], keys_B: Key[Array, "B"], c: RowSampling, *, truncates: bool
) -> Int[Array, "B"]:
  """One token a row; a row's token depends on its own logits, settings and key alone.

  Args:
    logits_BV: float32, after penalties.
    truncates: whether any row has a `top_k` or `top_p`.
  """
  is_greedy_B = c.temperature_B == 0
  # From the largest, so that a temperature near 0 makes no infinities that the softmax can't take.
  below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
  scaled_BV = below_BV / jnp.where(is_greedy_B, 1.0, c.temperature_B)[:, None]
  if truncates:
    scaled_BV = truncate(scaled_BV, c)
  drawn_B = _categorical(scaled_BV, keys_B)
  return jnp.where(is_greedy_B, _first_largest(logits_BV), drawn_B).astype(jnp.int32)


def _first_largest(logits_BV):
  """As argmax, in two passes that vectorize: XLA's on CPUs does not."""
  largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  place_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
  return jnp.min(jnp.where(logits_BV == largest_B1, place_V[None], place_V[-1]), axis=-1)


def _categorical(logits_BV, keys_B):
  """Draws a block of the vocabulary by its weight, then a token of the block.

  With two uniform numbers a row; one Gumbel number for each token of the vocabulary would take as
  long as the model's step, for small models on CPU.
  """
  B, V = logits_BV.shape
  size = 1 << (max(V - 1, 1).bit_length() // 2)
  padded_BV = jnp.pad(logits_BV, ((0, 0), (0, -V % size)), constant_values=-jnp.inf)
  weights_BV = jnp.exp(padded_BV - jnp.max(padded_BV, axis=-1, keepdims=True))
  weights_BCS = weights_BV.reshape(B, -1, size)
  uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
  blocks_B = _pick(jnp.sum(weights_BCS, axis=-1), uniform_B2[:, 0])
  of_block_BS = jnp.take_along_axis(weights_BCS, blocks_B[:, None, None], axis=1)[:, 0]
  return blocks_B * size + _pick(of_block_BS, uniform_B2[:, 1])


def _pick(weights_BN, uniform_B):
  """An index of each row, with probability proportional to its weight; never one of weight 0."""
  sums_BN = jnp.cumsum(weights_BN, axis=-1)
  total_B1 = sums_BN[:, -1:]
  index_B = jnp.sum(sums_BN <= uniform_B[:, None] * total_B1, axis=-1)
  # By rounding the product may be the total itself: then the last that has a weight.
  return jnp.minimum(index_B, jnp.argmax(sums_BN >= total_B1, axis=-1))


def _ordered(x):
  """int32 numbers in the order of float32 ones."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _largest(holds: Callable[[Int[Array, "B"]], Bool[Array, "B"]], num_rows: int):
  """The largest int32 of each row that holds, where all below it do too and the least does."""
  bounds = jnp.iinfo(jnp.int32)

  def halve(_, low_high):
    low_B, high_B = low_high  # `low_B` holds, what is above `high_B` does not
    middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)  # their mean, rounded up, in 32 bits
    is_held_B = holds(middle_B)
    return jnp.where(is_held_B, middle_B, low_B), jnp.where(is_held_B, high_B, middle_B - 1)

  low_high = jnp.full(num_rows, bounds.min), jnp.full(num_rows, bounds.max)
  return jax.lax.fori_loop(0, 32, halve, low_high)[0]
