"""Keys and values of the beginnings of prompts that several requests share: each is prefilled once.

A request says where its shared parts end, as in "the instructions end here, the document there".
Its prompt is prefilled in these segments, one after the other, whether or not another request
shares them, so its keys and values are bit-identical whatever else is asked. Segments that the
cache still holds from an earlier request are not computed again.

A small cache on the device holds one chain of segments in each of its entries, and with it all
beginnings of that chain. Axis letters: E entries, P rows of one call, T their new tokens, S
positions that they may look at.
"""

import collections
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from selfimprove_jax.models.decode_layout import DecodeLlama
from selfimprove_jax.models.llama import Cache, LlamaConfig, init_cache
from selfimprove_jax.runtime import partitioning, xla_options
from selfimprove_jax.sampling import decode

Chain = tuple[tuple[int, ...], ...]
"""The segments of a prompt's shared part; empty if it shares nothing."""

# Numbers of new tokens, and of positions, that programs are compiled for.
_LENGTHS = (8, 32, 64, 128, 256)
_SPANS = (256, 1024, 4096, 16384)
# Chains are extended together up to this many tokens, and fewer are padded to it.
_TOKENS_PER_CALL = 128
# Longer segments are cut, which bounds the padding. A CPU is as fast with few tokens.
_MAX_SEGMENT = {"cpu": 256}
_DEFAULT_MAX_SEGMENT = 1024


class Prefixes:
  """Holds chains of segments; the least recently used one makes room for a new one."""

  def __init__(self, c: LlamaConfig, params: Any, mesh: Mesh, *, num_entries: int, max_length: int):
    """Args:
    c: config of the `DecodeLlama`.
    num_entries: chains that are held at once.
    max_length: longest chain with the tokens that follow it.
    """
    self.num_entries, self.prefilled_tokens = num_entries, 0
    self._params, self._mesh, self._max_length = params, mesh, max_length
    self._platform = mesh.devices.flat[0].platform
    self._extend_rows, self._resize, self._make = _make_programs(c, mesh)
    self._chains: list[Chain] = [()] * num_entries
    self._last_used = [0] * num_entries
    self._clock = 0
    self._cache: Cache | None = None  # made for the first chain, and as long as was needed
    self._length = 0

  @property
  def num_compilations(self) -> int:
    return self._extend_rows._cache_size()

  def chain(self, prompt: Sequence[int], shared: Sequence[int]) -> Chain:
    """Returns the segments of a prompt's shared part, which leaves out at least the last token.

    Args:
      shared: where shared parts end, in tokens.
    """
    longest = _MAX_SEGMENT.get(self._platform, _DEFAULT_MAX_SEGMENT)
    segments: list[tuple[int, ...]] = []
    start = 0
    for end in sorted({min(end, len(prompt) - 1) for end in shared}):
      while start < end:
        stop = min(start + longest, end)
        segments.append(tuple(map(int, prompt[start:stop])))
        start = stop
    return tuple(segments)

  def span(self, chain: Chain, num_tokens: int) -> int:
    """Returns the number of positions to compile for, for a chain and the tokens that follow it."""
    needed = num_in(chain) + num_tokens
    size = next((span for span in _SPANS if span >= needed), self._max_length)
    # A cache must be longer than what is written to it at once; see `LayerCache.write`.
    return max(min(size, self._max_length), bucket(num_tokens) + 1)

  def rows(
    self, chains: Sequence[Chain], size: int, span: int
  ) -> tuple[Cache, Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """Returns the cache, and the entry and length of each chain, for `decode.prefix_rows`.

    What is missing of the chains is prefilled. The entries are valid until the next call.

    Args:
      chains: at most `num_entries` different ones.
      size: number of rows; those after the chains' are padding.
      span: positions that will be read.
    """
    entries_P, lengths_P = np.zeros(size, np.int32), np.zeros(size, np.int32)
    entries_P[: len(chains)] = self.hold(chains, span)
    lengths_P[: len(chains)] = list(map(num_in, chains))
    return self._cache, entries_P, lengths_P

  def hold(self, chains: Sequence[Chain], span: int) -> list[int]:
    """Prefills what is missing of chains, and returns the entry of each; see `rows`."""
    self._clock += 1
    self._grow(span)
    while True:
      found = {chain: self._longest(chain) for chain in chains}
      for entry, num_held in found.values():
        if num_held:
          self._last_used[entry] = self._clock
      # One more segment of each chain; of one that several chains share, once.
      missing = {chain[: n + 1]: entry for chain, (entry, n) in found.items() if n < len(chain)}
      if not missing:
        return [found[chain][0] for chain in chains]
      self._extend(missing, in_use={entry for entry, num_held in found.values() if num_held})

  def _longest(self, chain: Chain) -> tuple[int, int]:
    """Returns the entry that holds the most segments of a chain, and their number."""

    def num_common(entry: int) -> int:
      pairs = zip(chain, self._chains[entry])
      return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    # Among equals the shortest chain: one that holds nothing else is extended in place.
    entry = max(
      range(self.num_entries), key=lambda entry: (num_common(entry), -len(self._chains[entry]))
    )
    return entry, num_common(entry)

  def _extend(self, missing: Mapping[Chain, int], in_use: set[int]) -> None:
    """Prefills the last segments of chains.

    Args:
      missing: chain -> entry that holds all of it but the last segment.
      in_use: entries that must keep what they hold.
    """
    taken, placed = set(in_use), {}
    for chain, source in missing.items():
      if self._chains[source] == chain[:-1] and source not in placed.values():
        placed[chain] = source
      else:
        # If all entries are in use, each serves one chain, so this chain may overwrite its source.
        free = [entry for entry in range(self.num_entries) if entry not in taken] or [source]
        placed[chain] = min(free, key=lambda entry: self._last_used[entry])
      taken.add(placed[chain])
    by_shape = collections.defaultdict(list)
    for chain in missing:
      num_tokens = len(chain[-1])
      by_shape[bucket(num_tokens), self.span(chain[:-1], num_tokens)].append(chain)
    for (length, span), some in sorted(by_shape.items()):
      size = decode.rows_of_tokens(_TOKENS_PER_CALL, length, self._mesh, most=self.num_entries)
      for start in range(0, len(some), size):
        self._call(length, span, size, missing, {c: placed[c] for c in some[start : start + size]})
    for chain, entry in placed.items():
      self._chains[entry] = chain
      self._last_used[entry] = self._clock

  def _call(
    self,
    length: int,
    span: int,
    size: int,
    sources: Mapping[Chain, int],
    entries: Mapping[Chain, int],
  ) -> None:
    tokens_PT = np.zeros((size, length), np.int32)
    sources_P, lengths_P = np.zeros(size, np.int32), np.zeros(size, np.int32)
    entries_P = np.full(size, self.num_entries, np.int32)  # out of range: padding, which is dropped
    for row, (chain, entry) in enumerate(entries.items()):
      tokens_PT[row, : len(chain[-1])] = chain[-1]
      sources_P[row], entries_P[row] = sources[chain], entry
      lengths_P[row] = num_in(chain[:-1])
      self.prefilled_tokens += len(chain[-1])
    self._grow(span)
    with jax.set_mesh(self._mesh):
      self._cache = self._extend_rows(
        self._params, self._cache, sources_P, lengths_P, entries_P, tokens_PT, span=span
      )

  def _grow(self, length: int) -> None:
    if length <= self._length:
      return
    with jax.set_mesh(self._mesh):
      if self._cache is None:
        self._cache = self._make(batch=self.num_entries, length=length)
      else:
        self._cache = self._resize(self._cache, length=length)
    self._length = length


def bucket(num_tokens: int) -> int:
  """Returns the number of tokens to compile for, for those that follow a chain."""
  size = next((length for length in _LENGTHS if length >= num_tokens), _LENGTHS[-1])
  while size < num_tokens:
    size *= 2
  return size


def num_in(chain: Chain) -> int:
  """Returns the number of tokens in a chain."""
  return sum(map(len, chain))


@functools.cache
def _make_programs(c: LlamaConfig, mesh: Mesh) -> tuple[Any, Any, Any]:
  """Returns the jitted programs (extend, resize, make)."""
  model = DecodeLlama(c)

  def extend(
    params: Any,
    cache: Cache,
    sources_P: jax.Array,
    lengths_P: jax.Array,
    entries_P: jax.Array,
    tokens_PT: jax.Array,
    span: int,
  ) -> Cache:
    rows = decode.prefix_rows(cache, sources_P, lengths_P, span)
    positions_PT = lengths_P[:, None] + jnp.arange(tokens_PT.shape[1], dtype=jnp.int32)[None]
    with partitioning.axis_rules():
      _, rows = model.apply({"params": params}, tokens_PT, positions_PT, cache=rows, logits=False)

    def put(old_EKSH: jax.Array, new_PKSH: jax.Array) -> jax.Array:
      return old_EKSH.at[entries_P, :, :span].set(new_PKSH, mode="drop")

    return jax.tree.map(put, cache, rows)

  def resize(cache: Cache, length: int) -> Cache:
    return jax.tree.map(lambda x: decode.resized(x, length), cache)

  def make(batch: int, length: int) -> Cache:
    return init_cache(c, batch, length)

  # Any row may read any entry, so every batch shard has all of them.
  sharding = NamedSharding(mesh, partitioning.spec(None, "kv_heads"))
  options = xla_options.for_platform(mesh.devices.flat[0].platform)
  jit = functools.partial(jax.jit, compiler_options=options, out_shardings=sharding)
  return (
    jit(extend, static_argnames="span", donate_argnums=1),
    jit(resize, static_argnames="length"),
    jit(make, static_argnames=("batch", "length")),
  )
