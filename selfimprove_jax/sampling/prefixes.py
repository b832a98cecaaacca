"""Keys and values of the beginnings of prompts that several requests share: each is prefilled once.

A request says where its shared parts end, as in "the instructions end here, the document there".
Its prompt is prefilled in these segments, one after the other, whether or not another request
shares them, so its keys and values are bit-identical whatever else is asked. Segments that the
cache still holds from an earlier request are not computed again.

A cache on the device holds one chain of segments in each of its entries, and with it all beginnings
of that chain: few long ones or many short ones. Axis letters: E entries, R rows of one call, S
positions of a row, and those of `models/packed_rows.py`.
"""

import collections
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from selfimprove_jax.models.decode_layout import DecodeLlama
from selfimprove_jax.models.llama import Cache, LlamaConfig, init_cache
from selfimprove_jax.models.packed_rows import PackedRows
from selfimprove_jax.runtime import partitioning, xla_options
from selfimprove_jax.sampling import decode, packing

Chain = tuple[tuple[int, ...], ...]
"""The segments of a prompt's shared part; empty if it shares nothing."""

# Numbers of new tokens, and of positions, that programs are compiled for.
_LENGTHS = (16, 64, 128, 256)
_SPANS = (64, 128, 256, 1024, 4096, 16384)
# Tokens of one call that extends chains. A CPU is nearly as fast with few.
_TOKENS_PER_CALL = {"cpu": 128}
_DEFAULT_TOKENS_PER_CALL = 4096
# Longer segments are cut, which bounds the padding. A CPU is as fast with few tokens.
_MAX_SEGMENT = {"cpu": 256}
_DEFAULT_MAX_SEGMENT = 1024


class Prefixes:
  """Holds chains of segments; the least recently used one makes room for a new one."""

  def __init__(
    self, c: LlamaConfig, params: Any, mesh: Mesh, *, num_positions: int, max_length: int
  ):
    """Args:
    c: config of the `DecodeLlama`.
    num_positions: of all chains that are held at once, each padded to the longest.
    max_length: longest chain with the tokens that follow it.
    """
    self.prefilled_tokens = 0
    self._params, self._mesh = params, mesh
    self._num_positions, self._max_length = num_positions, max_length
    self._platform = mesh.devices.flat[0].platform
    self._programs = _make_programs(c, mesh)
    self._chains: list[Chain] = []
    self._last_used: list[int] = []
    self._clock = 0
    self._cache: Cache | None = None  # made for the first chains
    self._length = 0  # positions of an entry

  @property
  def num_compilations(self) -> int:
    return self._programs["extend"]._cache_size()

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
    size = self._rounded(num_in(chain) + num_tokens)
    if not chain or size > bucket(num_tokens):
      return size
    # A cache must be longer than what is written behind a chain; see `LayerCache.write`.
    return max(self._rounded(bucket(num_tokens) + 1), bucket(num_tokens) + 1)

  def most_held(self, span: int) -> int:
    """Returns the number of chains that can be held at once, if none is longer than a span."""
    return max(self._num_positions // self._rounded(span), 1)

  def groups(self, chains: Sequence[Chain]) -> Iterator[list[Chain]]:
    """Yields parts of a sequence of chains that can be held at once."""
    group: list[Chain] = []
    longest = 0
    for chain in chains:
      longest = max(longest, num_in(chain))
      if group and len(group) >= self.most_held(longest):
        yield group
        group, longest = [], num_in(chain)
      group.append(chain)
    if group:
      yield group

  def rows(
    self, chains: Sequence[Chain], num_rows: int, span: int
  ) -> tuple[Cache, Int[np.ndarray, "R"]]:
    """Returns a cache with each chain in a row of its own, and the chains' lengths.

    What is missing of the chains is prefilled.

    Args:
      chains: at most `most_held` different ones; an empty one leaves its row empty.
      num_rows: rows behind the chains' are padding.
      span: positions of a row.
    """
    lengths_R = np.zeros(num_rows, np.int32)
    lengths_R[: len(chains)] = list(map(num_in, chains))
    entries_R = np.zeros(num_rows, np.int32)
    held = self.hold([chain for chain in chains if chain])
    entries_R[: len(chains)] = [held.get(chain, 0) for chain in chains]
    return self._take(entries_R, lengths_R, span), lengths_R

  def hold(self, chains: Sequence[Chain]) -> dict[Chain, int]:
    """Prefills what is missing of chains, and returns the entry of each; see `rows`."""
    different = dict.fromkeys(chains)
    self._clock += 1
    self._fit(len(different), max(map(num_in, different), default=1))
    if len(different) > len(self._chains):
      raise ValueError(f"{len(different)} chains, but only {len(self._chains)} can be held at once")
    while True:
      held = self._beginnings()
      found = {chain: _longest(chain, held) for chain in different}
      for entry, num_held in found.values():
        if num_held:
          self._last_used[entry] = self._clock
      # One more segment of each chain; of one that several chains share, once.
      missing = {chain[: n + 1]: entry for chain, (entry, n) in found.items() if n < len(chain)}
      if not missing:
        return {chain: entry for chain, (entry, _) in found.items()}
      self._extend(missing, in_use={entry for entry, num_held in found.values() if num_held})

  def _rounded(self, length: int) -> int:
    size = next((span for span in _SPANS if span >= length), self._max_length)
    return min(size, self._max_length)

  def _beginnings(self) -> dict[Chain, int]:
    """Returns the entry that holds each beginning of the chains, of equals that with the shortest.

    A chain that holds nothing else is extended in place.
    """
    found = {}
    for entry in sorted(range(len(self._chains)), key=lambda entry: -len(self._chains[entry])):
      found |= {self._chains[entry][:n]: entry for n in range(len(self._chains[entry]) + 1)}
    return found

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
        free = [entry for entry in range(len(self._chains)) if entry not in taken] or [source]
        placed[chain] = min(free, key=lambda entry: self._last_used[entry])
      taken.add(placed[chain])
    by_shape = collections.defaultdict(list)
    for chain in missing:
      num_tokens = len(chain[-1])
      by_shape[bucket(num_tokens), self.span(chain[:-1], num_tokens)].append(chain)
    for (length, span), some in sorted(by_shape.items()):
      shape = packing.make_shape(
        length,
        num_tokens=_TOKENS_PER_CALL.get(self._platform, _DEFAULT_TOKENS_PER_CALL),
        most_rows=max(self._num_positions // 2 // span, 1),  # half the memory of the chains
        num_sequences=partitioning.num_batch_shards(self._mesh),
      )
      for sequences in packing.pack([len(chain[-1]) for chain in some], shape):
        self._call(shape, span, [[some[i] for i in rows] for rows in sequences], missing, placed)
    for chain, entry in placed.items():
      self._chains[entry] = chain
      self._last_used[entry] = self._clock

  def _call(
    self,
    shape: packing.Shape,
    span: int,
    sequences: Sequence[Sequence[Chain]],
    sources: Mapping[Chain, int],
    entries: Mapping[Chain, int],
  ) -> None:
    sources_R = np.zeros(shape.total_rows, np.int32)
    lengths_R = np.zeros(shape.total_rows, np.int32)
    # Out of range: padding, which is dropped.
    entries_R = np.full(shape.total_rows, len(self._chains), np.int32)
    for b, chains in enumerate(sequences):
      for row, chain in enumerate(chains, b * shape.num_rows):
        sources_R[row], entries_R[row] = sources[chain], entries[chain]
        lengths_R[row] = num_in(chain[:-1])
        self.prefilled_tokens += len(chain[-1])
    asked = [[(chain[-1], num_in(chain[:-1])) for chain in chains] for chains in sequences]
    tokens_BT, packed = packing.lay_out(asked, shape)
    rows = self._take(sources_R, lengths_R, span)
    with jax.set_mesh(self._mesh):
      rows = self._programs["extend"](self._params, rows, tokens_BT, packed)
      self._cache = self._programs["put"](self._cache, rows, entries_R)

  def _take(
    self, entries_R: Int[np.ndarray, "R"], lengths_R: Int[np.ndarray, "R"], span: int
  ) -> Cache:
    with jax.set_mesh(self._mesh):
      return self._programs["take"](self._cache, entries_R, lengths_R, span=span)

  def _fit(self, number: int, length: int) -> None:
    """Makes entries long enough, and enough of them; keeps those chains for which there is room."""
    length = self._rounded(length)
    if self._cache is not None and length <= self._length and number <= len(self._chains):
      return
    size = self.most_held(length)
    by_use = sorted(range(len(self._chains)), key=lambda entry: -self._last_used[entry])
    kept = [entry for entry in by_use if num_in(self._chains[entry]) <= length][:size]
    with jax.set_mesh(self._mesh):
      if self._cache is None:
        self._cache = self._programs["make"](batch=size, length=length)
      else:
        kept_E = np.array(kept + [0] * (size - len(kept)), np.int32)
        self._cache = self._programs["rearrange"](self._cache, kept_E, length=length)
    missing = size - len(kept)
    self._chains = [self._chains[entry] for entry in kept] + [()] * missing
    self._last_used = [self._last_used[entry] for entry in kept] + [0] * missing
    self._length = length


def bucket(num_tokens: int) -> int:
  """Returns the number of tokens to compile for, for those that follow a chain."""
  size = next((length for length in _LENGTHS if length >= num_tokens), _LENGTHS[-1])
  while size < num_tokens:
    size *= 2
  return size


def _longest(chain: Chain, held: Mapping[Chain, int]) -> tuple[int, int]:
  """Returns the entry that holds the most segments of a chain, and their number."""
  num_held = next((n for n in range(len(chain), 0, -1) if chain[:n] in held), 0)
  return held.get(chain[:num_held], 0), num_held


def num_in(chain: Chain) -> int:
  """Returns the number of tokens in a chain."""
  return sum(map(len, chain))


@functools.cache
def _make_programs(c: LlamaConfig, mesh: Mesh) -> dict[str, Any]:
  """Returns the jitted programs.

  Only `extend` runs the model. It does not read the cache itself, so it need not be compiled again
  for each size of the cache.
  """
  model = DecodeLlama(c)

  def take(cache: Cache, entries_R: jax.Array, lengths_R: jax.Array, span: int) -> Cache:
    # Rows are 0 behind their length: an entry may hold more, of another request, and a NaN there
    # would spread although it is masked.
    is_held_R1S1 = (jnp.arange(span)[None] < lengths_R[:, None])[:, None, :, None]
    return jax.tree.map(
      lambda x_EKSH: jnp.where(is_held_R1S1, decode.resized(x_EKSH[entries_R], span), 0), cache
    )

  def extend(params: Any, rows: Cache, tokens_BT: jax.Array, packed: PackedRows) -> Cache:
    positions_BT = packed.pack(packed.positions_RC)
    with partitioning.axis_rules():
      options = dict(cache=rows, rows=packed, logits=False)
      return model.apply({"params": params}, tokens_BT, positions_BT, **options)[1]

  def put(cache: Cache, rows: Cache, entries_R: jax.Array) -> Cache:
    def put_one(old_EKSH: jax.Array, new_RKSH: jax.Array) -> jax.Array:
      span = min(old_EKSH.shape[2], new_RKSH.shape[2])
      return old_EKSH.at[entries_R, :, :span].set(new_RKSH[:, :, :span], mode="drop")

    return jax.tree.map(put_one, cache, rows)

  def rearrange(cache: Cache, kept_E: jax.Array, length: int) -> Cache:
    return jax.tree.map(lambda x_EKSH: decode.resized(x_EKSH[kept_E], length), cache)

  def make(batch: int, length: int) -> Cache:
    return init_cache(c, batch, length)

  # Any row may read any entry, so every batch shard has all of them.
  held = NamedSharding(mesh, partitioning.spec(None, "kv_heads"))
  rows = decode.cache_sharding(mesh)
  options = xla_options.for_platform(mesh.devices.flat[0].platform)
  jit = functools.partial(jax.jit, compiler_options=options)
  return {
    "take": jit(take, static_argnames="span", out_shardings=rows),
    "extend": jit(extend, donate_argnums=1, out_shardings=rows),
    "put": jit(put, donate_argnums=0, out_shardings=held),
    "rearrange": jit(rearrange, static_argnames="length", out_shardings=held),
    "make": jit(make, static_argnames=("batch", "length"), out_shardings=held),
  }
