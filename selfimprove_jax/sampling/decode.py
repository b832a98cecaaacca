"""The engine's device programs: admit prompts to slots, and draw tokens in all slots.

A slot is a row of the batch and of the KV cache. Axis letters here: B slots, P prompts of one
prefill, T their length, R admitted requests, N steps of one call, E stop tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from selfimprove_jax.models.decode_layout import DecodeLlama
from selfimprove_jax.models.llama import Cache, LlamaConfig, init_cache
from selfimprove_jax.runtime import partitioning, xla_options
from selfimprove_jax.sampling import sampler
from selfimprove_jax.sampling.sampler import AnyArray, RowSampling

# Tokens drawn per slot before the host looks for ends and refills slots.
STEPS_PER_CALL = 16
# Prompts share a prefill up to this many tokens: one of fewer takes as long as reading the weights.
_PREFILL_TOKENS = 256
# A lone prompt is padded to this many tokens; on CPUs more padding costs more than small prefills.
_PADDED_PREFILL_TOKENS = {"cpu": 32}

ModelFn = Callable[[Int[Array, "B T"], Int[Array, "B T"], Cache], tuple[Array, Cache]]
"""(tokens, positions, cache) -> (logits, cache)."""


@flax.struct.dataclass
class Rows:
  """State of each slot besides its cache; also the form in which new requests are admitted.

  Attributes:
    last_B: newest token, which the model has not seen yet.
    positions_B: position of that token.
    steps_B: number of tokens drawn.
    limits_B: number of tokens that may be drawn.
    is_done_B: the slot is free, or its request drew a stop token or reached its limit.
    is_failed_B: the model's logits were NaN or infinite, or no token was allowed.
    keys_B: token i is drawn with the row's key folded with i, so that a row's tokens do not depend
      on the rest of the batch. None in rows made on the host: `admit` makes the keys.
    stop_ids_BE: tokens that end the row, padded with -1.
    allowed_from_BE: first step at which that stop token may be drawn.
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
  """Features that some row needs; static, because each costs time in every step for all rows."""

  truncates: bool = False
  bans: bool = False
  penalizes: bool = False
  is_masked: bool = False
  num_logprobs: int | None = None


@flax.struct.dataclass
class Drawn:
  """Result of a `decode` call; the first `num_B[b]` steps of row b are valid.

  `top_*` hold the `num_logprobs` most likely tokens, before temperature and truncation.
  """

  num_B: Int[AnyArray, "B"]
  is_failed_B: Bool[AnyArray, "B"]
  tokens_NB: Int[AnyArray, "N B"]
  logprobs_NB: Float[AnyArray, "N B"] | None
  top_ids_NBk: Int[AnyArray, "N B k"] | None
  top_logprobs_NBk: Float[AnyArray, "N B k"] | None


@flax.struct.dataclass
class Extras:
  """Arrays over the vocabulary, present if a feature needs them.

  Attributes:
    in_prompt_BV, counts_BV: arguments of `sampler.penalize`.
    masks_BW: bit `v % 32` of word `v // 32` is set if token v may be drawn. A grammar's mask is
      valid for one step only.
  """

  in_prompt_BV: Bool[AnyArray, "B V"] | None = None
  counts_BV: Int[AnyArray, "B V"] | None = None
  masks_BW: UInt32[AnyArray, "B W"] | None = None


def record_keys(words_R4: UInt32[Array, "R 4"]) -> Key[Array, "R"]:
  """Makes keys from (seed, high and low half of the record's number, sample)."""

  def key(words_4: jax.Array) -> jax.Array:
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
  prompt_cache: Cache | None,
  firsts_P: Int[Array, "P"] | None,
  sources_R: Int[Array, "R"] | None,
) -> tuple[Rows, Cache]:
  """Prefills prompts and writes them to slots.

  Args:
    new_rows: rows of the new requests; each prompt's last token is their `last_B`, not prefilled.
    slots_R: slot of each request; requests whose slot is out of range are dropped.
    prompts_PT: prompts without their last tokens, and without what is in the cache already, padded
      on the right; None if all are one token.
    prompt_cache: cache of P rows for the prefill: empty and of length T, or longer, with the keys
      and values of the prompts' beginnings.
    firsts_P: position of each prompt's first token in `prompts_PT`.
    sources_R: index of each request's prompt; several requests may share one.
  """

  # Padding of R has a slot that is out of range.
  def put(old: jax.Array, new: jax.Array) -> jax.Array:
    return old.at[slots_R].set(new, mode="drop")

  rows = jax.tree.map(put, rows, new_rows)
  if prompts_PT is None:
    return rows, cache
  T = prompts_PT.shape[1]
  positions_PT = firsts_P[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
  _, filled = model_fn(prompts_PT, positions_PT, prompt_cache)
  # A bucket may be longer than the cache, but the prompts in it are not: only padding is cut.
  length = min(filled[0].k_BKSH.shape[2], cache[0].k_BKSH.shape[2])

  # Padding and the slot's last request leave keys and values in the cache. They need no clearing:
  # the causal mask hides a position until decoding overwrites it.
  def insert(old_BKSH: jax.Array, new_PKTH: jax.Array) -> jax.Array:
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
  """Draws up to `num_steps` tokens in every row that is not done; stops early when all are done.

  Args:
    num_steps: at most `max_steps`; 1 if `features.is_masked`.
  """
  B = rows.last_B.shape[0]
  k = features.num_logprobs

  def outputs(dtype: Any, *shape: int) -> jax.Array:
    return jnp.zeros((max_steps, B, *shape), dtype)

  drawn = Drawn(
    num_B=jnp.zeros(B, jnp.int32),
    is_failed_B=rows.is_failed_B,
    tokens_NB=outputs(jnp.int32),
    logprobs_NB=None if k is None else outputs(jnp.float32),
    top_ids_NBk=None if not k else outputs(jnp.int32, k),
    top_logprobs_NBk=None if not k else outputs(jnp.float32, k),
  )

  def is_unfinished(carry: tuple) -> jax.Array:
    step, rows, *_ = carry
    return (step < num_steps) & ~jnp.all(rows.is_done_B)

  def body(carry: tuple) -> tuple:
    step, rows, cache, counts_BV, drawn = carry
    # Rows that are done run along: their token is written to the same position again and again.
    logits_B1V, cache = model_fn(rows.last_B[:, None], rows.positions_B[:, None], cache)
    logits_BV = logits_B1V[:, 0].astype(jnp.float32)
    # Tested before masking, which sets logits to minus infinity on purpose.
    is_failed_B = jnp.any(jnp.isnan(logits_BV) | (logits_BV == jnp.inf), axis=-1)
    adjusted_BV = _adjust(logits_BV, rows, extras, counts_BV, features)
    is_failed_B |= jnp.max(adjusted_BV, axis=-1) == -jnp.inf  # no token is allowed
    keys_B = jax.vmap(jax.random.fold_in)(rows.keys_B, rows.steps_B)
    tokens_B = sampler.draw(adjusted_BV, keys_B, rows.sampling, truncates=features.truncates)
    drawn = _record(drawn, step, logits_BV, tokens_B, k)
    if counts_BV is not None:
      counts_BV = counts_BV.at[jnp.arange(B), tokens_B].add(1)
    rows = _advance(rows, tokens_B, is_failed_B)
    return step + 1, rows, cache, counts_BV, drawn

  # A loop on the device: the host is asked once per call, not once per token.
  carry = (jnp.int32(0), rows, cache, extras.counts_BV, drawn)
  _, after, cache, _, drawn = jax.lax.while_loop(is_unfinished, body, carry)
  num_B = after.steps_B - rows.steps_B
  return after, cache, drawn.replace(num_B=num_B, is_failed_B=after.is_failed_B)


def _adjust(
  logits_BV: jax.Array,
  rows: Rows,
  extras: Extras,
  counts_BV: jax.Array | None,
  features: Features,
) -> jax.Array:
  """Applies penalties, bans of stop tokens, and grammar masks."""
  if features.penalizes:
    logits_BV = sampler.penalize(
      logits_BV, rows.sampling, in_prompt_BV=extras.in_prompt_BV, counts_BV=counts_BV
    )
  if features.bans:
    is_banned_BE = rows.steps_B[:, None] < rows.allowed_from_BE
    banned_BE = jnp.where(is_banned_BE, rows.stop_ids_BE, -1)
    vocabulary_1V = jnp.arange(logits_BV.shape[1])[None]
    # One comparison per stop token fuses into one pass; a scatter would not.
    for e in range(banned_BE.shape[1]):
      logits_BV = jnp.where(vocabulary_1V == banned_BE[:, e, None], -jnp.inf, logits_BV)
  if features.is_masked:
    token_V = jnp.arange(logits_BV.shape[1])
    bits_BV = extras.masks_BW[:, token_V // 32] >> (token_V % 32).astype(jnp.uint32)[None]
    logits_BV = jnp.where((bits_BV & 1) == 1, logits_BV, -jnp.inf)
  return logits_BV


def _record(
  drawn: Drawn,
  step: jax.Array,
  logits_BV: jax.Array,
  tokens_B: jax.Array,
  num_logprobs: int | None,
) -> Drawn:
  """Writes a step's tokens and log-probabilities; the host ignores those of rows that are done."""
  drawn = drawn.replace(tokens_NB=drawn.tokens_NB.at[step].set(tokens_B))
  if num_logprobs is None:
    return drawn
  # From the raw logits, so that log-probabilities do not depend on how tokens are drawn.
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


def _advance(rows: Rows, tokens_B: jax.Array, is_failed_B: jax.Array) -> Rows:
  """Moves rows on by the tokens they drew, and ends those that stop, fail or are full."""
  was_active_B = ~rows.is_done_B
  is_failed_B = was_active_B & is_failed_B
  draws_B = was_active_B & ~is_failed_B
  steps_B = rows.steps_B + draws_B
  is_stop_B = jnp.any(tokens_B[:, None] == rows.stop_ids_BE, axis=-1)
  ends_B = is_failed_B | (draws_B & (is_stop_B | (steps_B >= rows.limits_B)))
  continues_B = draws_B & ~ends_B
  # A row that ends stays at its last position, so that running along it writes nothing new.
  return rows.replace(
    last_B=jnp.where(continues_B, tokens_B, rows.last_B),
    positions_B=rows.positions_B + continues_B,
    steps_B=steps_B,
    is_done_B=rows.is_done_B | ends_B,
    is_failed_B=rows.is_failed_B | is_failed_B,
  )


class Programs(NamedTuple):
  """The jitted programs; `rows` and `cache` are donated, and returned changed.

  They take everything as arguments, so that `tools/compile_for.py` can compile them for machines
  that are not attached.

  Attributes:
    admit: (params, rows, cache, new_rows, words_R4, slots_R, prompts_PT, sources_R, prefixes)
      -> (rows, cache); arguments as in `admit` and `record_keys`; `prefixes` is what
      `Prefixes.rows` returns, None if prompts are prefilled whole.
    draw: (params, rows, cache, extras, num_steps, features) -> (rows, cache, drawn).
    end_rows: (rows, ended_B) -> rows; marks slots as done.
    wipe: (cache, wiped_B) -> cache; zeroes slots.
    resize: (cache, length) -> cache; pads it or cuts it off.
    make: (rows, length) -> (rows, cache); adds keys to free rows, and makes an empty cache.
  """

  admit: Callable[..., tuple[Rows, Cache]]
  draw: Callable[..., tuple[Rows, Cache, Drawn]]
  end_rows: Callable[..., Rows]
  wipe: Callable[..., Cache]
  resize: Callable[..., Cache]
  make: Callable[..., tuple[Rows, Cache]]


@functools.cache  # engines of one config and mesh share what is compiled
def make_programs(c: LlamaConfig, mesh: Mesh) -> Programs:
  """Makes the programs for a `DecodeLlama` on a mesh; call or lower them with the mesh in scope."""
  model = DecodeLlama(c)

  def model_fn(
    params: Any, logits: bool, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    with partitioning.axis_rules():
      return model.apply({"params": params}, tokens_BT, positions_BT, cache=cache, logits=logits)

  def admit_prompts(
    params: Any,
    rows: Rows,
    cache: Cache,
    new_rows: Rows,
    words_R4: jax.Array,
    slots_R: jax.Array,
    prompts_PT: jax.Array | None,
    sources_R: jax.Array | None,
    prefixes: tuple[Cache, jax.Array] | None = None,
  ) -> tuple[Rows, Cache]:
    prompt_cache, firsts_P = prefixes or (None, None)
    if prefixes is None and prompts_PT is not None:
      prompt_cache, firsts_P = (
        init_cache(c, *prompts_PT.shape),
        jnp.zeros(len(prompts_PT), jnp.int32),
      )
    return admit(
      functools.partial(model_fn, params, False),
      rows,
      cache,
      new_rows.replace(keys_B=record_keys(words_R4)),
      slots_R,
      prompts_PT=prompts_PT,
      prompt_cache=prompt_cache,
      firsts_P=firsts_P,
      sources_R=sources_R,
    )

  def draw(
    params: Any, rows: Rows, cache: Cache, extras: Extras, num_steps: jax.Array, features: Features
  ) -> tuple[Rows, Cache, Drawn]:
    model_of_params = functools.partial(model_fn, params, True)
    options = dict(max_steps=STEPS_PER_CALL, features=features)
    return decode(model_of_params, rows, cache, extras, num_steps, **options)

  def end_rows(rows: Rows, ended_B: jax.Array) -> Rows:
    return rows.replace(is_done_B=rows.is_done_B | ended_B)

  def wipe(cache: Cache, wiped_B: jax.Array) -> Cache:
    return jax.tree.map(lambda x: jnp.where(wiped_B[:, None, None, None], 0, x), cache)

  def resize(cache: Cache, length: int) -> Cache:
    return jax.tree.map(lambda x: resized(x, length), cache)

  def make(rows: Rows, length: int) -> tuple[Rows, Cache]:
    num_slots = rows.last_B.shape[0]
    keys_B = record_keys(jnp.zeros((num_slots, 4), jnp.uint32))
    return rows.replace(keys_B=keys_B), init_cache(c, num_slots, length)

  # Rows are small and read by the host. The cache is donated because it fills most of the memory.
  replicated, cached = partitioning.replicated(mesh), cache_sharding(mesh)
  options = xla_options.for_platform(_platform(mesh))
  jit = functools.partial(jax.jit, compiler_options=options)
  return Programs(
    admit=jit(admit_prompts, donate_argnums=(1, 2), out_shardings=(replicated, cached)),
    draw=jit(
      draw,
      static_argnames="features",
      donate_argnums=(1, 2),
      out_shardings=(replicated, cached, replicated),
    ),
    end_rows=jit(end_rows, donate_argnums=0, out_shardings=replicated),
    wipe=jit(wipe, donate_argnums=0, out_shardings=cached),
    resize=jit(resize, static_argnames="length", out_shardings=cached),
    make=jit(make, static_argnames="length", out_shardings=(replicated, cached)),
  )


def cache_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a cache's arrays: slots on the batch axes, heads on `tensor`."""
  return NamedSharding(mesh, partitioning.spec("batch", "kv_heads"))


def prefill_rows(bucket: int, *, num_slots: int, mesh: Mesh, is_padded: bool) -> int:
  """Returns the maximum number of prompts of a bucket in one prefill.

  Args:
    is_padded: whether fewer prompts are padded to this number.
  """
  padded = _PADDED_PREFILL_TOKENS.get(_platform(mesh), _PREFILL_TOKENS)
  tokens = padded if is_padded else _PREFILL_TOKENS
  shards = partitioning.num_batch_shards(mesh)
  rows = min(max(tokens // bucket, 1), num_slots)
  return -(-rows // shards) * shards  # a multiple of the batch shards


def _platform(mesh: Mesh) -> str:
  return mesh.devices.flat[0].platform


def resized(x_BKSH: jax.Array, length: int) -> jax.Array:
  """Pads a cache's keys or values with zeros to this many positions, or cuts them off."""
  more = length - x_BKSH.shape[2]
  if more <= 0:
    return x_BKSH[:, :, :length]
  return jnp.pad(x_BKSH, ((0, 0), (0, 0), (0, more), (0, 0)))
