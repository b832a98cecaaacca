"""Log-likelihoods of given continuations, on the engine's parameters.

Axis letters: those of `models/packed_rows.py`; M targets of a sequence, A requests of one row, m
targets of one block of logits.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from selfimprove_jax.models import devices, llama
from selfimprove_jax.models.decode_layout import DecodeLlama
from selfimprove_jax.models.llama import Cache
from selfimprove_jax.models.packed_rows import PackedRows
from selfimprove_jax.runtime import partitioning, xla_options
from selfimprove_jax.sampling import decode, packing, sampler
from selfimprove_jax.sampling.prefixes import Chain, Prefixes, bucket, num_in
from selfimprove_jax.sampling.requests import (
  MAX_TOP_LOGPROBS,
  ContinuationScore,
  ScoreRequest,
)
from selfimprove_jax.sampling.running import check_shared, check_tokens

# Requests that are sorted by length together, so that calls are full.
_LOOK_AHEAD = 1024
# Tokens of one call. A CPU is nearly as fast with few, and a last call that is not full costs less.
_TOKENS_PER_CALL = {"cpu": 128}
_DEFAULT_TOKENS_PER_CALL = 8192
# Rows of logits in memory at once: float32 logits of a whole call would be gigabytes. On a CPU, few
# of them stay in its caches until they are summed.
_LOGITS_ROWS = {"cpu": 32}
_DEFAULT_LOGITS_ROWS = 512
# Requests of equal inputs that one row scores.
_ALTERNATIVES = 16

_Top = tuple[Int[Array, "B M k"], Float[Array, "B M k"]]
_Found = tuple[Float[Array, "B M A"], Bool[Array, "B M A"], Bool[Array, "B M"], _Top]


@dataclasses.dataclass(frozen=True)
class _Asked:
  """A request, its place among others, and the shared part of its prompt."""

  place: int
  request: ScoreRequest
  chain: Chain

  @functools.cached_property
  def inputs(self) -> tuple[int, ...]:
    """The tokens behind the shared part, without the last one."""
    whole = (*self.request.prompt, *self.request.continuation)
    return whole[num_in(self.chain) : -1]


class Scorer:
  """Scores continuations in calls of fixed shapes, one shape for each bucket of lengths.

  Fixed shapes make a score independent, to the bit, of what else is scored.

  Attributes:
    scored_tokens: tokens computed so far, without those of shared parts.
  """

  def __init__(
    self,
    c: llama.LlamaConfig,
    params: Any,
    mesh: Mesh,
    *,
    prefixes: Prefixes,
    buckets: Sequence[int],
    most_positions: int,
  ):
    """Args:
    c: config of the `DecodeLlama`.
    prefixes: holds the parts of prompts that requests share.
    buckets: lengths to compile for, ascending; the last one is the longest possible.
    most_positions: of the prefixes of all rows in one call, which bounds its memory.
    """
    self._c, self._params, self._mesh = c, params, mesh
    self._prefixes, self._buckets, self._most_positions = prefixes, buckets, most_positions
    self.scored_tokens = 0
    self._platform = mesh.devices.flat[0].platform
    self._program = _make_program(c, mesh)

  @property
  def num_compilations(self) -> int:
    return self._program._cache_size()

  def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ContinuationScore]:
    """Yields a score for each request, in order; see `Engine.score`."""
    source = iter(requests)
    while group := list(itertools.islice(source, _LOOK_AHEAD)):
      scores: dict[int, ContinuationScore] = {}
      by_chain: dict[Chain, list[_Asked]] = collections.defaultdict(list)
      for place, request in enumerate(group):
        try:
          self._check(request)
        except ValueError as error:
          scores[place] = _failed(str(error))
        else:
          chain = self._prefixes.chain(request.prompt, request.shared)
          by_chain[chain].append(_Asked(place, request, chain))
      scores |= self._score_group(by_chain.pop((), []))
      # Sorted, so that chains with the same beginning come one after another.
      for chains in self._prefixes.groups(sorted(by_chain)):
        self._prefixes.hold(chains)  # those of several calls at once
        scores |= self._score_group([asked for chain in chains for asked in by_chain[chain]])
      yield from (scores[place] for place in range(len(group)))

  def _check(self, request: ScoreRequest) -> None:
    most, vocab_size = self._buckets[-1], self._c.vocab_size
    check_tokens("a prompt", request.prompt, most=most, vocab_size=vocab_size)
    check_tokens("a continuation", request.continuation, most=most, vocab_size=vocab_size)
    check_shared(request.shared)
    if not 0 <= request.num_top <= MAX_TOP_LOGPROBS:
      raise ValueError(f"num_top={request.num_top} must be between 0 and {MAX_TOP_LOGPROBS}")
    # The last token is predicted, but never read.
    length = len(request.prompt) + len(request.continuation) - 1
    if length > most:
      raise ValueError(
        f"prompt and continuation have {length + 1} tokens; the engine's max_length is {most + 1}"
      )

  def _score_group(self, group: Sequence[_Asked]) -> dict[int, ContinuationScore]:
    """Returns the scores of requests with few different chains, by their places."""
    by_shape = collections.defaultdict(list)
    for asked in group:
      num_tokens = len(asked.inputs)
      if asked.chain:
        shape = bucket(num_tokens), self._prefixes.span(asked.chain, num_tokens)
      else:
        shape = next(length for length in self._buckets if length >= num_tokens), 0
      by_shape[*shape, _compiled_top(asked.request)].append(asked)
    found: dict[int, ContinuationScore] = {}
    for (length, span, num_top), some in sorted(by_shape.items()):
      rows = _rows_of_equal_inputs(some)
      # Rows that fit into a shorter bucket are in that one; those behind a prefix have others.
      shorter = [0] if span else [0, *(bucket for bucket in self._buckets if bucket < length)]
      shape = packing.make_shape(
        length,
        shortest=shorter[-1] + 1,
        num_tokens=_TOKENS_PER_CALL.get(self._platform, _DEFAULT_TOKENS_PER_CALL),
        most_rows=max(self._most_positions // max(span, length), 1),
        num_sequences=partitioning.num_batch_shards(self._mesh),
      )
      for sequences in packing.pack([len(alternatives[0].inputs) for alternatives in rows], shape):
        found |= self._call(shape, span, num_top, [[rows[i] for i in s] for s in sequences])
    return found

  def _call(
    self,
    shape: packing.Shape,
    span: int,
    num_top: int,
    sequences: Sequence[Sequence[Sequence[_Asked]]],
  ) -> dict[int, ContinuationScore]:
    at_BM = np.zeros((shape.num_sequences, shape.num_tokens), np.int32)
    targets_BMA = np.zeros((*at_BM.shape, _ALTERNATIVES), np.int32)
    places = []  # (alternatives, sequence, its targets)
    chains: list[Chain] = [()] * shape.total_rows
    num_targets = 0  # of the sequence that has most
    for b, rows in enumerate(sequences):
      begin = end = 0  # tokens, targets
      for row, alternatives in enumerate(rows):
        first = alternatives[0]
        targets = slice(end, end + len(first.request.continuation))
        begin, end = begin + len(first.inputs), targets.stop
        at_BM[b, targets] = np.arange(begin - (targets.stop - targets.start), begin)
        for a, asked in enumerate(alternatives):
          targets_BMA[b, targets, a] = asked.request.continuation
        chains[b * shape.num_rows + row] = first.chain
        places.append((alternatives, b, targets))
      self.scored_tokens += begin
      num_targets = max(num_targets, end)
    asked = [[(r[0].inputs, num_in(r[0].chain)) for r in rows] for rows in sequences]
    tokens_BT, packed = packing.lay_out(asked, shape)
    prefixes = self._prefixes.rows(chains, shape.total_rows, span)[0] if span else None
    arguments = (self._params, tokens_BT, packed, at_BM, targets_BMA, np.int32(num_targets))
    with jax.set_mesh(self._mesh):
      found, _ = self._program(*arguments, prefixes, num_top=num_top)
    found = jax.device_get(found)
    return {
      asked.place: _result(asked.request, a, *jax.tree.map(lambda x, at=(b, at): x[at], found))
      for alternatives, b, at in places
      for a, asked in enumerate(alternatives)
    }


def _rows_of_equal_inputs(group: Sequence[_Asked]) -> list[list[_Asked]]:
  """Returns rows of requests that differ at most in their last token, such as A, B, C and D."""
  rows: list[list[_Asked]] = []
  open_rows: dict[Any, list[_Asked]] = {}
  for asked in group:
    key = asked.chain, asked.inputs, len(asked.request.continuation)
    row = open_rows.get(key)
    if row is None or len(row) == _ALTERNATIVES:
      row = open_rows[key] = []
      rows.append(row)
    row.append(asked)
  return rows


def _result(
  request: ScoreRequest,
  a: int,
  logprobs_MA: np.ndarray,
  is_greedy_MA: np.ndarray,
  is_failed_M: np.ndarray,
  top: tuple[np.ndarray, np.ndarray],
) -> ContinuationScore:
  """Returns a score from the results for its targets."""
  if is_failed_M.any():
    return _failed("the model's logits are NaN or infinite")
  likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()
  if request.num_top:
    columns = (x_Mk[:, : request.num_top].tolist() for x_Mk in top)
    likeliest = tuple(tuple(zip(*place)) for place in zip(*columns))
  return ContinuationScore(logprobs_MA[:, a], bool(is_greedy_MA[:, a].all()), top=likeliest)


def _compiled_top(request: ScoreRequest) -> int:
  """Returns the number of top tokens to compile for: none, one, or the most there may be."""
  return request.num_top if request.num_top <= 1 else MAX_TOP_LOGPROBS


@functools.cache
def _make_program(c: llama.LlamaConfig, mesh: Mesh) -> Any:
  platform = mesh.devices.flat[0].platform
  block = _LOGITS_ROWS.get(platform, _DEFAULT_LOGITS_ROWS)
  return jax.jit(
    functools.partial(score, DecodeLlama(c), logits_rows=block),
    static_argnames="num_top",
    donate_argnames="prefixes",
    compiler_options=xla_options.for_platform(platform),
    out_shardings=(partitioning.replicated(mesh), decode.cache_sharding(mesh)),
  )


def score(
  model: DecodeLlama,
  params: Any,
  tokens_BT: Int[Array, "B T"],
  rows: PackedRows,
  at_BM: Int[Array, "B M"],
  targets_BMA: Int[Array, "B M A"],
  num_targets: Int[Array, ""],
  prefixes: Cache | None,
  *,
  logits_rows: int,
  num_top: int = 0,
) -> tuple[_Found, Cache | None]:
  """Computes the log-probabilities of target tokens.

  Args:
    tokens_BT: packed rows: prompt and continuation without its last token, and without what
      `prefixes` holds.
    at_BM: the token whose logits predict each target.
    targets_BMA: targets of the requests that a row scores.
    num_targets: of the sequence that has most; what lies behind is padding.
    prefixes: the beginnings of the prompts, with room for the rest; None without.
    logits_rows: rows of logits in memory at once.
    num_top: also find this many of the most likely tokens at each place.

  Returns:
    Log-probabilities of the targets, whether each is the argmax, whether a logit was NaN or
    infinite, and the most likely tokens with their log-probabilities; and the cache that
    `prefixes` has become: nobody reads it, but XLA can write it in place of its argument.
  """
  with partitioning.axis_rules():
    options = dict(cache=prefixes, rows=rows, logits=False)
    positions_BT = rows.pack(rows.positions_RC)
    hidden_BTD, cache = model.apply({"params": params}, tokens_BT, positions_BT, **options)
  head_VD = llama.output_head(params).astype(hidden_BTD.dtype)
  num_top = min(num_top, head_VD.shape[0])
  B, M, A = targets_BMA.shape
  m = min(max(logits_rows // B, 1), M)
  # A block past the end would be moved back over the one before it by `dynamic_slice`.
  pad = functools.partial(_pad, -M % m)
  at_BM, targets_BMA = pad(at_BM), pad(targets_BMA)

  def body(block: jax.Array, found: tuple) -> tuple:
    cut = functools.partial(
      jax.lax.dynamic_slice_in_dim, start_index=block * m, slice_size=m, axis=1
    )
    hidden_BmD = jnp.take_along_axis(hidden_BTD, cut(at_BM)[:, :, None], axis=1)
    exact = devices.precision(hidden_BmD, head_VD)
    logits_BmV = jnp.einsum(
      "BmD,VD->BmV", hidden_BmD, head_VD, precision=exact, preferred_element_type=jnp.float32
    )
    target_BmA = cut(targets_BMA)
    likeliest_Bm = sampler.argmax(logits_BmV.reshape(B * m, -1)).reshape(B, m)
    top_Bmk = _most_likely(logits_BmV, likeliest_Bm, num_top)
    # `log_softmax` would write as many log-probabilities as there are logits.
    largest_Bm1 = jnp.max(logits_BmV, axis=-1, keepdims=True)
    total_Bm1 = jnp.log(jnp.sum(jnp.exp(logits_BmV - largest_Bm1), axis=-1, keepdims=True))

    def logprobs(ids: jax.Array) -> jax.Array:
      return jnp.take_along_axis(logits_BmV, ids, axis=-1) - largest_Bm1 - total_Bm1

    made = (
      logprobs(target_BmA),
      likeliest_Bm[:, :, None] == target_BmA,
      jnp.any(jnp.isnan(logits_BmV) | (logits_BmV == jnp.inf), axis=-1),
      (top_Bmk, logprobs(top_Bmk)),
    )
    return jax.tree.map(
      lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, block * m, axis=1), found, made
    )

  empty = (
    jnp.zeros((B, M, A), jnp.float32),
    jnp.zeros((B, M, A), bool),
    jnp.zeros((B, M), bool),
    (jnp.zeros((B, M, num_top), jnp.int32), jnp.zeros((B, M, num_top), jnp.float32)),
  )
  # Continuations are mostly much shorter than prompts: only their blocks of logits are computed.
  num_blocks = (num_targets + m - 1) // m
  found = jax.lax.fori_loop(0, num_blocks, body, jax.tree.map(pad, empty))
  return jax.tree.map(lambda x: x[:, :M], found), cache


def _pad(number: int, x_BM: jax.Array) -> jax.Array:
  return jnp.pad(x_BM, ((0, 0), (0, number)) + ((0, 0),) * (x_BM.ndim - 2))


def _most_likely(
  logits_BmV: Float[Array, "B m V"], likeliest_Bm: Int[Array, "B m"], num_top: int
) -> Int[Array, "B m k"]:
  """Returns the most likely tokens, in descending order."""
  if num_top <= 1:  # without a sort of the vocabulary
    return likeliest_Bm[:, :, None][:, :, :num_top]
  return jax.lax.top_k(logits_BmV, num_top)[1]


def _failed(error: str) -> ContinuationScore:
  return ContinuationScore(np.zeros(0, np.float32), False, error=error)
