"""Each row's distribution against NumPy's: thresholds exactly, draws by their frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from selfimprove_jax.sampling import sampler
from selfimprove_jax.sampling.requests import SamplingConfig

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32)

_truncate = jax.jit(sampler.truncate)
_draw = jax.jit(sampler.draw, static_argnames="truncates")
_penalize = jax.jit(sampler.penalize)


def _rows(config, count):
  return sampler.row_sampling([config] * count)


def _kept(logits, config):
  """Returns the tokens that are kept, for one row."""
  rows = np.asarray(logits, np.float32)[None]
  return np.flatnonzero(_truncate(rows, _rows(config, 1))[0] > -np.inf).tolist()


def _reference(logits, config):
  """Returns the tokens that are kept, by sorting; ties with the last are kept too."""
  logits = np.asarray(logits, np.float64)
  kept = np.full(logits.shape, True)
  if config.top_k:
    kept &= logits >= np.sort(logits)[::-1][min(config.top_k, len(logits)) - 1]
  if config.top_p == 1:
    return kept
  weights = np.where(kept, np.exp(logits - logits.max()), 0)
  order = np.argsort(-weights, kind="stable")
  sums = np.cumsum(weights[order])
  last = order[np.searchsorted(sums, config.top_p * sums[-1], side="left")]
  return kept & (weights >= weights[last])


@pytest.mark.parametrize(
  ("options", "tokens"),
  [
    ({}, [0, 1, 2, 3, 4]),
    ({"top_k": 1}, [1]),
    ({"top_k": 3}, [1, 3, 4]),
    ({"top_k": 5}, [0, 1, 2, 3, 4]),
    ({"top_k": 9}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.39}, [1]),
    ({"top_p": 0.41}, [1, 3]),  # the token that crosses it is included
    ({"top_p": 0.69}, [1, 3]),
    ({"top_p": 0.71}, [1, 3, 4]),
    ({"top_p": 0.96}, [0, 1, 2, 3, 4]),
    # After top-k the two kept tokens have 0.57 and 0.43.
    ({"top_k": 2, "top_p": 0.5}, [1]),
    ({"top_k": 2, "top_p": 0.6}, [1, 3]),
  ],
)
def test_truncation_keeps_the_most_likely_tokens(options, tokens):
  assert _kept(LOGITS, SamplingConfig(**options)) == tokens


def test_thresholds_found_by_bisection_are_those_of_a_sort_in_a_mixed_batch():
  r = np.random.default_rng(0)
  V, B = 513, 64
  # Many magnitudes, both signs, minus infinities, and ties in a third of the rows.
  logits = r.normal(size=(B, V)) * 10.0 ** r.integers(-3, 2, (B, 1))
  logits[::3] = np.round(logits[::3])
  logits[:, 2] = -np.inf
  logits = logits.astype(np.float32) + 0.0  # no -0.0, which is below 0.0 for the sampler
  configs = [
    SamplingConfig(top_k=int(r.integers(0, V + 5)), top_p=float(r.choice([0.03, 0.5, 0.9, 1.0])))
    for _ in range(B)
  ]
  found = np.asarray(_truncate(logits, sampler.row_sampling(configs)))
  for row, config in enumerate(configs):
    expected = _reference(logits[row], config)
    weights = np.exp(np.float64(logits[row]) - logits[row].max())
    # Where sums are equal to within rounding, one token more or less is correct too.
    wrong = (found[row] > -np.inf) != (expected & (logits[row] > -np.inf))
    assert np.sum(weights[wrong]) < 1e-5 * np.sum(weights), (row, config)
    if config.top_p == 1:
      assert not wrong.any(), (row, config)
    kept = found[row] > -np.inf
    np.testing.assert_array_equal(found[row][kept], logits[row][kept])


def test_tokens_as_likely_as_the_last_that_is_kept_are_kept_too():
  assert _kept([1.0, 3.0, 1.0, 0.0, 1.0], SamplingConfig(top_k=2)) == [0, 1, 2, 4]
  assert _kept([0.0, 0.0, 0.0, 0.0], SamplingConfig(top_p=0.3)) == [0, 1, 2, 3]


def test_a_row_without_top_k_or_top_p_is_left_as_it_is_beside_rows_that_have_them():
  logits = np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32)
  configs = [SamplingConfig(), SamplingConfig(top_k=2), SamplingConfig(top_p=0.5), SamplingConfig()]
  found = np.asarray(_truncate(logits, sampler.row_sampling(configs)))
  np.testing.assert_array_equal(found[[0, 3]], logits[[0, 3]])
  assert np.isinf(found[1]).sum() == 28 and 0 < np.isinf(found[2]).sum() < 30


@pytest.mark.parametrize(
  ("config", "size"),
  [
    (SamplingConfig(), 5),
    (SamplingConfig(temperature=0.6), 200),
    (SamplingConfig(temperature=1.7, top_k=30), 200),
    (SamplingConfig(temperature=1.2, top_p=0.8), 200),
    (SamplingConfig(temperature=0.9, top_k=100, top_p=0.95), 256),
  ],
)
def test_draws_have_the_frequencies_of_the_distribution(config, size):
  num_draws = 8_000
  r = np.random.default_rng(size)
  logits = LOGITS if size == 5 else 3 * r.normal(size=size).astype(np.float32)
  keys = jax.random.split(jax.random.key(1), num_draws)
  rows = jnp.broadcast_to(jnp.array(logits), (num_draws, size))
  drawn = np.asarray(_draw(rows, keys, _rows(config, num_draws), truncates=config.truncates))
  scaled = np.float64(logits) / config.temperature
  expected = np.where(_reference(scaled, config), np.exp(scaled - scaled.max()), 0)
  expected *= num_draws / expected.sum()
  counts = np.bincount(drawn, minlength=size)
  assert counts[expected == 0].sum() == 0
  # Chi-square over tokens that are expected often enough, and the others together.
  often = expected >= 8
  groups = [(counts[often], expected[often])]
  if not often.all():
    groups.append(([counts[~often].sum()], [expected[~often].sum()]))
  observed, wanted = (np.concatenate(parts) for parts in zip(*groups))
  observed, wanted = observed[wanted > 5], wanted[wanted > 5]
  wanted *= observed.sum() / wanted.sum()
  assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-3


def test_tokens_of_no_weight_are_never_drawn():
  # Whole blocks have no weight, at both ends and between.
  V, num_draws = 1000, 1000
  logits = np.full(V, -np.inf, np.float32)
  logits[[333, 334, 700]] = 1.0
  rows = jnp.broadcast_to(jnp.array(logits), (num_draws, V))
  keys = jax.random.split(jax.random.key(0), num_draws)
  drawn = _draw(rows, keys, _rows(SamplingConfig(), num_draws), truncates=False)
  assert set(np.unique(drawn)) == {333, 334, 700}


def test_temperature_zero_takes_the_most_likely_token_whatever_the_key():
  logits = jnp.array(np.random.default_rng(0).normal(size=(6, 9)), jnp.float32)
  greedy, hot = SamplingConfig(temperature=0.0), SamplingConfig(temperature=50.0)
  rows = sampler.row_sampling([greedy, hot] * 3)
  others = set()
  for seed in range(5):
    keys = jax.random.split(jax.random.key(seed), 6)
    drawn = np.asarray(_draw(logits, keys, rows, truncates=False))
    np.testing.assert_array_equal(drawn[::2], np.argmax(logits, axis=-1)[::2])
    others.add(tuple(drawn[1::2]))
  assert len(others) > 1


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, 1e-37])
def test_a_temperature_near_zero_takes_the_most_likely_token(temperature):
  logits = jnp.array(np.random.default_rng(0).normal(size=(6, 9)) + 60, jnp.float32)
  keys = jax.random.split(jax.random.key(0), 6)
  rows = _rows(SamplingConfig(temperature=temperature, top_p=0.9), 6)
  drawn = _draw(logits, keys, rows, truncates=True)
  np.testing.assert_array_equal(drawn, np.argmax(logits, axis=-1))


def test_a_rows_token_depends_on_its_own_logits_settings_and_key_alone():
  r = np.random.default_rng(0)
  logits = jnp.array(r.normal(size=(64, 32)), jnp.float32)
  keys = jax.random.split(jax.random.key(0), 64)
  settings = [
    SamplingConfig(temperature=1.3, top_k=20, top_p=0.9),
    SamplingConfig(),
    SamplingConfig(temperature=0.0),
    SamplingConfig(temperature=0.7, top_p=0.5),
  ]
  configs = [settings[i] for i in r.integers(0, 4, 64)]

  def draw(order, keys=keys, truncates=True):
    rows = sampler.row_sampling([configs[i] for i in order])
    return np.asarray(_draw(logits[order], keys[order], rows, truncates=truncates))

  together = draw(np.arange(64))
  order = r.permutation(64)
  np.testing.assert_array_equal(draw(order), together[order])
  np.testing.assert_array_equal(draw(np.arange(5, 8)), together[5:8])
  plain = np.array([i for i in range(64) if not configs[i].truncates])
  np.testing.assert_array_equal(draw(plain, truncates=False), together[plain])
  other_keys = jax.random.split(jax.random.key(1), 64)
  assert np.mean(draw(np.arange(64), keys=other_keys) == together) < 0.7


def _penalty_rows():
  r = np.random.default_rng(0)
  B, V = 4, 40
  logits = 3 * r.normal(size=(B, V)).astype(np.float32)
  prompts = r.integers(0, V, (B, 9))
  drawn = r.integers(0, V, (B, 14)) // 2
  in_prompt, counts = np.zeros((B, V), bool), np.zeros((B, V), np.int32)
  for row in range(B):
    in_prompt[row, prompts[row]] = True
    np.add.at(counts[row], drawn[row], 1)
  return logits, prompts, drawn, in_prompt, counts


@pytest.mark.slow
def test_the_repetition_penalty_is_that_of_transformers():
  import torch
  import transformers

  logits, prompts, drawn, in_prompt, counts = _penalty_rows()
  for penalty in (1.3, 0.7):
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(
      torch.tensor(np.concatenate([prompts, drawn], axis=1)), torch.tensor(logits)
    )
    rows = _rows(SamplingConfig(repetition_penalty=penalty), 4)
    ours = _penalize(logits, rows, in_prompt_BV=in_prompt, counts_BV=counts)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_presence_and_frequency_penalties_are_openais_and_each_row_has_its_own():
  logits, _, _, in_prompt, counts = _penalty_rows()
  configs = [
    SamplingConfig(),
    SamplingConfig(presence_penalty=0.5),
    SamplingConfig(frequency_penalty=-0.25),
    SamplingConfig(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.3),
  ]
  found = np.asarray(
    _penalize(logits, sampler.row_sampling(configs), in_prompt_BV=in_prompt, counts_BV=counts)
  )
  assert counts.max() > 1
  np.testing.assert_array_equal(found[0], logits[0])
  np.testing.assert_allclose(found[1], logits[1] - 0.5 * (counts[1] > 0), rtol=1e-6)
  np.testing.assert_allclose(found[2], logits[2] + 0.25 * counts[2], rtol=1e-6)
  halved = np.where(logits[3] > 0, logits[3] / 2, logits[3] * 2)
  expected = np.where(in_prompt[3] | (counts[3] > 0), halved, logits[3])
  expected = expected - 0.5 * (counts[3] > 0) - 0.3 * counts[3]
  np.testing.assert_allclose(found[3], expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("temperature", -0.1, "greater than or equal to 0"),
    ("temperature", float("nan"), "finite number"),
    ("top_k", -1, "greater than or equal to 0"),
    ("top_k", 2.5, "valid integer"),
    ("top_p", 0.0, "greater than 0"),
    ("top_p", 1.1, "less than or equal to 1"),
    ("top_p", float("nan"), "finite number"),
    ("repetition_penalty", 0.0, "greater than"),
    ("presence_penalty", float("inf"), "finite number"),
    ("frequency_penalty", float("nan"), "finite number"),
  ],
)
def test_an_option_out_of_range_is_refused_by_its_name(name, value, message):
  with pytest.raises(ValueError, match=rf"(?s){name}.*{message}"):
    SamplingConfig(**{name: value})
