import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.sampling import decode
from selfimprove_jax.sampling.sampler import SamplingConfig

VOCAB, EOS, PAD = 16, 7, 0
GREEDY = SamplingConfig(temperature=0.0)


def _counting(tokens_BT, positions_BT, cache):
  """A model that says the next number; its cache is what it was shown, by position."""
  rows = jnp.arange(tokens_BT.shape[0])[:, None]
  cache = {
    "tokens_BS": cache["tokens_BS"].at[rows, positions_BT].set(tokens_BT),
    "calls": cache["calls"] + 1,
  }
  return 100.0 * jax.nn.one_hot((tokens_BT + 1) % VOCAB, VOCAB), cache


def _summing(tokens_BT, positions_BT, cache):
  """A model whose next token is the sum of all that stands up to its position."""
  _, cache = _counting(tokens_BT, positions_BT, cache)
  S = cache["tokens_BS"].shape[1]
  seen_BTS = jnp.arange(S)[None, None] <= positions_BT[:, :, None]
  sums_BT = jnp.sum(jnp.where(seen_BTS, cache["tokens_BS"][:, None], 0), axis=-1)
  return 100.0 * jax.nn.one_hot(sums_BT % VOCAB, VOCAB), cache


def _uniform(tokens_BT, positions_BT, cache):
  return jnp.zeros((*tokens_BT.shape, VOCAB)), cache


def _sample(model, prompts, *, max_new_tokens, sampling=GREEDY, keys=None, eos_id=EOS):
  longest = max(len(prompt) for prompt in prompts)
  prompts_BT = np.array([[*p, *[9] * (longest - len(p))] for p in prompts], np.int32)
  B = len(prompts)
  cache = {
    "tokens_BS": jnp.zeros((B, longest + max_new_tokens), jnp.int32),
    "calls": jnp.int32(0),
  }
  return np.asarray(
    jax.jit(
      functools.partial(
        decode.sample,
        model,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_id=eos_id,
        pad_id=PAD,
      )
    )(
      cache,
      jnp.array(prompts_BT),
      jnp.array([len(p) for p in prompts], jnp.int32),
      jax.random.split(jax.random.key(0), B) if keys is None else keys,
    )
  )


def test_rows_end_on_their_own_and_are_padded():
  out = _sample(_counting, [[2], [4], [6]], max_new_tokens=5)
  np.testing.assert_array_equal(
    out,
    [
      [3, 4, 5, 6, EOS],
      [5, 6, EOS, PAD, PAD],
      [EOS, PAD, PAD, PAD, PAD],
    ],
  )


def test_a_row_that_never_ends_stops_at_the_most_new_tokens():
  np.testing.assert_array_equal(_sample(_counting, [[9], [8]], max_new_tokens=3)[:, -1], [12, 11])
  np.testing.assert_array_equal(_sample(_counting, [[9]], max_new_tokens=1), [[10]])


def test_ragged_prompts_continue_from_their_own_last_token():
  out = _sample(_counting, [[1, 2, 3], [10], [8, 11]], max_new_tokens=2)
  np.testing.assert_array_equal(out, [[4, 5], [11, 12], [12, 13]])


def test_what_stands_beyond_a_prompts_end_is_never_attended_to():
  out = _sample(_summing, [[1, 2, 3], [1], [2, 2]], max_new_tokens=4, eos_id=-1)
  # 6, then 12, 24, 48 and so on, modulo 16.
  np.testing.assert_array_equal(out, [[6, 12, 8, 0], [1, 2, 4, 8], [4, 8, 0, 0]])


def test_the_loop_ends_when_every_row_has_ended():
  calls = []

  def counted(tokens_BT, positions_BT, cache):
    jax.debug.callback(lambda: calls.append(1))
    return _counting(tokens_BT, positions_BT, cache)

  _sample(counted, [[5], [4]], max_new_tokens=12)
  jax.effects_barrier()
  assert len(calls) == 3  # the prompts, and two of the three tokens of the longer row


def test_a_row_does_not_depend_on_its_batch():
  keys = jax.random.split(jax.random.key(3), 4)
  prompts = [[1], [2], [3], [4]]
  options = dict(max_new_tokens=20, sampling=SamplingConfig())
  together = _sample(_uniform, prompts, keys=keys, **options)
  np.testing.assert_array_equal(
    _sample(_uniform, prompts[::-1], keys=keys[::-1], **options), together[::-1]
  )
  np.testing.assert_array_equal(
    _sample(_uniform, prompts[2:3], keys=keys[2:3], **options), together[2:3]
  )


def test_every_token_is_drawn_anew():
  out = _sample(_uniform, [[1]] * 50, max_new_tokens=40, sampling=SamplingConfig(), eos_id=-1)
  counts = np.bincount(out.ravel(), minlength=VOCAB)
  np.testing.assert_allclose(counts, out.size / VOCAB, rtol=0.4)
  assert len({tuple(row) for row in out}) == 50
  assert np.mean(out[:, 1:] == out[:, :-1]) == pytest.approx(1 / VOCAB, abs=0.03)
