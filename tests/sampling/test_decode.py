"""The device programs on models that follow a rule; the cache entry of a token is the token."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.models.llama import LayerCache
from selfimprove_jax.sampling import decode, sampler
from selfimprove_jax.sampling.requests import SamplingConfig

V, SLOTS, LENGTH, STEPS = 16, 4, 24, 6
STOP = 7
GREEDY = SamplingConfig(temperature=0.0)


def _written(tokens_BT, positions_BT, cache):
  (layer,) = cache
  if layer.k_BKSH.shape[2] == tokens_BT.shape[1]:  # a prefill
    seen_BS = tokens_BT.astype(jnp.float32)
  else:
    rows = jnp.arange(tokens_BT.shape[0])[:, None]
    seen_BS = layer.k_BKSH[:, 0, :, 0].at[rows, positions_BT].set(tokens_BT.astype(jnp.float32))
  both = seen_BS[:, None, :, None]
  return seen_BS, (LayerCache(both, both),)


def _counting(tokens_BT, positions_BT, cache):
  """Predicts the next number."""
  return 100.0 * jax.nn.one_hot((tokens_BT + 1) % V, V), _written(tokens_BT, positions_BT, cache)[1]


def _summing(tokens_BT, positions_BT, cache):
  """Predicts the sum of all tokens up to its position."""
  seen_BS, cache = _written(tokens_BT, positions_BT, cache)
  visible_BTS = jnp.arange(seen_BS.shape[1])[None, None] <= positions_BT[:, :, None]
  sums_BT = jnp.sum(jnp.where(visible_BTS, seen_BS[:, None], 0.0), axis=-1).astype(jnp.int32)
  return 100.0 * jax.nn.one_hot(sums_BT % V, V), cache


def _uniform(tokens_BT, positions_BT, cache):
  return jnp.zeros((*tokens_BT.shape, V)), _written(tokens_BT, positions_BT, cache)[1]


def _broken(tokens_BT, positions_BT, cache):
  """Predicts the next number, and NaN after 13."""
  logits, cache = _counting(tokens_BT, positions_BT, cache)
  return jnp.where(tokens_BT[:, :, None] == 13, jnp.nan, logits), cache


def _cache(batch, length):
  zeros = jnp.full((batch, 1, length, 1), 5.0)  # left over from earlier requests
  return (LayerCache(zeros, zeros),)


def _rows(prompts, limits, *, stop=(STOP,), allowed_from=0, config=GREEDY, keys=None):
  count = len(prompts)
  return decode.Rows(
    last_B=np.array([prompt[-1] for prompt in prompts], np.int32),
    positions_B=np.array([len(prompt) - 1 for prompt in prompts], np.int32),
    steps_B=np.zeros(count, np.int32),
    limits_B=np.array(limits, np.int32),
    is_done_B=np.array([limit == 0 for limit in limits]),
    is_failed_B=np.zeros(count, np.bool_),
    keys_B=jax.random.split(jax.random.key(0), count) if keys is None else keys,
    stop_ids_BE=np.tile(np.array([*stop, -1, -1][:2], np.int32), (count, 1)),
    allowed_from_BE=np.full((count, 2), allowed_from, np.int32),
    sampling=sampler.row_sampling([config] * count),
  )


@functools.cache
def _jitted(model):
  return (
    jax.jit(functools.partial(decode.admit, model)),
    jax.jit(functools.partial(decode.decode, model, max_steps=STEPS), static_argnames="features"),
  )


def _admit(model, prompts, limits, *, rows=None, cache=None, slots=None, **options):
  """Admits each prompt to its slot, by one prefill."""
  count, longest = len(prompts), max(map(len, prompts)) - 1
  if rows is None:
    rows, cache = _rows([[0]] * SLOTS, [0] * SLOTS), _cache(SLOTS, LENGTH)
  prefill = dict(prompts_PT=None, prompt_cache=None, firsts_P=None, sources_R=None)
  if longest:
    padded = [[*prompt[:-1], *[9] * (longest + 1 - len(prompt))] for prompt in prompts]
    prefill = dict(
      prompts_PT=np.array(padded, np.int32),
      prompt_cache=_cache(count, longest),
      firsts_P=np.zeros(count, np.int32),
      sources_R=np.arange(count, dtype=np.int32),
    )
  slots = np.arange(count, dtype=np.int32) if slots is None else np.array(slots, np.int32)
  return _jitted(model)[0](rows, cache, _rows(prompts, limits, **options), slots, **prefill)


def _decode(model, rows, cache, num_steps=STEPS, extras=None, **features):
  return _jitted(model)[1](
    rows,
    cache,
    extras or decode.Extras(),
    np.int32(num_steps),
    features=decode.Features(**features),
  )


def _drawn(drawn):
  return [drawn.tokens_NB[:num, row].tolist() for row, num in enumerate(np.asarray(drawn.num_B))]


def test_each_row_ends_at_its_stop_token_or_its_limit():
  rows, cache = _admit(_counting, [[2], [4], [9], [8]], [6, 6, 3, 1])
  rows, _, drawn = _decode(_counting, rows, cache)
  assert _drawn(drawn) == [[3, 4, 5, 6, STOP], [5, 6, STOP], [10, 11, 12], [9]]
  assert np.asarray(rows.is_done_B).all() and not np.asarray(rows.is_failed_B).any()


def test_prompts_of_all_lengths_continue_from_their_last_token_and_see_no_others():
  prompts = [[1, 2, 3], [1], [2, 2], [4, 1, 1, 3, 1]]
  rows, cache = _admit(_summing, prompts, [4] * 4, stop=())
  _, _, drawn = _decode(_summing, rows, cache)
  expected = []
  for prompt in prompts:
    said = list(prompt)
    for _ in range(4):
      said.append(sum(said) % V)
    expected.append(said[len(prompt) :])
  assert _drawn(drawn) == expected


def test_calls_of_any_number_of_steps_draw_the_same_and_end_with_the_last_row():
  prompts, limits = [[1, 2], [3, 1], [9, 9], [2, 5]], [10, 4, 10, 7]
  drawn = []
  for sizes in ([1] * 10, [6, 4], [3, 3, 3, 1]):
    rows, cache = _admit(_uniform, prompts, limits, stop=(3, 5), config=SamplingConfig())
    tokens = [[] for _ in prompts]
    for size in sizes:
      rows, cache, part = _decode(_uniform, rows, cache, num_steps=size)
      for row, more in enumerate(_drawn(part)):
        tokens[row] += more
    drawn.append(tokens)
  assert drawn[0] == drawn[1] == drawn[2]
  assert len({tuple(row) for row in drawn[0]}) == 4
  calls = []

  def counted(*arguments):
    jax.debug.callback(lambda: calls.append(1))
    return _counting(*arguments)

  rows, cache = _admit(_counting, [[5], [4]], [6, 6])
  _decode(counted, rows, cache)
  jax.effects_barrier()
  assert len(calls) == 3  # for the longer row


def test_a_slot_is_refilled_while_the_others_continue():
  rows, cache = _admit(_summing, [[1, 2], [3, 1], [2, 2], [1, 1]], [12, 2, 12, 2], stop=())
  rows, cache, first = _decode(_summing, rows, cache, num_steps=4)
  # Two go to the free slots; the slot of the third is out of range, like padding.
  rows, cache = _admit(
    _summing,
    [[5, 1, 1], [6, 3], [8, 8]],
    [3, 3, 3],
    rows=rows,
    cache=cache,
    slots=[3, 1, SLOTS],
    stop=(),
  )
  rows, cache, second = _decode(_summing, rows, cache, num_steps=4)

  def sums(prompt, count):
    said = list(prompt)
    for _ in range(count):
      said.append(sum(said) % V)
    return said[len(prompt) :]

  one, two = _drawn(first), _drawn(second)
  assert one[0] + two[0] == sums([1, 2], 8) and one[2] + two[2] == sums([2, 2], 8)
  assert (one[1], one[3]) == (sums([3, 1], 2), sums([1, 1], 2))
  assert (two[3], two[1]) == (sums([5, 1, 1], 3), sums([6, 3], 3))


def test_several_slots_may_get_one_prompt():
  rows, cache = _rows([[0]] * SLOTS, [0] * SLOTS), _cache(SLOTS, LENGTH)
  prompts = [[1, 2, 3], [1, 2, 4], [2, 2, 1]]
  rows, cache = _jitted(_summing)[0](
    rows,
    cache,
    _rows(prompts, [3] * 3, stop=()),
    np.array([2, 0, 3], np.int32),
    prompts_PT=np.array([[1, 2], [2, 2]], np.int32),
    prompt_cache=_cache(2, 2),
    firsts_P=np.zeros(2, np.int32),
    sources_R=np.array([0, 0, 1], np.int32),
  )
  drawn = _drawn(_decode(_summing, rows, cache)[2])
  assert drawn == [[7, 14, 12], [], [6, 12, 8], [5, 10, 4]]


def test_a_stop_token_is_not_drawn_before_its_step():
  rows, cache = _admit(_counting, [[5], [6]], [6, 6], allowed_from=2)
  _, _, drawn = _decode(_counting, rows, cache, bans=True)
  # All but the banned token are equally likely, so the first one is drawn.
  assert _drawn(drawn)[:2] == [[6, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
  rows, cache = _admit(_counting, [[4]], [6], allowed_from=2)
  assert _drawn(_decode(_counting, rows, cache, bans=True)[2])[0] == [5, 6, STOP]


def test_a_row_whose_logits_are_nan_fails_and_the_others_continue():
  rows, cache = _admit(_broken, [[11], [1], [13]], [6, 6, 6])
  rows, _, drawn = _decode(_broken, rows, cache)
  assert _drawn(drawn)[:3] == [[12, 13], [2, 3, 4, 5, 6, STOP], []]
  assert np.asarray(drawn.is_failed_B).tolist() == [True, False, True, False]
  assert np.asarray(rows.is_done_B).all()


def test_only_tokens_of_the_mask_are_drawn_and_a_row_without_any_fails():
  masks = np.full((SLOTS, 1), 0xFFFFFFFF, np.uint32)
  masks[0], masks[1] = 1 << 12 | 1 << 15, 0
  rows, cache = _admit(_counting, [[2], [3], [4]], [6, 6, 6])
  extras = decode.Extras(masks_BW=masks)
  _, _, drawn = _decode(_counting, rows, cache, 1, extras, is_masked=True)
  assert _drawn(drawn)[:3] == [[12], [], [5]]
  assert np.asarray(drawn.is_failed_B).tolist() == [False, True, False, False]


def test_penalties_count_what_is_drawn_within_a_call():
  config = SamplingConfig(temperature=0.0, frequency_penalty=10.0)
  zeros = np.zeros((SLOTS, V), np.int32)
  counts = zeros.copy()
  counts[1, :4] = 1  # drawn in an earlier call
  rows, cache = _admit(_uniform, [[1], [1]], [6, 6], config=config, stop=())
  extras = decode.Extras(in_prompt_BV=zeros.astype(bool), counts_BV=counts)
  _, _, drawn = _decode(_uniform, rows, cache, extras=extras, penalizes=True)
  assert _drawn(drawn)[:2] == [[0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9]]


def test_logprobs_are_those_before_temperature_bans_and_truncation():
  config = SamplingConfig(temperature=0.3, top_k=1)
  rows, cache = _admit(_counting, [[6]], [1], config=config, allowed_from=5)
  options = dict(bans=True, truncates=True, num_logprobs=2)
  _, _, drawn = _decode(_counting, rows, cache, 1, **options)
  assert drawn.top_ids_NBk[0, 0].tolist() == [STOP, 0]
  np.testing.assert_allclose(drawn.top_logprobs_NBk[0, 0], [0.0, -100.0], atol=1e-4)
  assert drawn.logprobs_NB[0, 0] == pytest.approx(-100.0, abs=1e-4)


def test_every_token_of_every_row_is_drawn_anew():
  words = np.array(list(itertools.product((0, 1), (0, 1), (0, 9), (0, 3))))
  keys = decode.record_keys(jnp.array(words, jnp.uint32))
  assert len({tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist()}) == len(words)
  tokens = []
  for start in range(0, len(words), SLOTS):
    rows, cache = _admit(
      _uniform,
      [[1]] * SLOTS,
      [18] * SLOTS,
      stop=(),
      config=SamplingConfig(),
      keys=keys[start : start + SLOTS],
    )
    parts = []
    for _ in range(3):
      rows, cache, drawn = _decode(_uniform, rows, cache)
      parts.append(np.asarray(drawn.tokens_NB))
    tokens.append(np.concatenate(parts).T)
  tokens = np.concatenate(tokens)
  counts = np.bincount(tokens.ravel(), minlength=V)
  np.testing.assert_allclose(counts, tokens.size / V, rtol=0.6)
  assert len({tuple(row) for row in tokens}) == len(words)
  assert np.mean(tokens[:, 1:] == tokens[:, :-1]) == pytest.approx(1 / V, abs=0.06)
