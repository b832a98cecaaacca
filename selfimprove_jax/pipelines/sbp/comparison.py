"""Compares the arms of an SBP run, with the noise of each difference (arXiv 2509.15248).

Two things make a difference between arms noisy. One is the draw of held-out documents, measured by
pairing the arms on documents, clustered by group. The other is the training: initialization, data
order and, where the config draws anew for each training, the synthesizer and its samples. It is
measured by training arms more than once, and pooled over the arms. A difference is one of means
over trainings; its interval has both noises, and it counts only if its 95% interval excludes zero.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from selfimprove_jax.evaluation import statistics
from selfimprove_jax.evaluation.perplexity import DocumentLosses
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.report import formatting
from selfimprove_jax.report.blocks import Number
from selfimprove_jax.runtime.config import section

BASELINE = "baseline"
_SBP, _UNCONDITIONAL = "sbp", "unconditional"
_ORACLE, _ALL_IN = "oracle", "baseline_all_in"


@section
class ComparisonConfig:
  """Configures the comparison of the arms.

  Attributes:
    assumed_seed_noise: used only where every arm is trained once, so that it cannot be measured:
      standard deviation, in nats per token, of a training's held-out loss over training seeds. With
      None such a run gives no verdict.
    targets_tolerance: arms of equal compute may differ by this share, or by one step, in the
      tokens that they predicted.
  """

  assumed_seed_noise: Annotated[float, Field(gt=0)] | None = None
  targets_tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.005


@dataclasses.dataclass(frozen=True)
class ArmResult:
  """The held-out losses of one arm, and the compute and data it was given.

  Axis letters: S trainings of the arm with different seeds, N held-out documents.

  Attributes:
    name: `baseline`, `sbp`, `unconditional`, `oracle`, `baseline_all_in`, or another.
    nll_SN: negative log-likelihood of each held-out document, in nats.
    token_counts, byte_counts: predicted tokens of each document, and its UTF-8 bytes.
    groups: group of each document.
    train_targets: tokens predicted in each training, which is what arms must share.
    train_tokens, steps, train_flops: of the first training; padding is not in `train_targets`, but
      is in these.
    schedule: other settings that arms must share, such as learning rates, batch and row length.
    all_in_flops: `train_flops` plus those of every stage the arm needs: seed pretraining,
      embedding, synthesizer tuning, sampling.
    best_validation, final_validation: validation loss in nats per token, lowest and at the end of
      the first training.
  """

  name: str
  label: str
  nll_SN: Float[np.ndarray, "S N"]
  token_counts: Int[np.ndarray, "N"]
  byte_counts: Float[np.ndarray, "N"]
  groups: Sequence[str]
  train_targets: tuple[int, ...]
  train_tokens: int
  steps: int
  schedule: Mapping[str, Any]
  train_flops: float | int
  all_in_flops: float | int
  weight_decay: float | int
  dropout: float | int
  best_validation: float
  final_validation: float

  @property
  def mean_nll(self) -> Float[np.ndarray, "N"]:
    """The mean over trainings."""
    return self.nll_SN.mean(axis=0)

  @property
  def num_seeds(self) -> int:
    return len(self.nll_SN)

  @property
  def losses(self) -> list[float]:
    """Nats per token of each training."""
    return (self.nll_SN.sum(axis=1) / self.token_counts.sum()).tolist()

  def overfits(self, noise: "SeedNoise") -> bool:
    """Tells whether the validation loss rose by more than noise before training ended."""
    return self.final_validation - self.best_validation > max(math.sqrt(2) * noise.stderr, 0.01)


@dataclasses.dataclass(frozen=True)
class SeedNoise:
  """How much a training's held-out loss varies with its seed.

  Attributes:
    stderr: standard deviation over seeds, in nats per token; 0 if nothing is known of it.
    degrees: degrees of freedom of `stderr`; 0 if it is not measured.
    num_trainings: trainings that it was measured on.
  """

  stderr: float
  degrees: int
  num_trainings: int

  @property
  def is_known(self) -> bool:
    """Whether it is measured or assumed; otherwise no difference can be told from the seed's."""
    return bool(self.degrees or self.stderr)


def measure_seed_noise(arms: Sequence[ArmResult], *, assumed: float | int | None) -> SeedNoise:
  """Pools the variance over seeds of all arms that were trained more than once."""
  repeated = [np.array(arm.losses) for arm in arms if arm.num_seeds > 1]
  degrees = sum(len(losses) - 1 for losses in repeated)
  if not degrees:
    return SeedNoise(float(assumed or 0), 0, 0)
  squares = sum(float(((losses - losses.mean()) ** 2).sum()) for losses in repeated)
  return SeedNoise(math.sqrt(squares / degrees), degrees, sum(map(len, repeated)))


def evals(arm: ArmResult) -> dict[str, dict[str, Any]]:
  """Estimates an arm's held-out nats per token and bits per byte; errors are over documents."""
  of = {"groups": arm.groups}
  return {
    "heldout_nll": statistics.weighted_mean(arm.mean_nll, arm.token_counts, **of).to_dict(),
    "bits_per_byte": statistics.bits_per_byte(arm.mean_nll, arm.byte_counts, **of).to_dict(),
  }


def conditioning_gap(
  true: DocumentLosses, random: DocumentLosses, *, gate: float
) -> dict[str, Any]:
  """Estimates how much higher the NLL of d2 is after a random d1 than after its true neighbor d1.

  A synthesizer without a gap writes unconditional samples, so SBP cannot gain more than those do.
  The SBP paper does not report this number; it reports the relevance of pairs instead.

  Args:
    true: losses of held-out d2s after their true neighbors; their groups are those of d2.
    random: losses of the same d2s, in the same order, after a random d1.
    gate: nats per token below which the report warns.
  """
  counts, of = true.token_counts, {"groups": true.groups}
  gap = statistics.paired_difference(random.nll_sums, true.nll_sums, counts, **of)
  return {
    "true_nll": statistics.weighted_mean(true.nll_sums, counts, **of).value,
    "random_nll": statistics.weighted_mean(random.nll_sums, counts, **of).value,
    "gap": gap.to_dict(),
    "gate": gate,
    "num_pairs": len(counts),
  }


def compare(
  arms: Sequence[ArmResult],
  *,
  config: ComparisonConfig,
  draws_anew: bool = False,
  conditioning_gap: Estimate | None = None,
  gate: float | int = 0.05,
) -> dict[str, Any]:
  """Compares the arms, and derives the claims that the differences support.

  Args:
    arms: `baseline` is required; the others add the claims that need them. All but
      `baseline_all_in`, which repeats real data until its FLOPs equal SBP's all-in FLOPs, must
      have had equal compute.
    draws_anew: each further training of an arm had synthesizers and samples of its own.
    gate: the claim that the synthesizer uses d1 needs a gap above this, in nats per token.

  Returns:
    JSON-able: `evals` (arm -> measure -> estimate), `losses` (arm -> nats per token of each
    training), `seed_noise`, `differences` (arm -> its paired difference to the baseline), `versus`
    (the differences of `sbp` to `unconditional` and to `baseline_all_in`, by the name of the other
    arm), `recovered` (arm -> share of the oracle's gain; empty if the oracle has none), `claims`,
    `caveats`, `verdict`. A difference is first minus second, so a negative one favors the first.
    Its `stderr` and `document_interval` are over documents alone; its 95% `interval` includes the
    seed noise and decides the `outcome`: better, worse, tie, or unknown, if it excludes zero but
    nothing is known of the seed noise. A claim's `holds` is None if the outcome is a tie or
    unknown, if the other arm was as good at its best during training, or if the gap's interval
    contains the gate.

  Raises:
    ValueError: an arm is missing or given twice, the arms were evaluated on different documents, or
      their compute is not equal.
  """
  by_name = {arm.name: arm for arm in arms}
  _check(arms, by_name, config.targets_tolerance)
  noise = measure_seed_noise(arms, assumed=config.assumed_seed_noise)
  baseline, oracle = by_name[BASELINE], by_name.get(_ORACLE)

  def difference(first: str, second: str) -> dict[str, Any]:
    return _difference(by_name[first], by_name[second], noise)

  differences = {name: difference(name, BASELINE) for name in by_name if name != BASELINE}
  shared = [arm for arm in arms if arm.name not in (BASELINE, _ORACLE, _ALL_IN)]
  recovered = {}
  if oracle and differences[_ORACLE]["outcome"] == "better":
    shares = {arm.name: _recovered(baseline, arm, oracle, noise) for arm in shared}
    recovered = {name: share for name, share in shares.items() if share}
  versus, claims = {}, []
  if _SBP in by_name:
    versus = {o: difference(_SBP, o) for o in (_UNCONDITIONAL, _ALL_IN) if o in by_name}
    found = {BASELINE: differences[_SBP], **versus}
    claims = _claims(found, recovered.get(_SBP), by_name, noise)
  if conditioning_gap is not None:
    claims.append(_gap_claim(conditioning_gap, gate))
  caveats = _caveats(arms, noise, [*differences.values(), *versus.values()], draws_anew)
  if oracle and shared and not recovered and noise.is_known:
    caveats.append(
      f"{oracle.label} is not clearly better than {baseline.label}, so shares of its gain are not "
      "reported."
    )
  return {
    "baseline": BASELINE,
    "oracle": oracle and _ORACLE,
    "seed_noise": dataclasses.asdict(noise),
    "targets_tolerance": config.targets_tolerance,
    "losses": {arm.name: arm.losses for arm in arms},
    "num_groups": len(set(baseline.groups)),
    "num_documents": int(baseline.token_counts.size),
    "num_tokens": int(baseline.token_counts.sum()),
    "evals": {arm.name: evals(arm) for arm in arms},
    "differences": differences,
    "versus": versus,
    "recovered": recovered,
    "claims": claims,
    "caveats": caveats,
    "verdict": _verdict({claim["claim"]: claim["holds"] for claim in claims}, noise),
  }


def _check(
  arms: Sequence[ArmResult], by_name: Mapping[str, ArmResult], targets_tolerance: float
) -> None:
  if len(by_name) != len(arms):
    raise ValueError(f"an arm is given twice: {[arm.name for arm in arms]}")
  if BASELINE not in by_name:
    raise ValueError(f"no arm is named {BASELINE!r}; there are {sorted(by_name)}")
  first = by_name[BASELINE]
  if len(set(first.groups)) < 2:
    raise ValueError(
      f"the {first.token_counts.size} held-out documents are of one group, which allows no "
      "interval; hold out more groups (corpus.split.test_fraction) in a new workdir"
    )
  for arm in arms:
    if not (
      np.array_equal(arm.token_counts, first.token_counts)
      and np.array_equal(arm.byte_counts, first.byte_counts)
      and arm.nll_SN.shape[1:] == first.nll_SN.shape[1:]
    ):
      raise ValueError(f"{arm.name} and {first.name} were evaluated on different documents")
    if arm.name == _ALL_IN:
      continue
    if arm.schedule != first.schedule:
      raise ValueError(
        f"arms of equal compute must have the same schedule: {first.name} has "
        f"{first.schedule!r}, {arm.name} has {arm.schedule!r}"
      )
    expected = first.train_targets[0]
    tolerance = max(targets_tolerance * expected, expected / first.steps)
    for targets in arm.train_targets:
      if abs(targets - expected) > tolerance:
        raise ValueError(
          f"arms of equal compute must have predicted equally many tokens, within "
          f"{targets_tolerance:.1%} or one step: {first.name} predicted {expected}, {arm.name} "
          f"{targets}"
        )
  if _SBP in by_name and _ALL_IN in by_name:
    sbp, all_in = by_name[_SBP], by_name[_ALL_IN]
    step = all_in.train_flops / all_in.steps
    if abs(sbp.all_in_flops - all_in.all_in_flops) > max(step, 0.02 * sbp.all_in_flops):
      raise ValueError(
        f"{_ALL_IN} must take as many FLOPs as {_SBP} took all-in, within 2%: "
        f"{all_in.all_in_flops:.4g} against {sbp.all_in_flops:.4g}"
      )


def _difference(first: ArmResult, second: ArmResult, noise: SeedNoise) -> dict[str, Any]:
  paired = statistics.paired_difference(
    first.mean_nll, second.mean_nll, first.token_counts, groups=first.groups
  )
  # The noise of a mean over trainings, of either arm.
  of_seeds = noise.stderr * math.sqrt(1 / first.num_seeds + 1 / second.num_seeds)
  interval = _interval(paired, of_seeds, noise.degrees)
  outcome = "tie"
  if _excludes_zero(interval):
    outcome = "unknown" if not noise.is_known else "better" if paired.value < 0 else "worse"
  return {
    "first": first.name,
    "second": second.name,
    **paired.to_dict(),
    "seed_stderr": of_seeds,
    "document_interval": list(paired.interval95),
    "interval": interval,
    "outcome": outcome,
  }


def _recovered(
  baseline: ArmResult, arm: ArmResult, oracle: ArmResult, noise: SeedNoise
) -> dict[str, Any] | None:
  """Estimates the share of the oracle's gain; seed noise enters by the delta method.

  The share is (b - a) / (b - o). With independent seed noise on each of the three losses, its
  variance is (var a + (1 - share)^2 var b + share^2 var o) / (b - o)^2.
  """
  of = {"groups": arm.groups}
  share = statistics.recovered_share(baseline.mean_nll, arm.mean_nll, oracle.mean_nll, **of)
  if share is None:
    return None
  gain = statistics.paired_difference(
    baseline.mean_nll, oracle.mean_nll, baseline.token_counts, **of
  )
  weights = (1 / arm.num_seeds, (1 - share.value) ** 2 / baseline.num_seeds)
  of_seeds = math.sqrt(sum(weights) + share.value**2 / oracle.num_seeds)
  of_seeds *= noise.stderr / gain.value
  return {
    "value": share.value,
    "stderr": math.hypot(share.stderr, of_seeds),
    "document_stderr": share.stderr,
    "interval": _interval(share, of_seeds, noise.degrees),
    "unit": share.unit,
    "num_groups": share.num_groups,
  }


def _interval(estimate: Estimate, seed_stderr: float, seed_degrees: int) -> list[float]:
  """Returns the 95% interval with the noise of seeds, an independent one, in quadrature.

  The degrees of freedom of the sum of both variances are Welch and Satterthwaite's. An assumed
  noise counts as known.
  """
  documents, seeds = estimate.stderr**2, seed_stderr**2
  if not documents + seeds:
    return [estimate.value, estimate.value]
  spread = documents**2 / (estimate.num_groups - 1)
  spread += seeds**2 / seed_degrees if seed_degrees else 0.0
  degrees = (documents + seeds) ** 2 / spread if spread else math.inf
  return list(statistics.interval95(estimate.value, math.sqrt(documents + seeds), degrees))


# Claim -> the arm that SBP is compared with, its name in the sentence, the start of the sentence.
_CLAIMS = {
  "gain_at_equal_tokens": (BASELINE, "the baseline", "At equal training tokens, "),
  "gain_over_unconditional": (
    _UNCONDITIONAL,
    "the arm trained on unconditional samples from the same model",
    "",
  ),
  "gain_at_equal_flops": (
    _ALL_IN,
    "the baseline trained longer",
    "At equal all-in FLOPs, which include tuning and sampling, ",
  ),
}


def _claims(
  differences: Mapping[str, Mapping[str, Any]],
  share: Mapping[str, Any] | None,
  arms: Mapping[str, ArmResult],
  noise: SeedNoise,
) -> list[dict[str, Any]]:
  """Derives the claims about SBP from its differences, by the name of the other arm."""
  sbp, claims = arms[_SBP], []
  for name, (second, other, start) in _CLAIMS.items():
    if second not in differences:
      continue
    outcome = differences[second]["outcome"]
    holds = {"better": True, "worse": False}.get(outcome)
    sentence = start + _outcome_text(differences[second], sbp.label, other)
    if second == BASELINE and share:
      sentence += f" {sbp.label} recovers {_share_text(share, outcome)} of the oracle's gain."
    if second == _UNCONDITIONAL and not holds:
      sentence += " So no gain can be attributed to conditioning on a related document."
    best, sbps_best = arms[second].best_validation, sbp.best_validation
    if holds and best <= sbps_best and arms[second].overfits(noise):
      # Early stopping could have given the other arm the same loss.
      holds = None
      sentence += (
        f" But {other} overfits: its best validation loss during training was {best:.3f}, "
        f"{sbp.label}'s was {sbps_best:.3f}."
      )
    claims.append({"claim": name, "holds": holds, "sentence": sentence})
  return claims


def _share_text(share: Mapping[str, Any], outcome: str) -> str:
  if outcome != "better":
    return "none" if outcome == "worse" else "no measurable part"
  written = formatting.text(Number(share["value"], share["stderr"], form="percent"))
  return f"{written} (standard error)"


def _outcome_text(difference: Mapping[str, Any], first: str, second: str) -> str:
  """Writes a difference as a sentence, with its interval."""
  low, high = difference["interval"]
  if difference["outcome"] == "unknown":
    return (
      f"{first} and {second} differ by {formatting.signed(difference['value'])} nats per token "
      f"(95% interval over documents {formatting.interval((low, high))}), but each was trained "
      "once: whether another seed would give the same sign was not measured."
    )
  if difference["outcome"] != "tie":
    if high < 0:
      low, high = -high, -low
    return (
      f"{first} is {abs(difference['value']):.3f} nats per token {difference['outcome']} than "
      f"{second} (95% interval {low:.3f} to {high:.3f})."
    )
  return (
    f"{first} and {second} are statistically indistinguishable: difference "
    f"{formatting.signed(difference['value'])} nats per token, 95% interval "
    f"{formatting.interval((low, high))}."
  )


def _gap_claim(gap: Estimate, gate: float) -> dict[str, Any]:
  low, high = gap.interval95
  holds = True if low > gate else False if high < gate else None
  text = {
    True: "The synthesizer uses d1",
    False: "The synthesizer makes almost no use of d1",
    None: "It is undecided whether the synthesizer uses d1",
  }[holds]
  sentence = (
    f"{text}: a random d1 in place of the true neighbor costs {formatting.signed(gap.value)} nats "
    f"per token of d2 (95% interval {formatting.interval((low, high))} over pairs in "
    f"{gap.num_groups} groups; the gate is {gate:g})."
  )
  return {"claim": "synthesizer_uses_d1", "holds": holds, "sentence": sentence}


def _caveats(
  arms: Sequence[ArmResult],
  noise: SeedNoise,
  differences: Sequence[Mapping[str, Any]],
  draws_anew: bool,
) -> list[str]:
  lines = [_noise_text(arms, noise)]
  if noise.degrees and len(arms) > 1:
    lines.append(_covered_text(draws_anew))
  labels = {arm.name: arm.label for arm in arms}
  narrow = [
    f"{labels[found['first']]} against {labels[found['second']]}"
    for found in differences
    if found["outcome"] == "tie" and _excludes_zero(found["document_interval"])
  ]
  if narrow:
    lines.append(
      f"Over documents alone the intervals of {'; '.join(narrow)} exclude zero; the noise of the "
      "training seeds widens them to include it."
    )
  if len({(arm.weight_decay, arm.dropout) for arm in arms}) > 1:
    each = "; ".join(f"{arm.label} {arm.weight_decay:g} and {arm.dropout:g}" for arm in arms)
    lines.append(f"Arms differ in weight decay and dropout: {each}.")
  lines += [
    f"{arm.label} overfits: its validation loss was {arm.best_validation:.3f} at its best and "
    f"{arm.final_validation:.3f} at the end. Part of a gain over it may be early stopping."
    for arm in arms
    if arm.overfits(noise)
  ]
  lines += [
    f"Repeating the data for longer still helps ({labels[_ALL_IN]}: "
    f"{formatting.signed(found['value'])} nats per token): the arms are limited by the length of "
    "training and not by the data alone, so text in the place of real data costs more than where "
    "data are scarce."
    for found in differences
    if (found["first"], found["second"], found["outcome"]) == (_ALL_IN, BASELINE, "better")
  ]
  return lines


def _noise_text(arms: Sequence[ArmResult], noise: SeedNoise) -> str:
  if noise.degrees:
    repeated = ", ".join(arm.label for arm in arms if arm.num_seeds > 1)
    return (
      f"Intervals include the noise of training seeds, {noise.stderr:.3f} nats per token for one "
      f"training, measured on {noise.num_trainings} trainings ({repeated}) with {noise.degrees} "
      "degrees of freedom."
    )
  if noise.stderr:
    return (
      f"One training per arm: every interval includes {noise.stderr:.3f} nats per token of seed "
      "noise for each training, assumed and not measured here."
    )
  return (
    "One training per arm: the noise of training seeds was not measured, and intervals are over "
    "documents alone. Train arms more than once (arms.NAME.num_seeds), or give "
    "comparison.assumed_seed_noise."
  )


def _covered_text(draws_anew: bool) -> str:
  """Tells which randomness the seed noise includes."""
  text = "It includes initialization and the order of the data"
  if draws_anew:
    text += ", and the tuning of the synthesizer and its samples, drawn anew for each training; not"
  else:
    text += "; not the synthesizer and its samples, which all trainings of an arm share, nor"
  return f"{text} the seed model, the tokenizer and the choice of unique text, drawn once."


def _excludes_zero(interval: Sequence[float]) -> bool:
  return interval[0] > 0 or interval[1] < 0


# The sentences of the verdict, by claim and by whether it holds.
_VERDICTS: dict[str, dict[bool | None, str]] = {
  "gain_at_equal_tokens": {
    True: "At this size, SBP beats repeating the real data for the same training tokens.",
    False: "At this size, SBP is worse than repeating the real data for the same training tokens.",
    None: "At this size, SBP shows no measurable gain over repeating the real data.",
  },
  "gain_over_unconditional": {
    True: "SBP beats training on unconditional samples from the same model.",
    False: "SBP is worse than training on unconditional samples from the same model.",
    None: "SBP and training on unconditional samples from the same model are statistically "
    "indistinguishable.",
  },
  "synthesizer_uses_d1": {
    True: "The synthesizer uses the document that it is given.",
    False: "The synthesizer makes almost no use of the document that it is given.",
    None: "It is undecided whether the synthesizer uses the document that it is given.",
  },
  "gain_at_equal_flops": {
    True: "With tuning and sampling counted, SBP beats training longer.",
    False: "With tuning and sampling counted, training longer is better.",
    None: "With tuning and sampling counted, SBP and training longer are statistically "
    "indistinguishable.",
  },
}


def _verdict(holds: Mapping[str, bool | None], noise: SeedNoise) -> str:
  """Sums up the claims in one paragraph."""
  if "gain_at_equal_tokens" not in holds:
    return "There is no SBP arm to judge."
  if not noise.is_known:
    return "One seed per arm: seed noise was not measured, so there is no verdict on gains."
  parts = [sentences[holds[claim]] for claim, sentences in _VERDICTS.items() if claim in holds]
  if holds["gain_at_equal_tokens"] and not holds.get("gain_over_unconditional", True):
    parts.insert(2, "So the gain cannot be attributed to related documents.")
  return " ".join(parts)
