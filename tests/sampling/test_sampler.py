import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.sampling import sampler

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def _config(**options):
  return sampler.SamplingConfig(**options)


def _kept(logits, **options):
  """Probabilities after truncation, one row."""
  return np.asarray(
    jax.nn.softmax(sampler.truncate(jnp.array(logits)[None], _config(**options))[0])
  )


def _renormalized(*tokens):
  kept = np.where(np.isin(np.arange(5), tokens), PROBABILITIES, 0)
  return kept / kept.sum()


@pytest.mark.parametrize(
  ("options", "tokens"),
  [
    ({}, (0, 1, 2, 3, 4)),
    ({"top_k": 1}, (1,)),
    ({"top_k": 3}, (1, 3, 4)),
    ({"top_k": 5}, (0, 1, 2, 3, 4)),
    ({"top_k": 9}, (0, 1, 2, 3, 4)),
    ({"top_p": 0.39}, (1,)),
    ({"top_p": 0.41}, (1, 3)),  # the token that passes it is included
    ({"top_p": 0.69}, (1, 3)),
    ({"top_p": 0.71}, (1, 3, 4)),
    ({"top_p": 0.96}, (0, 1, 2, 3, 4)),
    # After top-k the two that are left have 0.57 and 0.43.
    ({"top_k": 2, "top_p": 0.5}, (1,)),
    ({"top_k": 2, "top_p": 0.6}, (1, 3)),
  ],
)
def test_truncation_keeps_the_most_likely_tokens_in_proportion(options, tokens):
  np.testing.assert_allclose(_kept(LOGITS, **options), _renormalized(*tokens), atol=1e-6)


def test_top_p_is_measured_at_the_temperature():
  # At temperature 0.5 the most likely token has 0.16 / 0.285 = 0.56, at 1 it has 0.4.
  assert np.count_nonzero(_kept(LOGITS, temperature=0.5, top_p=0.5)) == 1
  assert np.count_nonzero(_kept(LOGITS, top_p=0.5)) == 2
  expected = PROBABILITIES**2 / (PROBABILITIES**2).sum()
  np.testing.assert_allclose(_kept(LOGITS, temperature=0.5), expected, atol=1e-6)


def test_draws_have_the_frequencies_of_the_truncated_distribution():
  num_draws = 20_000
  keys = jax.random.split(jax.random.key(0), num_draws)
  logits = jnp.broadcast_to(jnp.array(LOGITS), (num_draws, 5))
  drawn = sampler.sample_tokens(logits, keys, _config(top_k=4, top_p=0.9))
  frequencies = np.bincount(drawn, minlength=5) / num_draws
  # 0.4 + 0.3 + 0.15 of the 0.95 that top-k leaves do not reach 0.9 of it: the fourth stays.
  expected = _renormalized(1, 2, 3, 4)
  assert frequencies[0] == 0
  np.testing.assert_allclose(frequencies, expected, atol=4 * (0.25 / num_draws) ** 0.5)


def test_temperature_zero_takes_the_most_likely_token_whatever_the_key():
  logits = jnp.array(np.random.default_rng(0).normal(size=(6, 9)), jnp.float32)
  for seed in range(3):
    drawn = sampler.sample_tokens(
      logits, jax.random.split(jax.random.key(seed), 6), _config(temperature=0.0)
    )
    np.testing.assert_array_equal(drawn, np.argmax(logits, axis=-1))


def test_a_rows_token_depends_on_its_own_logits_and_key_alone():
  logits = jnp.array(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
  keys = jax.random.split(jax.random.key(0), 64)
  config = _config(temperature=1.3, top_k=20, top_p=0.9)
  together = np.asarray(sampler.sample_tokens(logits, keys, config))
  order = np.random.default_rng(1).permutation(64)
  np.testing.assert_array_equal(
    sampler.sample_tokens(logits[order], keys[order], config), together[order]
  )
  np.testing.assert_array_equal(
    sampler.sample_tokens(logits[5:8], keys[5:8], config), together[5:8]
  )
  other_keys = jax.random.split(jax.random.key(1), 64)
  assert np.mean(np.asarray(sampler.sample_tokens(logits, other_keys, config)) == together) < 0.5


@pytest.mark.parametrize(
  "options", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_an_option_out_of_range_is_refused(options):
  ((name, value),) = options.items()
  with pytest.raises(ValueError, match=rf"{name}={value}.*top_p in \(0, 1\]"):
    _config(**options)
