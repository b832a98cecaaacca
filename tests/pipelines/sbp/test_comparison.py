import dataclasses
import math

import numpy as np
import pytest

from selfimprove_jax.evaluation.perplexity import DocumentLosses
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.pipelines.sbp import comparison

_COUNTS = np.array([50, 100, 150, 200] * 25)
_HARDNESS = np.tile([0.4, -0.3, 0.1, -0.1], 25)


_GROUPS = [str(i) for i in range(_COUNTS.size)]


def _arm(
  name: str, loss: float, *, jitter: float = 0.0, seeds: tuple[float, ...] = (0.0,), **changes
) -> comparison.ArmResult:
  """An arm whose loss on document i is `loss` + hardness_i + jitter * (+1, -1, ...).

  In each training, that of the seed is added.
  """
  signs = np.resize([1.0, -1.0, -1.0, 1.0], _COUNTS.size)
  of_seed = np.array(seeds)[:, None]
  arm = comparison.ArmResult(
    name=name,
    label=name.upper(),
    nll_SN=(loss + _HARDNESS + jitter * signs + of_seed) * _COUNTS,
    token_counts=_COUNTS,
    byte_counts=4.0 * _COUNTS,
    groups=_GROUPS,
    train_targets=(100_000,) * len(seeds),
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


def _compare(arms, *, seed_noise: float = 1e-9, **options):
  """With an assumed noise, that of a difference between two trainings; 0 for none."""
  config = comparison.ComparisonConfig(assumed_seed_noise=seed_noise / math.sqrt(2) or None)
  return comparison.compare(arms, config=config, **options)


def _claims(result):
  return {claim["claim"]: claim["holds"] for claim in result["claims"]}


def _sentence(result, name):
  return next(claim["sentence"] for claim in result["claims"] if claim["claim"] == name)


def test_losses_and_bits_are_those_of_all_tokens_together():
  arm = _arm("baseline", 4.0)
  found = comparison.evals(arm)
  mean = arm.nll_SN.sum() / _COUNTS.sum()
  assert found["heldout_nll"]["value"] == pytest.approx(mean)
  assert found["heldout_nll"]["unit"] == "nats per token"
  assert found["bits_per_byte"]["value"] == pytest.approx(mean / 4 / math.log(2))
  assert found["bits_per_byte"]["stderr"] == pytest.approx(
    found["heldout_nll"]["stderr"] / 4 / math.log(2)
  )


def test_half_of_the_oracles_gain_is_called_half():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.75), _arm("oracle", 3.5)]
  result = _compare(arms)
  assert result["differences"]["sbp"]["value"] == pytest.approx(-0.25)
  assert result["recovered"]["sbp"]["value"] == pytest.approx(0.5)
  assert _claims(result) == {"gain_at_equal_tokens": True}
  assert "0.250 nats per token better than the baseline" in _sentence(
    result, "gain_at_equal_tokens"
  )
  assert "recovers 50%" in _sentence(result, "gain_at_equal_tokens")


def test_a_worse_arm_recovers_none_of_the_gain_and_contradicts_the_claim():
  arms = [_arm("baseline", 4.0), _arm("sbp", 4.2), _arm("oracle", 3.5)]
  result = _compare(arms, seed_noise=0.03)
  assert _claims(result) == {"gain_at_equal_tokens": False}
  assert result["recovered"]["sbp"]["value"] == pytest.approx(-0.4)
  assert "recovers none of the oracle's gain." in _sentence(result, "gain_at_equal_tokens")
  assert "worse" in result["verdict"]


def test_a_gain_over_an_arm_that_overfits_is_not_claimed():
  sbp = _arm("sbp", 3.9, best_validation=3.9, final_validation=3.9)
  overfitted = {"best_validation": 3.85, "final_validation": 4.0}
  result = _compare([_arm("baseline", 4.0, **overfitted), sbp])
  assert _claims(result) == {"gain_at_equal_tokens": None}
  assert "validation loss during training was 3.850" in _sentence(result, "gain_at_equal_tokens")
  still_worse = {**overfitted, "best_validation": 3.95}
  result = _compare([_arm("baseline", 4.0, **still_worse), sbp])
  assert _claims(result) == {"gain_at_equal_tokens": True}


def test_a_difference_within_the_seed_noise_is_a_tie():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.95, jitter=0.01), _arm("oracle", 3.5)]
  tie = _compare(arms, seed_noise=0.03)
  assert tie["differences"]["sbp"]["document_interval"][1] < 0
  assert _claims(tie) == {"gain_at_equal_tokens": None}
  sentence = _sentence(tie, "gain_at_equal_tokens")
  assert "statistically indistinguishable" in sentence
  caveats = " ".join(tie["caveats"])
  assert "0.021 nats per token of seed noise for each training, assumed" in caveats
  assert "Over documents alone the intervals of SBP against BASELINE exclude zero" in caveats
  assert "recovers no measurable part" in sentence
  assert "no measurable gain" in tie["verdict"]
  win = _compare(arms, seed_noise=0.005)
  assert _claims(win) == {"gain_at_equal_tokens": True}


def test_the_two_noises_add_in_quadrature():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.9, jitter=0.3)]
  found = _compare(arms, seed_noise=0.04)["differences"]["sbp"]
  half = (found["interval"][1] - found["interval"][0]) / 2
  assert found["stderr"] > 0.02
  assert half == pytest.approx(1.96 * math.hypot(found["stderr"], 0.04), rel=0.01)
  assert half > 1.96 * math.hypot(found["stderr"], 0.04)  # Student's t: 100 groups


def test_the_noise_of_seeds_is_measured_where_arms_are_trained_twice():
  """By hand: deviations of 0.03 and 0.01 from the means; 2 degrees of freedom."""
  arms = [
    _arm("baseline", 4.0, seeds=(-0.03, 0.03)),
    _arm("sbp", 3.95, seeds=(-0.01, 0.01)),
    _arm("oracle", 3.5),
  ]
  result = _compare(arms, seed_noise=9.0)
  sigma = math.sqrt((2 * 0.03**2 + 2 * 0.01**2) / 2)
  assert result["seed_noise"] == {
    "stderr": pytest.approx(sigma),
    "degrees": 2,
    "num_trainings": 4,
  }
  assert result["losses"]["sbp"][1] - result["losses"]["sbp"][0] == pytest.approx(0.02)
  found = result["differences"]["sbp"]
  assert found["value"] == pytest.approx(-0.05)
  assert found["seed_stderr"] == pytest.approx(sigma * math.sqrt(1 / 2 + 1 / 2))
  half = (found["interval"][1] - found["interval"][0]) / 2
  assert half == pytest.approx(4.303 * sigma, rel=0.01)  # Student's t with 2 degrees of freedom
  assert result["differences"]["oracle"]["seed_stderr"] == pytest.approx(sigma * math.sqrt(1.5))
  assert _claims(result) == {"gain_at_equal_tokens": None}
  assert "measured on 4 trainings (BASELINE, SBP) with 2 degrees" in result["caveats"][0]


def test_intervals_hold_the_truth_as_often_as_they_say():
  """Two arms of two seeds and one of one, without any difference; documents of 20 groups."""
  rng = np.random.default_rng(0)
  number_N = np.repeat(np.arange(20), 5)
  groups = [str(number) for number in number_N]
  held = 0
  for _ in range(400):
    arms = []
    for name, num in (("baseline", 2), ("sbp", 2), ("unconditional", 1)):
      of_group = 0.05 * rng.standard_normal(20)[number_N]
      arm = _arm(name, 4.0, seeds=tuple(0.02 * rng.standard_normal(num)))
      nll_SN = arm.nll_SN + of_group * _COUNTS
      arms.append(dataclasses.replace(arm, nll_SN=nll_SN, groups=groups))
    low, high = _compare(arms)["differences"]["sbp"]["interval"]
    held += low <= 0 <= high
  assert held / 400 == pytest.approx(0.95, abs=0.035)


def test_without_a_noise_measured_or_assumed_there_is_no_verdict():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.9, jitter=0.01), _arm("oracle", 3.0)]
  result = _compare(arms, seed_noise=0)
  assert _claims(result) == {"gain_at_equal_tokens": None}
  assert result["differences"]["sbp"]["outcome"] == "unknown"
  assert "each was trained once" in _sentence(result, "gain_at_equal_tokens")
  assert result["verdict"].startswith("One seed per arm: seed noise was not measured")
  assert "noise of training seeds was not measured" in result["caveats"][0]
  assert not any("not clearly better" in line for line in result["caveats"])


@pytest.mark.parametrize(
  ("draws_anew", "told"),
  [
    (True, "the tuning of the synthesizer and its samples, drawn anew for each training; not the"),
    (False, "not the synthesizer and its samples, which all trainings of an arm share, nor the"),
  ],
)
def test_the_randomness_that_the_noise_covers_is_told(draws_anew, told):
  arms = [_arm("baseline", 4.0, seeds=(0, 0.1)), _arm("sbp", 3.9, seeds=(0, 0.1))]
  assert told in _compare(arms, draws_anew=draws_anew)["caveats"][1]
  assert told not in " ".join(_compare(arms[:1], draws_anew=draws_anew)["caveats"])


def test_noise_over_documents_alone_makes_a_tie():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.95, jitter=0.6)]
  result = _compare(arms)
  assert _claims(result) == {"gain_at_equal_tokens": None}
  assert "Over documents alone" not in " ".join(result["caveats"])


def test_the_error_of_the_recovered_share_includes_the_seeds_of_three_arms():
  # The simulation draws three losses, each with its own seed noise.
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.8), _arm("oracle", 3.0)]
  found = _compare(arms, seed_noise=0.03)["recovered"]["sbp"]
  random = np.random.default_rng(0)
  noise = random.normal(0, 0.03 / math.sqrt(2), size=(3, 200_000))
  shares = (4.0 - 3.8 + noise[0] - noise[1]) / (4.0 - 3.0 + noise[0] - noise[2])
  assert found["document_stderr"] == pytest.approx(0, abs=1e-6)
  assert found["stderr"] == pytest.approx(shares.std(), rel=0.02)


def test_a_gain_of_unconditional_samples_too_is_not_due_to_conditioning():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.8), _arm("unconditional", 3.81)]
  result = _compare(arms, seed_noise=0.03)
  assert _claims(result) == {"gain_at_equal_tokens": True, "gain_over_unconditional": None}
  assert "cannot be attributed to related documents" in result["verdict"]
  better = [*arms[:2], _arm("unconditional", 3.95)]
  assert _claims(_compare(better, seed_noise=0.03))["gain_over_unconditional"] is True


def test_a_gain_may_vanish_when_tuning_and_sampling_are_counted():
  arms = [
    _arm("baseline", 4.0),
    _arm("sbp", 3.8, all_in_flops=2.5e9),
    _arm(
      "baseline_all_in", 3.7, steps=250, train_tokens=2560, train_flops=2.5e9, all_in_flops=2.5e9
    ),
  ]
  result = _compare(arms, seed_noise=0.03)
  assert _claims(result) == {"gain_at_equal_tokens": True, "gain_at_equal_flops": False}
  assert result["versus"]["baseline_all_in"]["value"] == pytest.approx(0.1)
  assert "training longer is better" in result["verdict"]
  assert "for longer still helps (BASELINE_ALL_IN: \N{MINUS SIGN}0.300" in result["caveats"][-1]


def test_an_oracle_that_is_not_better_gives_no_share():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.8), _arm("oracle", 3.99)]
  result = _compare(arms, seed_noise=0.03)
  assert result["recovered"] == {}
  assert "recovers" not in _sentence(result, "gain_at_equal_tokens")
  assert any("not clearly better" in line for line in result["caveats"])


@pytest.mark.parametrize(
  ("gap", "stderr", "holds"), [(0.2, 0.02, True), (0.018, 0.003, False), (0.06, 0.02, None)]
)
def test_the_conditioning_gap_is_judged_by_its_interval_and_the_gate(gap, stderr, holds):
  result = _compare(
    [_arm("baseline", 4.0), _arm("sbp", 4.0)],
    seed_noise=0.03,
    conditioning_gap=Estimate(gap, stderr, "nats per token", 1000),
    gate=0.05,
  )
  assert _claims(result)["synthesizer_uses_d1"] is holds


def test_different_regularization_and_overfitting_are_caveats():
  arms = [
    _arm("baseline", 4.0, best_validation=3.8, weight_decay=2.0),
    _arm("sbp", 3.8),
  ]
  caveats = " ".join(_compare(arms, seed_noise=0.03)["caveats"])
  assert "BASELINE 2 and 0; SBP 1 and 0" in caveats
  assert "BASELINE overfits" in caveats
  assert "SBP overfits" not in caveats


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"train_targets": (102_000,)}, "baseline predicted 100000, sbp 102000"),
    ({"schedule": {"peak_lr": 2e-3}}, "same schedule.*sbp"),
  ],
)
def test_unequal_compute_is_refused(change, message):
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.8, **change)]
  with pytest.raises(ValueError, match=message):
    _compare(arms, seed_noise=0.03)


def test_padding_and_one_step_make_no_compute_unequal():
  change = {"train_tokens": 1100, "steps": 103, "train_flops": 1.03e9, "train_targets": (100_900,)}
  _compare([_arm("baseline", 4.0), _arm("sbp", 3.8, **change)])


def test_an_all_in_arm_with_other_flops_is_refused():
  arms = [
    _arm("baseline", 4.0),
    _arm("sbp", 3.8, all_in_flops=2.5e9),
    _arm("baseline_all_in", 3.7, train_flops=2e9, all_in_flops=2e9),
  ]
  with pytest.raises(ValueError, match="baseline_all_in must take as many FLOPs"):
    _compare(arms, seed_noise=0.03)


def test_arms_of_different_documents_are_refused():
  other = _arm("sbp", 3.8, token_counts=_COUNTS[::-1].copy())
  with pytest.raises(ValueError, match="different documents"):
    _compare([_arm("baseline", 4.0), other], seed_noise=0.03)


def test_a_missing_baseline_and_a_repeated_arm_are_refused():
  with pytest.raises(ValueError, match="no arm is named 'baseline'"):
    _compare([_arm("sbp", 3.8)], seed_noise=0.03)
  with pytest.raises(ValueError, match="twice"):
    _compare([_arm("baseline", 4.0), _arm("baseline", 4.0)], seed_noise=0.03)


def test_the_order_of_the_arms_does_not_matter():
  arms = [_arm("baseline", 4.0), _arm("sbp", 3.75), _arm("oracle", 3.5)]
  forward = _compare(arms, seed_noise=0.03)
  backward = _compare(arms[::-1], seed_noise=0.03)
  assert forward == backward


_TRUE = np.array([10.0, 24.0, 6.0])
_RANDOM = np.array([14.0, 25.0, 9.0])
_TOKENS = np.array([5, 8, 3])


def _gap(true, random):
  losses = (
    DocumentLosses(["x", "y", "z"], ["x", "y", "z"], nll, _TOKENS, 4.0 * _TOKENS)
    for nll in (true, random)
  )
  return comparison.conditioning_gap(*losses, gate=0.1)


def test_the_conditioning_gap_is_the_cost_per_token_of_a_random_neighbor():
  found = _gap(_TRUE, _RANDOM)
  assert found["true_nll"] == pytest.approx(40 / 16)
  assert found["random_nll"] == pytest.approx(48 / 16)
  assert found["gap"]["value"] == pytest.approx(8 / 16)
  assert found["gap"]["unit"] == "nats per token"
  assert (found["gate"], found["num_pairs"]) == (0.1, 3)


def test_the_difficulty_of_a_pair_cancels_in_the_error_of_the_gap():
  harder = np.array([100.0, -3.0, 50.0])
  found = _gap(_TRUE, _RANDOM)
  shifted = _gap(_TRUE + harder, _RANDOM + harder)
  residuals = (_RANDOM - _TRUE) - 0.5 * _TOKENS
  assert found["gap"]["stderr"] == pytest.approx((1.5 * (residuals**2).sum()) ** 0.5 / 16)
  assert shifted["gap"] == pytest.approx(found["gap"])


def test_a_synthesizer_that_ignores_d1_has_no_gap():
  found = _gap(_TRUE, _TRUE.copy())
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
  gap = Estimate(0.2, 0.02, "nats per token", 30)
  assert _compare(arms, seed_noise=0.03, conditioning_gap=gap)["verdict"] == (
    "At this size, SBP beats repeating the real data for the same training tokens. "
    "SBP and training on unconditional samples from the same model are statistically "
    "indistinguishable. So the gain cannot be attributed to related documents. "
    "The synthesizer uses the document that it is given. "
    "With tuning and sampling counted, SBP and training longer are statistically indistinguishable."
  )
  alone = _compare(arms[:1], seed_noise=0.03)
  assert alone["verdict"] == "There is no SBP arm to judge."
  assert alone["claims"] == []
