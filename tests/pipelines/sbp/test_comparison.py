import dataclasses
import math

import numpy as np
import pytest

from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.pipelines.sbp import comparison

_COUNTS = np.array([50, 100, 150, 200] * 25)
_HARDNESS = np.tile([0.4, -0.3, 0.1, -0.1], 25)


def _arm(name: str, loss: float, *, jitter: float = 0.0, **changes) -> comparison.ArmResult:
  """An arm whose loss on document i is `loss` + hardness_i + jitter * (+1, -1, ...)."""
  signs = np.resize([1.0, -1.0, -1.0, 1.0], _COUNTS.size)
  arm = comparison.ArmResult(
    name=name,
    label=name.upper(),
    nll_sums=(loss + _HARDNESS + jitter * signs) * _COUNTS,
    token_counts=_COUNTS,
    byte_counts=4 * _COUNTS,
    train_tokens=1024,
    steps=100,
    schedule={"peak_lr": 1e-3},
    train_flops=1e9,
    all_in_flops=1e9,
    weight_decay=1.0,
    dropout=0.0,
    best_validation=loss,
    final_validation=loss,
  )
  return dataclasses.replace(arm, **changes)


def _claims(result):
  return {claim["claim"]: claim["holds"] for claim in result["claims"]}


def _sentence(result, name):
  return next(claim["sentence"] for claim in result["claims"] if claim["claim"] == name)


def test_losses_and_bits_are_those_of_all_tokens_together():
  arm = _arm("baseline", 4.0)
  found = comparison.evals(arm)
  mean = arm.nll_sums.sum() / _COUNTS.sum()
  assert found["heldout_nll"]["value"] == pytest.approx(mean)
  assert found["heldout_nll"]["unit"] == "nats per token"
  assert found["bits_per_byte"]["value"] == pytest.approx(mean / 4 / math.log(2))
  assert found["bits_per_byte"]["stderr"] == pytest.approx(
    found["heldout_nll"]["stderr"] / 4 / math.log(2)
  )


def test_half_of_the_oracles_gain_is_called_half():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.75), _arm("oracle", 3.5)]
  result = comparison.compare(arms, seed_noise=0.0)
  assert result["differences"]["sbp"]["value"] == pytest.approx(-0.25)
  assert result["recovered"]["sbp"]["value"] == pytest.approx(0.5)
  assert _claims(result) == {"gain_at_equal_tokens": True}
  assert "0.250 nats per token better than the baseline" in _sentence(
    result, "gain_at_equal_tokens"
  )
  assert "recovers 50%" in _sentence(result, "gain_at_equal_tokens")


def test_a_worse_arm_recovers_none_of_the_gain_and_contradicts_the_claim():
  arms = [_arm("baseline", 4.0), _arm("sbp", 4.2), _arm("oracle", 3.5)]
  result = comparison.compare(arms, seed_noise=0.03)
  assert _claims(result) == {"gain_at_equal_tokens": False}
  assert result["recovered"]["sbp"]["value"] == pytest.approx(-0.4)
  assert "recovers none of the oracle's gain." in _sentence(result, "gain_at_equal_tokens")
  assert "worse" in result["verdict"]


def test_a_gain_over_an_arm_that_overfits_is_not_claimed():
  sbp = _arm("sbp", 3.9, best_validation=3.9, final_validation=3.9)
  overfitted = {"best_validation": 3.85, "final_validation": 4.0}
  result = comparison.compare([_arm("baseline", 4.0, **overfitted), sbp], seed_noise=0.0)
  assert _claims(result) == {"gain_at_equal_tokens": None}
  assert "validation loss during training was 3.850" in _sentence(result, "gain_at_equal_tokens")
  still_worse = {**overfitted, "best_validation": 3.95}
  result = comparison.compare([_arm("baseline", 4.0, **still_worse), sbp], seed_noise=0.0)
  assert _claims(result) == {"gain_at_equal_tokens": True}


def test_a_difference_within_the_seed_noise_is_a_tie():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.95, jitter=0.01), _arm("oracle", 3.5)]
  tie = comparison.compare(arms, seed_noise=0.03)
  assert tie["differences"]["sbp"]["document_interval"][1] < 0
  assert _claims(tie) == {"gain_at_equal_tokens": None}
  sentence = _sentence(tie, "gain_at_equal_tokens")
  assert "statistically indistinguishable" in sentence
  assert "0.030 nats of training-seed noise" in sentence
  assert "over documents alone excludes zero" in sentence
  assert "recovers no measurable part" in sentence
  assert "no measurable gain" in tie["verdict"]
  win = comparison.compare(arms, seed_noise=0.005)
  assert _claims(win) == {"gain_at_equal_tokens": True}


def test_the_two_noises_add_in_quadrature():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.9, jitter=0.3)]
  found = comparison.compare(arms, seed_noise=0.04)["differences"]["sbp"]
  half = (found["interval"][1] - found["interval"][0]) / 2
  assert found["stderr"] > 0.02
  assert half == pytest.approx(1.959964 * math.hypot(found["stderr"], 0.04))


def test_noise_over_documents_alone_makes_a_tie():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.95, jitter=0.6)]
  result = comparison.compare(arms, seed_noise=0.0)
  assert _claims(result) == {"gain_at_equal_tokens": None}
  assert "over documents alone" not in _sentence(result, "gain_at_equal_tokens")


def test_the_error_of_the_recovered_share_includes_the_seeds_of_three_arms():
  # The simulation draws three losses, each with its own seed noise.
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.8), _arm("oracle", 3.0)]
  found = comparison.compare(arms, seed_noise=0.03)["recovered"]["sbp"]
  random = np.random.default_rng(0)
  noise = random.normal(0, 0.03 / math.sqrt(2), size=(3, 200_000))
  shares = (4.0 - 3.8 + noise[0] - noise[1]) / (4.0 - 3.0 + noise[0] - noise[2])
  assert found["document_stderr"] == pytest.approx(0, abs=1e-6)
  assert found["stderr"] == pytest.approx(shares.std(), rel=0.02)


def test_a_gain_of_unconditional_samples_too_is_not_due_to_conditioning():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.8), _arm("unconditional", 3.81)]
  result = comparison.compare(arms, seed_noise=0.03)
  assert _claims(result) == {"gain_at_equal_tokens": True, "gain_over_unconditional": None}
  assert "cannot be attributed to related documents" in result["verdict"]
  better = [*arms[:2], _arm("unconditional", 3.95)]
  assert _claims(comparison.compare(better, seed_noise=0.03))["gain_over_unconditional"] is True


def test_a_gain_may_vanish_when_tuning_and_sampling_are_counted():
  arms = [
    _arm("baseline", 4.0),
    _arm("sbp", 3.8, all_in_flops=2.5e9),
    _arm(
      "baseline_all_in", 3.7, steps=250, train_tokens=2560, train_flops=2.5e9, all_in_flops=2.5e9
    ),
  ]
  result = comparison.compare(arms, seed_noise=0.03)
  assert _claims(result) == {"gain_at_equal_tokens": True, "gain_at_equal_flops": False}
  assert result["versus"]["baseline_all_in"]["value"] == pytest.approx(0.1)
  assert "training longer is better" in result["verdict"]


def test_an_oracle_that_is_not_better_gives_no_share():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.8), _arm("oracle", 3.99)]
  result = comparison.compare(arms, seed_noise=0.03)
  assert result["recovered"] == {}
  assert "recovers" not in _sentence(result, "gain_at_equal_tokens")
  assert any("not clearly better" in line for line in result["caveats"])


@pytest.mark.parametrize(
  ("gap", "stderr", "holds"), [(0.2, 0.02, True), (0.018, 0.003, False), (0.06, 0.02, None)]
)
def test_the_conditioning_gap_is_judged_by_its_interval_and_the_gate(gap, stderr, holds):
  result = comparison.compare(
    [_arm("baseline", 4.0), _arm("sbp", 4.0)],
    seed_noise=0.03,
    conditioning_gap=Estimate(gap, stderr, "nats per token"),
    gate=0.05,
  )
  assert _claims(result)["synthesizer_uses_d1"] is holds


def test_different_regularization_and_overfitting_are_caveats():
  arms = [
    _arm("baseline", 4.0, best_validation=3.8, weight_decay=2.0),
    _arm("sbp", 3.8),
  ]
  caveats = " ".join(comparison.compare(arms, seed_noise=0.03)["caveats"])
  assert "BASELINE 2 and 0; SBP 1 and 0" in caveats
  assert "BASELINE overfits" in caveats
  assert "SBP overfits" not in caveats


@pytest.mark.parametrize(
  "change",
  [
    {"train_tokens": 2048},
    {"steps": 101},
    {"schedule": {"peak_lr": 2e-3}},
    {"train_flops": 2e9},
  ],
)
def test_unequal_compute_is_refused(change):
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.8, **change)]
  with pytest.raises(ValueError, match=f"{next(iter(change))}.*sbp"):
    comparison.compare(arms, seed_noise=0.03)


def test_an_all_in_arm_with_other_flops_is_refused():
  arms = [
    _arm("baseline", 4.0),
    _arm("sbp", 3.8, all_in_flops=2.5e9),
    _arm("baseline_all_in", 3.7, train_flops=2e9, all_in_flops=2e9),
  ]
  with pytest.raises(ValueError, match="baseline_all_in must take as many FLOPs"):
    comparison.compare(arms, seed_noise=0.03)


def test_arms_of_different_documents_are_refused():
  other = _arm("sbp", 3.8, token_counts=_COUNTS[::-1].copy())
  with pytest.raises(ValueError, match="different documents"):
    comparison.compare([_arm("baseline", 4.0), other], seed_noise=0.03)


def test_a_missing_baseline_a_repeated_arm_and_negative_noise_are_refused():
  with pytest.raises(ValueError, match="no arm is named 'baseline'"):
    comparison.compare([_arm("sbp", 3.8)], seed_noise=0.03)
  with pytest.raises(ValueError, match="twice"):
    comparison.compare([_arm("baseline", 4.0), _arm("baseline", 4.0)], seed_noise=0.03)
  with pytest.raises(ValueError, match=r"seed_noise=-0\.1"):
    comparison.compare([_arm("baseline", 4.0)], seed_noise=-0.1)


def test_the_order_of_the_arms_does_not_matter():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.75), _arm("oracle", 3.5)]
  forward = comparison.compare(arms, seed_noise=0.03)
  backward = comparison.compare(arms[::-1], seed_noise=0.03)
  assert forward == backward


_TRUE = np.array([10.0, 24.0, 6.0])
_RANDOM = np.array([14.0, 25.0, 9.0])
_TOKENS = np.array([5, 8, 3])


def test_the_conditioning_gap_is_the_cost_per_token_of_a_random_neighbor():
  found = comparison.conditioning_gap(_TRUE, _RANDOM, _TOKENS, gate=0.1)
  assert found["true_nll"] == pytest.approx(40 / 16)
  assert found["random_nll"] == pytest.approx(48 / 16)
  assert found["gap"]["value"] == pytest.approx(8 / 16)
  assert found["gap"]["unit"] == "nats per token"
  assert (found["gate"], found["num_pairs"]) == (0.1, 3)


def test_the_difficulty_of_a_pair_cancels_in_the_error_of_the_gap():
  harder = np.array([100.0, -3.0, 50.0])
  found = comparison.conditioning_gap(_TRUE, _RANDOM, _TOKENS, gate=0.1)
  shifted = comparison.conditioning_gap(_TRUE + harder, _RANDOM + harder, _TOKENS, gate=0.1)
  residuals = (_RANDOM - _TRUE) - 0.5 * _TOKENS
  assert found["gap"]["stderr"] == pytest.approx((1.5 * (residuals**2).sum()) ** 0.5 / 16)
  assert shifted["gap"] == pytest.approx(found["gap"])


def test_a_synthesizer_that_ignores_d1_has_no_gap():
  found = comparison.conditioning_gap(_TRUE, _TRUE.copy(), _TOKENS, gate=0.1)
  assert (found["gap"]["value"], found["gap"]["stderr"]) == (0.0, 0.0)


def test_the_verdict_sums_up_every_claim():
  arms = [
    _arm("baseline", 4.0),
    _arm("sbp", 3.8, all_in_flops=2.5e9),
    _arm("unconditional", 3.81),
    _arm(
      "baseline_all_in", 3.8, steps=250, train_tokens=2560, train_flops=2.5e9, all_in_flops=2.5e9
    ),
  ]
  gap = Estimate(0.2, 0.02, "nats per token")
  assert comparison.compare(arms, seed_noise=0.03, conditioning_gap=gap)["verdict"] == (
    "At this size, SBP beats repeating the real data for the same training tokens. "
    "SBP and training on unconditional samples from the same model are statistically "
    "indistinguishable. So the gain cannot be attributed to related documents. "
    "The synthesizer uses the document that it is given. "
    "With tuning and sampling counted, SBP and training longer are statistically indistinguishable."
  )
  alone = comparison.compare(arms[:1], seed_noise=0.03)
  assert alone["verdict"] == "There is no SBP arm to judge."
  assert alone["claims"] == []
