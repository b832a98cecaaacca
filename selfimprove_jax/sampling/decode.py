"""Prefill and the decode loop: one `while_loop` over one documented state."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from selfimprove_jax.sampling import sampler

LogitsFn = Callable[
  [Int[Array, "B T"], Int[Array, "B T"], PyTree], tuple[Float[Array, "B T V"], PyTree]
]
"""(tokens, positions, cache) -> (logits, cache)."""


@flax.struct.dataclass
class DecodeState:
  """What the loop carries.

  Attributes:
    step: tokens drawn so far in every row that is not done.
    tokens_BM: what was drawn, padded; M is the most new tokens.
    last_B: the newest token of each row, not yet seen by the model.
    positions_B: where that token stands.
    done_B: rows that have drawn the end of sequence.
    cache: the model's.
  """

  step: Int[Array, ""]
  tokens_BM: Int[Array, "B M"]
  last_B: Int[Array, "B"]
  positions_B: Int[Array, "B"]
  done_B: Bool[Array, "B"]
  cache: PyTree


def sample(
  logits_fn: LogitsFn,
  cache: PyTree,
  prompts_BT: Int[Array, "B T"],
  lengths_B: Int[Array, "B"],
  keys_B: Key[Array, "B"],
  *,
  max_new_tokens: int,
  sampling: sampler.SamplingConfig,
  eos_id: int,
  pad_id: int,
) -> Int[Array, "B M"]:
  """Continues each prompt until the end of sequence or `max_new_tokens`.

  Token i of a row is drawn with its key folded with i, so a row's text does not depend on who
  shares its batch.

  Args:
    logits_fn: writes to the cache at the positions it is given, and attends to no later one.
    prompts_BT: padded on the right; what stands beyond a row's length is never attended to.
    lengths_B: at least 1.

  Returns:
    New tokens with the end of sequence, if drawn; `pad_id` after it.
  """
  B, T = prompts_BT.shape
  positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
  logits_BTV, cache = logits_fn(prompts_BT, positions_BT, cache)
  last_logits_BV = jnp.take_along_axis(logits_BTV, (lengths_B - 1)[:, None, None], axis=1)[:, 0]

  def draw(logits_BV, step):
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, step)
    return sampler.sample_tokens(logits_BV, keys, sampling)

  first_B = draw(last_logits_BV, 0)
  tokens_BM = jnp.full((B, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(first_B)
  state = DecodeState(
    jnp.int32(1), tokens_BM, first_B, lengths_B.astype(jnp.int32), first_B == eos_id, cache
  )

  def unfinished(s: DecodeState):
    return (s.step < max_new_tokens) & ~jnp.all(s.done_B)

  def step(s: DecodeState):
    logits_B1V, cache = logits_fn(s.last_B[:, None], s.positions_B[:, None], s.cache)
    drawn_B = jnp.where(s.done_B, pad_id, draw(logits_B1V[:, 0], s.step))
    return DecodeState(
      step=s.step + 1,
      tokens_BM=s.tokens_BM.at[:, s.step].set(drawn_B),
      last_B=drawn_B,
      positions_B=s.positions_B + 1,
      done_B=s.done_B | (drawn_B == eos_id),
      cache=cache,
    )

  return jax.lax.while_loop(unfinished, step, state).tokens_BM
