"""The engine's two programs: admit prompts to slots, and draw tokens in all slots.

A slot is a row of the batch and of the cache. Axis letters here: B slots, P prompts of one prefill,
T their length, R admissions, N steps of one call, E stop tokens.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from selfimprove_jax.models.llama import Cache
from selfimprove_jax.sampling import sampler
from selfimprove_jax.sampling.sampler import AnyArray, RowSampling

ModelFn = Callable[[Int[Array, "B T"], Int[Array, "B T"], Cache], tuple[Array, Cache]]
"""(tokens, positions, cache) -> (logits, cache)."""


@flax.struct.dataclass
class Rows:
  """What each slot needs beside the cache, one entry a slot; also how slots are admitted.

  Attributes:
    last_B: the newest token of each row, not yet seen by the model.
    positions_B: where that token stands.
    steps_B: tokens drawn.
    limits_B: tokens that may be drawn.
    is_done_B: nothing more is drawn: a stop token or the limit was reached, or the slot is free.
    is_failed_B: the model's logits were no numbers.
    keys_B: token i of a row is drawn with its key folded with i, so a row's tokens do not depend on
      who shares its batch. None in rows that the host makes: the devices add them.
    stop_ids_BE: tokens that end a row, -1 for none.
    allowed_from_BE: the step from which that token may be drawn.
    sampling: how tokens are drawn.
  """

  last_B: Int[AnyArray, "B"]
  positions_B: Int[AnyArray, "B"]
  steps_B: Int[AnyArray, "B"]
  limits_B: Int[AnyArray, "B"]
  is_done_B: Bool[AnyArray, "B"]
  is_failed_B: Bool[AnyArray, "B"]
  keys_B: Key[Array, "B"] | None
  stop_ids_BE: Int[AnyArray, "B E"]
  allowed_from_BE: Int[AnyArray, "B E"]
  sampling: RowSampling


@dataclasses.dataclass(frozen=True)
class Features:
  """What some row of the batch asks for; each costs time, so each has a program of its own."""

  truncates: bool = False
  bans: bool = False
  penalizes: bool = False
  is_masked: bool = False
  num_logprobs: int | None = None


@flax.struct.dataclass
class Drawn:
  """What a call of `decode` drew; of row b the first `num_B[b]` steps count.

  `top_*` are the `num_logprobs` most likely tokens, before temperature and truncation.
  """

  num_B: Int[AnyArray, "B"]
  is_failed_B: Bool[AnyArray, "B"]
  tokens_NB: Int[AnyArray, "N B"]
  logprobs_NB: Float[AnyArray, "N B"] | None
  top_ids_NBk: Int[AnyArray, "N B k"] | None
  top_logprobs_NBk: Float[AnyArray, "N B k"] | None


@flax.struct.dataclass
class Extras:
  """Arrays over the vocabulary, for those features that need them.

  Attributes:
    in_prompt_BV, counts_BV: of `sampler.penalize`.
    masks_BW: bit `v % 32` of word `v // 32` says whether token v may be drawn; good for one step.
  """

  in_prompt_BV: Bool[AnyArray, "B V"] | None = None
  counts_BV: Int[AnyArray, "B V"] | None = None
  masks_BW: UInt32[AnyArray, "B W"] | None = None


def record_keys(words_R4: UInt32[Array, "R 4"]) -> Key[Array, "R"]:
  """The key of (seed, two halves of the record's number, sample)."""

  def key(words_4):
    made = jax.random.key(words_4[0])
    for i in range(1, 4):
      made = jax.random.fold_in(made, words_4[i])
    return made

  return jax.vmap(key)(words_R4)


def admit(
  model_fn: ModelFn,
  rows: Rows,
  cache: Cache,
  new_rows: Rows,
  slots_R: Int[Array, "R"],
  *,
  prompts_PT: Int[Array, "P T"] | None,
  empty_cache: Cache | None,
  sources_R: Int[Array, "R"] | None,
) -> tuple[Rows, Cache]:
  """Puts prompts into slots: all of each but its last token, which is `new_rows.last_B`.

  Args:
    slots_R: where each goes; one beyond the last slot is dropped.
    prompts_PT: padded on the right: what is written for the padding is overwritten before it is
      attended to. None where every prompt is one token.
    empty_cache: of P rows and length T.
    sources_R: which of the prompts each slot gets; several may get one.
  """

  def put(old, new):
    return old.at[slots_R].set(new, mode="drop")

  rows = jax.tree.map(put, rows, new_rows)
  if prompts_PT is None:
    return rows, cache
  P, T = prompts_PT.shape
  positions_PT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (P, T))
  _, filled = model_fn(prompts_PT, positions_PT, empty_cache)
  length = min(T, cache[0].k_BKSH.shape[2])

  def insert(old_BKSH, new_PKTH):
    new_RKTH = new_PKTH[sources_R, :, :length]
    return old_BKSH.at[slots_R, :, :length].set(new_RKTH, mode="drop")

  return rows, jax.tree.map(insert, cache, filled)


def decode(
  model_fn: ModelFn,
  rows: Rows,
  cache: Cache,
  extras: Extras,
  num_steps: Int[Array, ""],
  *,
  max_steps: int,
  features: Features,
) -> tuple[Rows, Cache, Drawn]:
  """Draws up to `num_steps` tokens in every row that is not done; ends when all are.

  Args:
    num_steps: at most `max_steps`; 1 if `features.is_masked`.
  """
  B = rows.last_B.shape[0]
  k = features.num_logprobs

  def outputs(dtype, *shape):
    return jnp.zeros((max_steps, B, *shape), dtype)

  drawn = Drawn(
    num_B=jnp.zeros(B, jnp.int32),
    is_failed_B=rows.is_failed_B,
    tokens_NB=outputs(jnp.int32),
    logprobs_NB=None if k is None else outputs(jnp.float32),
    top_ids_NBk=None if not k else outputs(jnp.int32, k),
    top_logprobs_NBk=None if not k else outputs(jnp.float32, k),
  )

  def unfinished(carry):
    step, rows, *_ = carry
    return (step < num_steps) & ~jnp.all(rows.is_done_B)

  def body(carry):
    step, rows, cache, counts_BV, drawn = carry
    logits_B1V, cache = model_fn(rows.last_B[:, None], rows.positions_B[:, None], cache)
    logits_BV = logits_B1V[:, 0].astype(jnp.float32)
    # As they came: what is masked below is minus infinity, which is no failure.
    is_failed_B = jnp.any(jnp.isnan(logits_BV) | (logits_BV == jnp.inf), axis=-1)
    adjusted_BV = _adjust(logits_BV, rows, extras, counts_BV, features)
    is_failed_B |= jnp.max(adjusted_BV, axis=-1) == -jnp.inf
    keys_B = jax.vmap(jax.random.fold_in)(rows.keys_B, rows.steps_B)
    tokens_B = sampler.draw(adjusted_BV, keys_B, rows.sampling, truncates=features.truncates)
    drawn = _record(drawn, step, logits_BV, tokens_B, k)
    if counts_BV is not None:
      counts_BV = counts_BV.at[jnp.arange(B), tokens_B].add(1)
    rows = _advance(rows, tokens_B, is_failed_B)
    return step + 1, rows, cache, counts_BV, drawn

  carry = (jnp.int32(0), rows, cache, extras.counts_BV, drawn)
  _, after, cache, _, drawn = jax.lax.while_loop(unfinished, body, carry)
  num_B = after.steps_B - rows.steps_B
  return after, cache, drawn.replace(num_B=num_B, is_failed_B=after.is_failed_B)


def _adjust(logits_BV, rows, extras, counts_BV, features):
  if features.penalizes:
    logits_BV = sampler.penalize(
      logits_BV, rows.sampling, in_prompt_BV=extras.in_prompt_BV, counts_BV=counts_BV
    )
  if features.bans:
    is_banned_BE = rows.steps_B[:, None] < rows.allowed_from_BE
    banned_BE = jnp.where(is_banned_BE, rows.stop_ids_BE, -1)
    vocabulary_1V = jnp.arange(logits_BV.shape[1])[None]
    for e in range(banned_BE.shape[1]):
      logits_BV = jnp.where(vocabulary_1V == banned_BE[:, e, None], -jnp.inf, logits_BV)
  if features.is_masked:
    token_V = jnp.arange(logits_BV.shape[1])
    bits_BV = extras.masks_BW[:, token_V // 32] >> (token_V % 32).astype(jnp.uint32)[None]
    logits_BV = jnp.where((bits_BV & 1) == 1, logits_BV, -jnp.inf)
  return logits_BV


def _record(drawn, step, logits_BV, tokens_B, num_logprobs):
  drawn = drawn.replace(tokens_NB=drawn.tokens_NB.at[step].set(tokens_B))
  if num_logprobs is None:
    return drawn
  logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
  logprobs_B = jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]
  drawn = drawn.replace(logprobs_NB=drawn.logprobs_NB.at[step].set(logprobs_B))
  if not num_logprobs:
    return drawn
  top_Bk, ids_Bk = jax.lax.top_k(logprobs_BV, num_logprobs)
  return drawn.replace(
    top_ids_NBk=drawn.top_ids_NBk.at[step].set(ids_Bk.astype(jnp.int32)),
    top_logprobs_NBk=drawn.top_logprobs_NBk.at[step].set(top_Bk),
  )


def _advance(rows, tokens_B, is_failed_B):
  was_active_B = ~rows.is_done_B
  is_failed_B = was_active_B & is_failed_B
  draws_B = was_active_B & ~is_failed_B
  steps_B = rows.steps_B + draws_B
  is_stop_B = jnp.any(tokens_B[:, None] == rows.stop_ids_BE, axis=-1)
  ends_B = is_failed_B | (draws_B & (is_stop_B | (steps_B >= rows.limits_B)))
  goes_on_B = draws_B & ~ends_B
  return rows.replace(
    last_B=jnp.where(goes_on_B, tokens_B, rows.last_B),
    positions_B=rows.positions_B + goes_on_B,
    steps_B=steps_B,
    is_done_B=rows.is_done_B | ends_B,
    is_failed_B=rows.is_failed_B | is_failed_B,
  )
