"""The engine's jitted programs, as functions of their arguments alone.

So `tools/compile_for.py` compiles the very code that the engine runs, for machines that are not
there.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from selfimprove_jax import partitioning, xla_options
from selfimprove_jax.models import llama
from selfimprove_jax.sampling import decode

# A prefill of fewer tokens takes as long as reading the weights, so short prompts are put together.
_PREFILL_TOKENS = 256
# Where a lone prompt is padded to as many, on CPUs it costs more than several small prefills do.
_PADDED_PREFILL_TOKENS = {"cpu": 32}
STEPS_PER_CALL = 16


class Programs(NamedTuple):
  """What runs on the devices; rows and cache are donated, and come back changed.

  Attributes:
    admit: (params, rows, cache, new_rows, words_R4, slots_R, prompts_PT, sources_R) -> (rows,
      cache); the arguments of `decode.admit`, and the words of `decode.record_keys`.
    draw: (params, rows, cache, extras, num_steps, features) -> (rows, cache, drawn).
    end_rows: (rows, ended_B) -> rows, in which those are done.
    wipe: (cache, wiped_B) -> cache, empty in those slots.
    resize: (cache, length) -> cache; what stands beyond the length is lost.
    make: (rows, length) -> (rows, cache): free rows without keys, given theirs and an empty cache.
  """

  admit: Callable[..., tuple[decode.Rows, llama.Cache]]
  draw: Callable[..., tuple[decode.Rows, llama.Cache, decode.Drawn]]
  end_rows: Callable[..., decode.Rows]
  wipe: Callable[..., llama.Cache]
  resize: Callable[..., llama.Cache]
  make: Callable[..., tuple[decode.Rows, llama.Cache]]


def make_programs(c: llama.LlamaConfig, mesh: Mesh, *, steps_per_call: int) -> Programs:
  """Programs for an unrolled model on a mesh; run or lower them with the mesh in scope.

  Args:
    steps_per_call: most tokens that `draw` draws in a row.
  """
  network = llama.Llama(c)

  def model_fn(params, with_logits, tokens_BT, positions_BT, cache):
    with partitioning.axis_rules():
      return network.apply(
        {"params": params}, tokens_BT, positions_BT, cache=cache, logits=with_logits
      )

  def admit(params, rows, cache, new_rows, words_R4, slots_R, prompts_PT, sources_R):
    empty = None if prompts_PT is None else llama.init_cache(c, *prompts_PT.shape)
    return decode.admit(
      functools.partial(model_fn, params, False),
      rows,
      cache,
      new_rows.replace(keys_B=decode.record_keys(words_R4)),
      slots_R,
      prompts_PT=prompts_PT,
      empty_cache=empty,
      sources_R=sources_R,
    )

  def draw(params, rows, cache, extras, num_steps, features):
    return decode.decode(
      functools.partial(model_fn, params, True),
      rows,
      cache,
      extras,
      num_steps,
      max_steps=steps_per_call,
      features=features,
    )

  def end_rows(rows, ended_B):
    return rows.replace(is_done_B=rows.is_done_B | ended_B)

  def wipe(cache, wiped_B):
    return jax.tree.map(lambda x: jnp.where(wiped_B[:, None, None, None], 0, x), cache)

  def resize(cache, length):
    return jax.tree.map(lambda x: _resized(x, length), cache)

  def make(rows, length):
    num_slots = rows.last_B.shape[0]
    keys_B = decode.record_keys(jnp.zeros((num_slots, 4), jnp.uint32))
    return rows.replace(keys_B=keys_B), llama.init_cache(c, num_slots, length)

  whole, cached = partitioning.replicated(mesh), cache_sharding(mesh)
  options = xla_options.for_platform(mesh.devices.flat[0].platform)
  jit = functools.partial(jax.jit, compiler_options=options)
  return Programs(
    admit=jit(admit, donate_argnums=(1, 2), out_shardings=(whole, cached)),
    draw=jit(
      draw,
      static_argnames="features",
      donate_argnums=(1, 2),
      out_shardings=(whole, cached, whole),
    ),
    end_rows=jit(end_rows, donate_argnums=0, out_shardings=whole),
    wipe=jit(wipe, donate_argnums=0, out_shardings=cached),
    resize=jit(resize, static_argnames="length", out_shardings=cached),
    make=jit(make, static_argnames="length", out_shardings=(whole, cached)),
  )


def cache_sharding(mesh: Mesh) -> NamedSharding:
  """Of each array of a cache: slots over the batch axes, heads over `tensor`."""
  return NamedSharding(mesh, partitioning.spec("batch", "kv_heads"))


def prefill_rows(bucket: int, num_slots: int, mesh: Mesh, *, is_padded: bool) -> int:
  """Prompts of a bucket's length that one `admit` takes at most.

  Args:
    is_padded: fewer prompts are padded to as many.
  """
  shards = partitioning.num_batch_shards(mesh)
  platform = mesh.devices.flat[0].platform
  padded = _PADDED_PREFILL_TOKENS.get(platform, _PREFILL_TOKENS)
  tokens = padded if is_padded else _PREFILL_TOKENS
  rows = min(max(tokens // bucket, 1), num_slots)
  return -(-rows // shards) * shards


def _resized(x_BKSH, length):
  more = length - x_BKSH.shape[2]
  if more <= 0:
    return x_BKSH[:, :, :length]
  return jnp.pad(x_BKSH, ((0, 0), (0, 0), (0, more), (0, 0)))
