"""Log-likelihoods of given continuations, on the engine's parameters.

Axis letters: P requests of one call, T their length without the last token, C positions of one
block of logits.
"""

import collections
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
from selfimprove_jax.runtime import partitioning, xla_options
from selfimprove_jax.sampling import decode, sampler
from selfimprove_jax.sampling.requests import ContinuationScore, ScoreRequest
from selfimprove_jax.sampling.running import check_tokens

# Requests that are sorted by length together, so that calls are full.
_LOOK_AHEAD = 1024
# Tokens of one call. A CPU is as fast with few, and padding the last call costs less.
_TOKENS_PER_CALL = {"cpu": 256}
_DEFAULT_TOKENS_PER_CALL = 8192
# Rows of logits in memory at once: float32 logits of a whole call would be gigabytes.
_LOGITS_ROWS = 512


class Scorer:
  """Scores continuations in calls of fixed shapes, one shape for each bucket of lengths.

  Fixed shapes make a score independent, to the bit, of what else is scored.
  """

  def __init__(self, c: llama.LlamaConfig, params: Any, mesh: Mesh, *, buckets: Sequence[int]):
    """Args:
    c: config of the `DecodeLlama`.
    buckets: lengths to compile for, ascending; the last one is the longest possible.
    """
    self._c, self._params, self._mesh = c, params, mesh
    self._buckets = buckets
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
      by_bucket = collections.defaultdict(list)
      for place, request in enumerate(group):
        try:
          by_bucket[self._bucket(request)].append(place)
        except ValueError as error:
          scores[place] = _failed(str(error))
      for bucket, places in sorted(by_bucket.items()):
        size = self._rows(bucket)
        for start in range(0, len(places), size):
          some = places[start : start + size]
          found = self._call(bucket, size, [group[place] for place in some])
          scores.update(zip(some, found, strict=True))
      yield from (scores[place] for place in range(len(group)))

  def _bucket(self, request: ScoreRequest) -> int:
    most, vocab_size = self._buckets[-1], self._c.vocab_size
    check_tokens("a prompt", request.prompt, most=most, vocab_size=vocab_size)
    check_tokens("a continuation", request.continuation, most=most, vocab_size=vocab_size)
    # The last token is predicted, but never read.
    length = len(request.prompt) + len(request.continuation) - 1
    if length > most:
      raise ValueError(
        f"prompt and continuation have {length + 1} tokens; the engine's max_length is {most + 1}"
      )
    return next(bucket for bucket in self._buckets if bucket >= length)

  def _rows(self, bucket: int) -> int:
    tokens = _TOKENS_PER_CALL.get(self._platform, _DEFAULT_TOKENS_PER_CALL)
    return decode.rows_of_tokens(tokens, bucket, self._mesh, most=_LOGITS_ROWS)

  def _call(
    self, bucket: int, size: int, requests: Sequence[ScoreRequest]
  ) -> Iterator[ContinuationScore]:
    tokens_PT = np.zeros((size, bucket), np.int32)
    targets_PT = np.zeros((size, bucket), np.int32)
    starts_P, lengths_P = np.zeros(size, np.int32), np.zeros(size, np.int32)
    for row, request in enumerate(requests):
      whole = [*request.prompt, *request.continuation]
      tokens_PT[row, : len(whole) - 1] = whole[:-1]
      targets_PT[row, : len(request.continuation)] = request.continuation
      starts_P[row], lengths_P[row] = len(request.prompt) - 1, len(request.continuation)
    with jax.set_mesh(self._mesh):
      found = self._program(self._params, tokens_PT, targets_PT, starts_P, lengths_P)
    logprobs_PT, is_greedy_P, is_failed_P = jax.device_get(found)
    for row, request in enumerate(requests):
      if is_failed_P[row]:
        yield _failed("the model's logits are NaN or infinite")
      else:
        logprobs = logprobs_PT[row, : len(request.continuation)]
        yield ContinuationScore(logprobs, bool(is_greedy_P[row]))


@functools.cache
def _make_program(c: llama.LlamaConfig, mesh: Mesh) -> Any:
  return jax.jit(
    functools.partial(score, DecodeLlama(c)),
    compiler_options=xla_options.for_platform(mesh.devices.flat[0].platform),
    out_shardings=partitioning.replicated(mesh),
  )


def score(
  model: DecodeLlama,
  params: Any,
  tokens_PT: Int[Array, "P T"],
  targets_PT: Int[Array, "P T"],
  starts_P: Int[Array, "P"],
  lengths_P: Int[Array, "P"],
) -> tuple[Float[Array, "P T"], Bool[Array, "P"], Bool[Array, "P"]]:
  """Computes the log-probabilities of target tokens.

  Args:
    tokens_PT: prompt and continuation without its last token, padded on the right.
    targets_PT: the continuation, from the first column.
    starts_P: position whose logits predict the first target.
    lengths_P: number of targets; 0 for padding rows.

  Returns:
    Log-probabilities of the targets (valid in the first `lengths_P` columns), whether every target
    is the argmax, and whether a logit was NaN or infinite.
  """
  P, T = tokens_PT.shape
  C = min(max(_LOGITS_ROWS // P, 1), T)
  positions_PT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (P, T))
  with partitioning.axis_rules():
    hidden_PTD, _ = model.apply({"params": params}, tokens_PT, positions_PT, logits=False)
  head_VD = llama.output_head(params).astype(hidden_PTD.dtype)
  # A block past the end would be moved back over the one before it by `dynamic_slice`.
  targets_PS = jnp.pad(targets_PT, ((0, 0), (0, -T % C)))

  def body(block: jax.Array, carry: tuple) -> tuple:
    logprobs_PS, is_greedy_P, is_failed_P = carry
    first = block * C
    offsets_1C = first + jnp.arange(C)[None]
    is_target_PC = offsets_1C < lengths_P[:, None]
    at_PC = jnp.minimum(starts_P[:, None] + offsets_1C, T - 1)
    hidden_PCD = jnp.take_along_axis(hidden_PTD, at_PC[:, :, None], axis=1)
    logits_PCV = jnp.einsum("PCD,VD->PCV", hidden_PCD, head_VD, preferred_element_type=jnp.float32)
    target_PC = jax.lax.dynamic_slice_in_dim(targets_PS, first, C, axis=1)
    logprobs_PC = jnp.take_along_axis(
      jax.nn.log_softmax(logits_PCV, axis=-1), target_PC[:, :, None], axis=-1
    )[:, :, 0]
    likeliest_PC = sampler.argmax(logits_PCV.reshape(P * C, -1)).reshape(P, C)
    is_bad_PC = jnp.any(jnp.isnan(logits_PCV) | (logits_PCV == jnp.inf), axis=-1)
    return (
      jax.lax.dynamic_update_slice_in_dim(logprobs_PS, logprobs_PC, first, axis=1),
      is_greedy_P & jnp.all((likeliest_PC == target_PC) | ~is_target_PC, axis=1),
      is_failed_P | jnp.any(is_bad_PC & is_target_PC, axis=1),
    )

  # Continuations are mostly much shorter than prompts: only their blocks of logits are computed.
  num_blocks = (jnp.max(lengths_P) + C - 1) // C
  carry = (jnp.zeros(targets_PS.shape, jnp.float32), jnp.ones(P, bool), jnp.zeros(P, bool))
  logprobs_PS, is_greedy_P, is_failed_P = jax.lax.fori_loop(0, num_blocks, body, carry)
  return logprobs_PS[:, :T], is_greedy_P, is_failed_P


def _failed(error: str) -> ContinuationScore:
  return ContinuationScore(np.zeros(0, np.float32), False, error=error)
