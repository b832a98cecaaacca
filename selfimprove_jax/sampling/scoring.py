"""Log-likelihoods of given continuations, on the engine's parameters.

Axis letters: P rows of one call, T their length without the last token, A requests of one row, C
positions of one block of logits.
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

from selfimprove_jax.models import llama
from selfimprove_jax.models.decode_layout import DecodeLlama
from selfimprove_jax.models.llama import Cache
from selfimprove_jax.runtime import partitioning, xla_options
from selfimprove_jax.sampling import decode, sampler
from selfimprove_jax.sampling.prefixes import Chain, Prefixes, bucket, num_in
from selfimprove_jax.sampling.requests import (
  MAX_TOP_LOGPROBS,
  ContinuationScore,
  ScoreRequest,
)
from selfimprove_jax.sampling.running import check_shared, check_tokens

# Requests that are sorted by length together, so that calls are full.
_LOOK_AHEAD = 1024
# Tokens of one call. A CPU is as fast with few, and padding the last call costs less.
_TOKENS_PER_CALL = {"cpu": 256}
_DEFAULT_TOKENS_PER_CALL = 8192
# Rows of logits in memory at once: float32 logits of a whole call would be gigabytes.
_LOGITS_ROWS = 512

# Requests of equal inputs that one row scores.
_ALTERNATIVES = 4

_Top = tuple[Int[Array, "P S k"], Float[Array, "P S k"]]


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
      chains, most = sorted(by_chain), self._prefixes.num_entries
      for start in range(0, len(chains), most):
        some = chains[start : start + most]
        self._prefixes.hold(some, span=0)  # those of several calls at once
        scores |= self._score_group([asked for chain in some for asked in by_chain[chain]])
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
      size = self._num_rows(length, span)
      for start in range(0, len(rows), size):
        found |= self._call(length, span, num_top, size, rows[start : start + size])
    return found

  def _num_rows(self, length: int, span: int) -> int:
    tokens = _TOKENS_PER_CALL.get(self._platform, _DEFAULT_TOKENS_PER_CALL)
    most = _LOGITS_ROWS if not span else max(min(_LOGITS_ROWS, self._most_positions // span), 1)
    return decode.rows_of_tokens(tokens, length, self._mesh, most=most)

  def _call(
    self, length: int, span: int, num_top: int, size: int, rows: Sequence[Sequence[_Asked]]
  ) -> dict[int, ContinuationScore]:
    tokens_PT = np.zeros((size, length), np.int32)
    targets_PTA = np.zeros((size, length, _ALTERNATIVES), np.int32)
    starts_P, lengths_P = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for row, alternatives in enumerate(rows):
      first = alternatives[0]
      tokens_PT[row, : len(first.inputs)] = first.inputs
      num_targets = len(first.request.continuation)
      starts_P[row], lengths_P[row] = len(first.inputs) - num_targets, num_targets
      for a, asked in enumerate(alternatives):
        targets_PTA[row, :num_targets, a] = asked.request.continuation
      self.scored_tokens += len(first.inputs)
    chains = [alternatives[0].chain for alternatives in rows]
    prefixes = self._prefixes.rows(chains, size, span) if span else None
    arguments = (self._params, tokens_PT, targets_PTA, starts_P, lengths_P, prefixes)
    with jax.set_mesh(self._mesh):
      found = jax.device_get(self._program(*arguments, span=span, num_top=num_top))
    return {
      asked.place: _result(asked.request, row, a, *found)
      for row, alternatives in enumerate(rows)
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
  row: int,
  a: int,
  logprobs_PTA: np.ndarray,
  is_greedy_PA: np.ndarray,
  is_failed_P: np.ndarray,
  top: Any,
) -> ContinuationScore:
  if is_failed_P[row]:
    return _failed("the model's logits are NaN or infinite")
  logprobs = logprobs_PTA[row, : len(request.continuation), a]
  likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()
  if request.num_top:
    columns = (x_PTk[row, : len(logprobs), : request.num_top].tolist() for x_PTk in top)
    likeliest = tuple(tuple(zip(*place)) for place in zip(*columns))
  return ContinuationScore(logprobs, bool(is_greedy_PA[row, a]), top=likeliest)


def _compiled_top(request: ScoreRequest) -> int:
  """Returns the number of top tokens to compile for: none, one, or the most there may be."""
  return request.num_top if request.num_top <= 1 else MAX_TOP_LOGPROBS


@functools.cache
def _make_program(c: llama.LlamaConfig, mesh: Mesh) -> Any:
  return jax.jit(
    functools.partial(score, DecodeLlama(c)),
    static_argnames=("span", "num_top"),
    compiler_options=xla_options.for_platform(mesh.devices.flat[0].platform),
    out_shardings=partitioning.replicated(mesh),
  )


def score(
  model: DecodeLlama,
  params: Any,
  tokens_PT: Int[Array, "P T"],
  targets_PTA: Int[Array, "P T A"],
  starts_P: Int[Array, "P"],
  lengths_P: Int[Array, "P"],
  prefixes: tuple[Cache, Int[Array, "P"], Int[Array, "P"]] | None,
  *,
  span: int,
  num_top: int = 0,
) -> tuple[Float[Array, "P T A"], Bool[Array, "P A"], Bool[Array, "P"], _Top]:
  """Computes the log-probabilities of target tokens.

  Args:
    tokens_PT: prompt and continuation without its last token, and without what `prefixes` holds,
      padded on the right.
    targets_PTA: continuations of equal length, from the first column.
    starts_P: column whose logits predict the first target.
    lengths_P: number of targets; 0 for padding rows.
    prefixes: arguments of `decode.prefix_rows` for the beginnings of the prompts; None without.
    span: positions that tokens may look at; of no effect without `prefixes`.
    num_top: also find this many of the most likely tokens at each place.

  Returns:
    Log-probabilities of the targets (valid in the first `lengths_P` columns), whether every target
    is the argmax, whether a logit was NaN or infinite, and the most likely tokens with their
    log-probabilities.
  """
  P, T = tokens_PT.shape
  C = min(max(_LOGITS_ROWS // P, 1), T)
  hidden_PTD = _hidden(model, params, tokens_PT, prefixes, span)
  head_VD = llama.output_head(params).astype(hidden_PTD.dtype)
  # A block past the end would be moved back over the one before it by `dynamic_slice`.
  targets_PSA = jnp.pad(targets_PTA, ((0, 0), (0, -T % C), (0, 0)))

  num_top = min(num_top, head_VD.shape[0])

  def body(block: jax.Array, carry: tuple) -> tuple:
    logprobs_PSA, is_greedy_PA, is_failed_P, (ids_PSk, top_PSk) = carry
    first = block * C
    offsets_1C = first + jnp.arange(C)[None]
    is_target_PC = offsets_1C < lengths_P[:, None]
    at_PC = jnp.minimum(starts_P[:, None] + offsets_1C, T - 1)
    hidden_PCD = jnp.take_along_axis(hidden_PTD, at_PC[:, :, None], axis=1)
    logits_PCV = jnp.einsum("PCD,VD->PCV", hidden_PCD, head_VD, preferred_element_type=jnp.float32)
    target_PCA = jax.lax.dynamic_slice_in_dim(targets_PSA, first, C, axis=1)
    logprobs_PCV = jax.nn.log_softmax(logits_PCV, axis=-1)
    logprobs_PCA = jnp.take_along_axis(logprobs_PCV, target_PCA, axis=-1)
    likeliest_PC = sampler.argmax(logits_PCV.reshape(P * C, -1)).reshape(P, C)
    if num_top:
      ids_PCk, top_PCk = _most_likely(logprobs_PCV, likeliest_PC, num_top)
      ids_PSk = jax.lax.dynamic_update_slice_in_dim(ids_PSk, ids_PCk, first, axis=1)
      top_PSk = jax.lax.dynamic_update_slice_in_dim(top_PSk, top_PCk, first, axis=1)
    is_bad_PC = jnp.any(jnp.isnan(logits_PCV) | (logits_PCV == jnp.inf), axis=-1)
    return (
      jax.lax.dynamic_update_slice_in_dim(logprobs_PSA, logprobs_PCA, first, axis=1),
      is_greedy_PA
      & jnp.all((likeliest_PC[:, :, None] == target_PCA) | ~is_target_PC[:, :, None], axis=1),
      is_failed_P | jnp.any(is_bad_PC & is_target_PC, axis=1),
      (ids_PSk, top_PSk),
    )

  # Continuations are mostly much shorter than prompts: only their blocks of logits are computed.
  num_blocks = (jnp.max(lengths_P) + C - 1) // C
  P, S, A = targets_PSA.shape
  places = (P, S, num_top)
  top = (jnp.zeros(places, jnp.int32), jnp.zeros(places, jnp.float32))
  carry = (
    jnp.zeros((P, S, A), jnp.float32),
    jnp.ones((P, A), bool),
    jnp.zeros(P, bool),
    top,
  )
  logprobs_PSA, is_greedy_PA, is_failed_P, top = jax.lax.fori_loop(0, num_blocks, body, carry)
  return logprobs_PSA[:, :T], is_greedy_PA, is_failed_P, top


def _hidden(
  model: DecodeLlama,
  params: Any,
  tokens_PT: Int[Array, "P T"],
  prefixes: tuple[Cache, Int[Array, "P"], Int[Array, "P"]] | None,
  span: int,
) -> Float[Array, "P T D"]:
  """Returns the final hidden states of tokens that follow what `prefixes` holds."""
  P, T = tokens_PT.shape
  positions_PT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (P, T))
  cache = None
  if prefixes is not None:
    cache, positions_PT = decode.prefix_rows(*prefixes, span), positions_PT + prefixes[2][:, None]
  with partitioning.axis_rules():
    return model.apply({"params": params}, tokens_PT, positions_PT, cache=cache, logits=False)[0]


def _most_likely(
  logprobs_PCV: Float[Array, "P C V"], likeliest_PC: Int[Array, "P C"], num_top: int
) -> tuple[Int[Array, "P C k"], Float[Array, "P C k"]]:
  """Returns the most likely tokens and their log-probabilities, in descending order."""
  if num_top == 1:  # without a sort of the vocabulary
    ids_PCk = likeliest_PC[:, :, None]
    return ids_PCk, jnp.take_along_axis(logprobs_PCV, ids_PCk, axis=-1)
  top_PCk, ids_PCk = jax.lax.top_k(logprobs_PCV, num_top)
  return ids_PCk, top_PCk


def _failed(error: str) -> ContinuationScore:
  return ContinuationScore(np.zeros(0, np.float32), False, error=error)
