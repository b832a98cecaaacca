"""Logits to tokens; each row has its own temperature, truncation, penalties and random key."""

import dataclasses
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from selfimprove_jax.sampling.requests import SamplingConfig

AnyArray = jax.Array | np.ndarray
"""An array on devices, or on the host before it is transferred."""


@flax.struct.dataclass
class RowSampling:
  """The `SamplingConfig` of each row of a batch."""

  temperature_B: Float[AnyArray, "B"]
  top_k_B: Int[AnyArray, "B"]
  top_p_B: Float[AnyArray, "B"]
  repetition_penalty_B: Float[AnyArray, "B"]
  presence_penalty_B: Float[AnyArray, "B"]
  frequency_penalty_B: Float[AnyArray, "B"]


def row_sampling(configs: Sequence[SamplingConfig]) -> RowSampling:
  """Stacks the configs of the rows."""
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
  """Applies the repetition, presence and frequency penalties.

  Args:
    in_prompt_BV: whether the token is in the prompt.
    counts_BV: how often it was drawn.
  """
  drawn_BV = counts_BV > 0
  factor_B1 = c.repetition_penalty_B[:, None]
  # Dividing a negative logit would make its token more likely, so those are multiplied.
  repeated_BV = jnp.where(logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1)
  logits_BV = jnp.where(drawn_BV | in_prompt_BV, repeated_BV, logits_BV)
  logits_BV -= c.presence_penalty_B[:, None] * drawn_BV
  return logits_BV - c.frequency_penalty_B[:, None] * counts_BV


def truncate(logits_BV: Float[Array, "B V"], c: RowSampling) -> Float[Array, "B V"]:
  """Sets the logits that top-k and top-p cut off to minus infinity.

  Ties with the last kept token are kept too. No sort: the threshold of each row is found by
  bisection over the float32 values, in 32 passes, which is faster than sorting the vocabulary.

  Args:
    logits_BV: already divided by the temperature.
  """
  ranks_BV = _ordered(logits_BV)

  def top_k_holds(thresholds_B: jax.Array) -> jax.Array:
    return jnp.sum(ranks_BV >= thresholds_B[:, None], axis=-1) >= c.top_k_B

  kth_B = _largest(top_k_holds, logits_BV.shape[0])
  logits_BV = jnp.where((c.top_k_B > 0)[:, None] & (ranks_BV < kth_B[:, None]), -jnp.inf, logits_BV)
  # The weights of tokens that top-k cut are zero now, so top-p works on what is left.
  weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
  needed_B = c.top_p_B * jnp.sum(weights_BV, axis=-1)

  def top_p_holds(thresholds_B: jax.Array) -> jax.Array:
    return (
      jnp.sum(jnp.where(ranks_BV >= thresholds_B[:, None], weights_BV, 0.0), axis=-1) >= needed_B
    )

  lowest_B = _largest(top_p_holds, logits_BV.shape[0])
  is_cut_BV = (c.top_p_B < 1)[:, None] & (ranks_BV < lowest_B[:, None])
  return jnp.where(is_cut_BV, -jnp.inf, logits_BV)


def draw(
  logits_BV: Float[Array, "B V"], keys_B: Key[Array, "B"], c: RowSampling, *, truncates: bool
) -> Int[Array, "B"]:
  """Draws one token per row, from that row's logits, settings and key alone.

  Args:
    logits_BV: float32, after penalties.
    truncates: whether any row has a `top_k` or `top_p`.
  """
  is_greedy_B = c.temperature_B == 0
  # Subtract the maximum before dividing: a temperature near 0 would overflow to infinity.
  below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
  # Greedy rows are divided by 1 to keep them finite; what is drawn for them is not used.
  scaled_BV = below_BV / jnp.where(is_greedy_B, 1.0, c.temperature_B)[:, None]
  if truncates:
    scaled_BV = truncate(scaled_BV, c)
  drawn_B = _categorical(scaled_BV, keys_B)
  return jnp.where(is_greedy_B, argmax(logits_BV), drawn_B).astype(jnp.int32)


def argmax(logits_BV: Float[Array, "B V"]) -> Int[Array, "B"]:
  """Returns the index of each row's largest logit, the first of several.

  The platform that the program is lowered for chooses the implementation; the results are equal,
  NaN aside, which the caller tests for.
  """
  return jax.lax.platform_dependent(logits_BV, cpu=_argmax_cpu, default=_argmax)


def _argmax(logits_BV: jax.Array) -> jax.Array:
  return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _argmax_cpu(logits_BV: jax.Array) -> jax.Array:
  """Two passes that vectorize; XLA's argmax on CPUs is a scalar loop."""
  largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  index_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
  return jnp.min(jnp.where(logits_BV == largest_B1, index_V[None], index_V[-1]), axis=-1)


def _categorical(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
  """Draws a block of the vocabulary by its total weight, then a token within the block.

  This takes two uniform numbers per row. A Gumbel number for each token of the vocabulary would
  take as long as the model's step, for small models on CPU.
  """
  B, V = logits_BV.shape
  size = 1 << (max(V - 1, 1).bit_length() // 2)  # about sqrt(V): both draws scan as many weights
  padded_BV = jnp.pad(logits_BV, ((0, 0), (0, -V % size)), constant_values=-jnp.inf)
  weights_BV = jnp.exp(padded_BV - jnp.max(padded_BV, axis=-1, keepdims=True))
  weights_BCS = weights_BV.reshape(B, -1, size)
  uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
  blocks_B = _pick(jnp.sum(weights_BCS, axis=-1), uniform_B2[:, 0])
  block_BS = jnp.take_along_axis(weights_BCS, blocks_B[:, None, None], axis=1)[:, 0]
  return blocks_B * size + _pick(block_BS, uniform_B2[:, 1])


def _pick(weights_BN: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """Draws an index per row in proportion to its weight; never one of weight 0."""
  sums_BN = jnp.cumsum(weights_BN, axis=-1)
  total_B1 = sums_BN[:, -1:]
  # `<=`, not `<`: a uniform number of exactly 0 must not pick an index of weight 0.
  index_B = jnp.sum(sums_BN <= uniform_B[:, None] * total_B1, axis=-1)
  # The product may round up to the total itself; then take the last index that has a weight.
  return jnp.minimum(index_B, jnp.argmax(sums_BN >= total_B1, axis=-1))


def _ordered(x: jax.Array) -> jax.Array:
  """Maps float32 to int32 so that the order is kept."""
  # The bits of positive floats are ordered like ints; those of negative ones in reverse.
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _largest(
  holds: Callable[[Int[Array, "B"]], Bool[Array, "B"]], num_rows: int
) -> Int[Array, "B"]:
  """Bisects for the largest int32 of each row that holds.

  Args:
    holds: true for the least int32, and for all values below one for which it is true.
  """
  bounds = jnp.iinfo(jnp.int32)

  def halve(_: jax.Array, low_high: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    low_B, high_B = low_high  # invariant: `low_B` holds, values above `high_B` do not
    # The mean, rounded up, without the overflow of (low + high) / 2 in 32 bits.
    middle_B = (low_B | high_B) - ((low_B ^ high_B) >> 1)
    is_held_B = holds(middle_B)
    return jnp.where(is_held_B, middle_B, low_B), jnp.where(is_held_B, high_B, middle_B - 1)

  low_high = jnp.full(num_rows, bounds.min), jnp.full(num_rows, bounds.max)
  return jax.lax.fori_loop(0, 32, halve, low_high)[0]
