"""Prompts to completions, in batches of one shape per length bucket."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from selfimprove_jax import partitioning
from selfimprove_jax.models import llama
from selfimprove_jax.sampling import decode
from selfimprove_jax.sampling.sampler import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Completion:
  """New tokens without the end of sequence, and why they end: `stop` or `length`."""

  tokens: list[int]
  finish_reason: str


class Engine:
  """Samples from one set of parameters; compiles once for each bucket that occurs."""

  def __init__(
    self,
    model: llama.Llama,
    params: Any,
    mesh: Mesh,
    *,
    sampling: SamplingConfig,
    eos_id: int,
    pad_id: int,
    batch_size: int,
    prompt_buckets: Sequence[int],
    max_new_tokens: int,
  ):
    """Args:
    prompt_buckets: prompt lengths that are compiled for; a prompt is padded to the least that
      holds it.
    """
    if batch_size % partitioning.num_batch_shards(mesh):
      raise ValueError(
        f"batch_size={batch_size} does not divide over {partitioning.num_batch_shards(mesh)} shards"
      )
    self._params = params
    self._mesh = mesh
    self._pad_id = pad_id
    self._eos_id = eos_id
    self._batch_size = batch_size
    self._buckets = sorted(prompt_buckets)
    self._seed_keys = jax.jit(
      lambda seed, ids_B: jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(ids_B)
    )

    def generate(params, prompts_BT, lengths_B, keys_B):
      def logits_fn(tokens_BT, positions_BT, cache):
        return model.apply({"params": params}, tokens_BT, positions_BT, cache=cache)

      B, T = prompts_BT.shape
      cache = llama.init_cache(model.c, B, T + max_new_tokens)
      with partitioning.axis_rules():
        return decode.sample(
          logits_fn,
          cache,
          prompts_BT,
          lengths_B,
          keys_B,
          max_new_tokens=max_new_tokens,
          sampling=sampling,
          eos_id=eos_id,
          pad_id=pad_id,
        )

    self._generate = jax.jit(generate, out_shardings=partitioning.replicated(mesh))

  @property
  def num_compilations(self) -> int:
    return self._generate._cache_size()

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    record_ids: Sequence[int],
    on_batch: Callable[[int, int], None] = lambda completions, tokens: None,
  ) -> list[Completion]:
    """One completion for each prompt, in their order.

    A completion depends on the parameters, its prompt, `seed` and its record id: not on the other
    prompts nor on the order.

    Args:
      record_ids: below 2**32, one for each prompt.
      on_batch: told, after each batch, how many completions and new tokens it gave.

    Raises:
      ValueError: a prompt is empty, or longer than the last bucket; or there are not as many record
        ids as prompts.
    """
    if len(record_ids) != len(prompts):
      raise ValueError(f"{len(prompts)} prompts, but {len(record_ids)} record_ids")
    by_bucket: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
      by_bucket.setdefault(self._bucket(prompt), []).append(index)
    completions: dict[int, Completion] = {}
    for bucket, indices in sorted(by_bucket.items()):
      for start in range(0, len(indices), self._batch_size):
        batch = indices[start : start + self._batch_size]
        made = self._batch(
          [prompts[i] for i in batch], bucket, seed, [record_ids[i] for i in batch]
        )
        completions.update(zip(batch, made))
        on_batch(len(made), sum(len(completion.tokens) for completion in made))
    return [completions[index] for index in range(len(prompts))]

  def _bucket(self, prompt):
    for bucket in self._buckets:
      if 0 < len(prompt) <= bucket:
        return bucket
    raise ValueError(
      f"a prompt has {len(prompt)} tokens; it must have between 1 and {self._buckets[-1]}"
    )

  def _batch(self, prompts, bucket, seed, record_ids):
    # Rows beyond the prompts repeat the first, so that they end when it does.
    rows = list(range(len(prompts))) + [0] * (self._batch_size - len(prompts))
    prompts_BT = np.full((self._batch_size, bucket), self._pad_id, np.int32)
    for row, index in enumerate(rows):
      prompts_BT[row, : len(prompts[index])] = prompts[index]
    lengths_B = np.array([len(prompts[index]) for index in rows], np.int32)
    keys_B = self._seed_keys(seed, jnp.array([record_ids[i] for i in rows], jnp.uint32))
    batch = partitioning.whole_batch({"p": prompts_BT, "n": lengths_B}, self._mesh)
    with jax.set_mesh(self._mesh):
      tokens_BM = np.asarray(self._generate(self._params, batch["p"], batch["n"], keys_B))
    return [self._completion(tokens_BM[row]) for row in range(len(prompts))]

  def _completion(self, tokens_M):
    ends = np.flatnonzero(tokens_M == self._eos_id)
    if len(ends):
      return Completion(tokens_M[: ends[0]].tolist(), "stop")
    return Completion(tokens_M.tolist(), "length")
