"""Compares the arms of an SBP run, with the noise of each difference (arXiv 2509.15248).

A difference between two arms has two kinds of noise: the draw of held-out documents, measured here
by pairing the arms on documents, and the training seed (initialization and data order), which one
seed per arm cannot measure. Its size is therefore given: `ComparisonConfig.seed_noise`. Both enter
every interval in quadrature, and a difference counts only where the 95% interval excludes zero.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Float64, Int, Int64
from pydantic import Field

from selfimprove_jax.evaluation import statistics
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.report import formatting
from selfimprove_jax.report.report import Number
from selfimprove_jax.runtime.config import section

_BASELINE, _SBP, _UNCONDITIONAL = "baseline", "sbp", "unconditional"
_ORACLE, _ALL_IN = "oracle", "baseline_all_in"


@section
class ComparisonConfig:
  """Configures the comparison of the arms.

  Attributes:
    seed_noise: standard deviation, in nats per token, of the difference between two arms that
      differ only in their training seed; 0.03 at half a million parameters, in a prototype.
  """

  seed_noise: Annotated[float, Field(ge=0)]


@dataclasses.dataclass(frozen=True)
class ArmResult:
  """The held-out losses of one trained arm, and the compute and data it was given.

  Attributes:
    name: `baseline`, `sbp`, `unconditional`, `oracle`, `baseline_all_in`, or another.
    label: the name shown to readers.
    nll_sums: negative log-likelihood of each held-out document, in nats.
    token_counts: predicted tokens of each document.
    byte_counts: UTF-8 bytes of those tokens.
    train_tokens: tokens of the arm's own training.
    steps: optimizer steps of the arm's own training.
    schedule: other settings that arms must share: learning rates, batch, row length, seed,
      parameters.
    train_flops: FLOPs of the arm's own training.
    all_in_flops: `train_flops` and those of the stages that the arm needs: seed pretraining,
      embedding, synthesizer tuning, sampling.
    weight_decay: the arm's own; arms may differ.
    dropout: the arm's own; arms may differ.
    best_validation: lowest validation loss during training, in nats per token.
    final_validation: validation loss at the end, in nats per token.
  """

  name: str
  label: str
  nll_sums: Float[np.ndarray, "documents"]
  token_counts: Int[np.ndarray, "documents"]
  byte_counts: Int[np.ndarray, "documents"]
  train_tokens: int
  steps: int
  schedule: Mapping[str, Any]
  train_flops: float | int
  all_in_flops: float | int
  weight_decay: float | int
  dropout: float | int
  best_validation: float
  final_validation: float


def check_equal_compute(arms: Sequence[ArmResult]) -> None:
  """Checks that arms had the same training tokens, steps, schedule and FLOPs.

  Raises:
    ValueError: they differ; the message names the first arm that does, and the field.
  """
  first = arms[0]
  for arm in arms[1:]:
    for field in ("train_tokens", "steps", "schedule", "train_flops"):
      ours, theirs = getattr(first, field), getattr(arm, field)
      if ours != theirs:
        raise ValueError(
          f"arms of equal compute must have the same {field}: {first.name} has {ours!r}, "
          f"{arm.name} has {theirs!r}"
        )


def evals(arm: ArmResult) -> dict[str, dict[str, Any]]:
  """Estimates an arm's held-out nats per token and bits per byte; errors are over documents."""
  return {
    "heldout_nll": statistics.weighted_mean(arm.nll_sums, arm.token_counts).to_dict(),
    "bits_per_byte": statistics.bits_per_byte(arm.nll_sums, arm.byte_counts).to_dict(),
  }


def conditioning_gap(
  true_nll_sums: Float64[np.ndarray, "N"],
  random_nll_sums: Float64[np.ndarray, "N"],
  token_counts: Int64[np.ndarray, "N"],
  *,
  gate: float,
) -> dict[str, Any]:
  """Estimates how much higher the NLL of d2 is after a random d1 than after its true neighbor d1.

  A synthesizer without a gap writes unconditional samples, so SBP cannot gain more than those do.
  The SBP paper does not report this number; it reports the relevance of pairs instead.

  Args:
    true_nll_sums: nats of each held-out d2 after its true neighbor.
    random_nll_sums: nats of the same d2, in the same order, after a random d1.
    token_counts: predicted tokens of each d2.
    gate: nats per token below which the report warns.
  """
  gap = statistics.paired_difference(random_nll_sums, true_nll_sums, token_counts)
  return {
    "true_nll": statistics.weighted_mean(true_nll_sums, token_counts).value,
    "random_nll": statistics.weighted_mean(random_nll_sums, token_counts).value,
    "gap": gap.to_dict(),
    "gate": gate,
    "num_pairs": len(token_counts),
  }


def compare(
  arms: Sequence[ArmResult],
  *,
  seed_noise: float | int,
  conditioning_gap: Estimate | None = None,
  gate: float | int = 0.05,
) -> dict[str, Any]:
  """Compares the arms, and derives the claims that the differences support.

  Args:
    arms: `baseline` is required; the others add the claims that need them. All but
      `baseline_all_in`, which repeats real data for as many FLOPs as `sbp` took all-in, must have
      had equal compute.
    seed_noise: see `ComparisonConfig`.
    conditioning_gap: the gap that `conditioning_gap` estimates.
    gate: the gap, in nats per token, that must be exceeded to claim that the synthesizer uses d1.

  Returns:
    JSON-able: `evals` (arm -> measure -> value, stderr, unit), `differences` (arm -> its paired
    difference to the baseline), `versus` (the differences of `sbp` to `unconditional` and to
    `baseline_all_in`, by the name of the other arm), `recovered` (arm -> share of the oracle's
    gain; empty where the oracle shows none), `claims`, `caveats`, `verdict`. A difference is first
    minus second, so a negative one favors the first. Its `stderr` and `document_interval` are over
    documents alone; its 95% `interval` includes the seed noise and decides the `outcome`: better,
    worse or tie. A claim's `holds` is None where the outcome is a tie, where the other arm was as
    good at its best during training, or where the gap's interval contains the gate.

  Raises:
    ValueError: `seed_noise` is negative, an arm is missing or given twice, the arms were evaluated
      on different documents, or their compute is not equal.
  """
  by_name = {arm.name: arm for arm in arms}
  _check(arms, by_name, seed_noise)
  baseline = by_name[_BASELINE]

  def difference(first: str, second: str) -> dict[str, Any]:
    return _difference(by_name[first], by_name[second], seed_noise=seed_noise)

  result: dict[str, Any] = {
    "baseline": _BASELINE,
    "oracle": _ORACLE if _ORACLE in by_name else None,
    "seed_noise": seed_noise,
    "num_documents": int(baseline.token_counts.size),
    "num_tokens": int(baseline.token_counts.sum()),
    "evals": {arm.name: evals(arm) for arm in arms},
    "differences": {
      arm.name: difference(arm.name, _BASELINE) for arm in arms if arm.name != _BASELINE
    },
    "versus": {},
    "recovered": {},
    "claims": [],
  }
  shared = [arm for arm in arms if arm.name not in (_BASELINE, _ORACLE, _ALL_IN)]
  if _ORACLE in by_name and result["differences"][_ORACLE]["outcome"] == "better":
    for arm in shared:
      share = _recovered(baseline, arm, by_name[_ORACLE], seed_noise=seed_noise)
      result["recovered"] |= {arm.name: share} if share else {}
  if _SBP in by_name:
    others = [other for other in (_UNCONDITIONAL, _ALL_IN) if other in by_name]
    result["versus"] = {other: difference(_SBP, other) for other in others}
    result["claims"] = _claims(result, by_name)
  if conditioning_gap is not None:
    result["claims"].append(_gap_claim(conditioning_gap, gate))
  result["caveats"] = _caveats(result, by_name)
  if _ORACLE in by_name and shared and not result["recovered"]:
    result["caveats"].append(
      f"{by_name[_ORACLE].label} is not clearly better than {baseline.label}, so shares of its "
      "gain are not reported."
    )
  result["verdict"] = _verdict({claim["claim"]: claim["holds"] for claim in result["claims"]})
  return result


def _check(
  arms: Sequence[ArmResult], by_name: Mapping[str, ArmResult], seed_noise: float | int
) -> None:
  if not seed_noise >= 0:
    raise ValueError(f"seed_noise={seed_noise} is a standard deviation; it must be at least 0")
  if len(by_name) != len(arms):
    raise ValueError(f"an arm is given twice: {[arm.name for arm in arms]}")
  if _BASELINE not in by_name:
    raise ValueError(f"no arm is named {_BASELINE!r}; there are {sorted(by_name)}")
  first = by_name[_BASELINE]
  for arm in arms:
    if not (
      np.array_equal(arm.token_counts, first.token_counts)
      and np.array_equal(arm.byte_counts, first.byte_counts)
      and arm.nll_sums.shape == first.nll_sums.shape
    ):
      raise ValueError(f"{arm.name} and {first.name} were evaluated on different documents")
  check_equal_compute([arm for arm in arms if arm.name != _ALL_IN])
  if _SBP in by_name and _ALL_IN in by_name:
    _check_equal_all_in(by_name[_SBP], by_name[_ALL_IN])


def _check_equal_all_in(sbp: ArmResult, all_in: ArmResult) -> None:
  step = all_in.train_flops / all_in.steps
  if abs(sbp.all_in_flops - all_in.all_in_flops) > max(step, 0.01 * sbp.all_in_flops):
    raise ValueError(
      f"{all_in.name} must take as many FLOPs as {sbp.name} took all-in, within one step: "
      f"{all_in.all_in_flops:.4g} against {sbp.all_in_flops:.4g}"
    )


def _difference(first: ArmResult, second: ArmResult, *, seed_noise: float | int) -> dict[str, Any]:
  paired = statistics.paired_difference(first.nll_sums, second.nll_sums, first.token_counts)
  interval = _interval(paired, seed_noise)
  outcome = "better" if interval[1] < 0 else "worse" if interval[0] > 0 else "tie"
  return {
    "first": first.name,
    "second": second.name,
    "value": paired.value,
    "stderr": paired.stderr,
    "unit": paired.unit,
    "document_interval": list(paired.interval95),
    "interval": interval,
    "outcome": outcome,
  }


def _recovered(
  baseline: ArmResult, arm: ArmResult, oracle: ArmResult, *, seed_noise: float | int
) -> dict[str, Any] | None:
  """Estimates the share of the oracle's gain; seed noise enters by the delta method.

  The share is (b - a) / (b - o). With independent seed noise of variance seed_noise^2 / 2 on each
  of the three losses, its variance is that times (1 + (1 - share)^2 + share^2) / (b - o)^2.
  """
  share = statistics.recovered_share(baseline.nll_sums, arm.nll_sums, oracle.nll_sums)
  if share is None:
    return None
  gain = statistics.paired_difference(baseline.nll_sums, oracle.nll_sums, baseline.token_counts)
  seeds = math.sqrt((1 + (1 - share.value) ** 2 + share.value**2) / 2) * seed_noise / gain.value
  return {
    "value": share.value,
    "stderr": math.hypot(share.stderr, seeds),
    "document_stderr": share.stderr,
    "interval": _interval(share, seeds),
    "unit": share.unit,
  }


def _interval(estimate: Estimate, noise: float | int) -> list[float]:
  """Returns the 95% interval, with a second noise of that standard deviation in quadrature."""
  both = math.hypot(estimate.stderr, noise)
  return list(dataclasses.replace(estimate, stderr=both).interval95)


def _claims(result: Mapping[str, Any], arms: Mapping[str, ArmResult]) -> list[dict[str, Any]]:
  """Derives the claims about SBP from its differences to the other arms."""
  seed_noise, label = result["seed_noise"], arms[_SBP].label

  def claim(
    name: str, difference: Mapping[str, Any], other: str, before: str = "", after: str = ""
  ) -> dict[str, Any]:
    holds = {"better": True, "worse": False, "tie": None}[difference["outcome"]]
    sentence = before + _outcome_text(difference, label, other, seed_noise) + after
    second = arms[difference["second"]]
    if holds and _was_as_good(second, arms[_SBP], seed_noise):
      # A gain over an arm that was as good earlier in its training could be had by early stopping.
      holds = None
      sentence += (
        f" But {other} overfits: its best validation loss during training was "
        f"{second.best_validation:.3f}, {label}'s was {arms[_SBP].best_validation:.3f}."
      )
    return {"claim": name, "holds": holds, "sentence": sentence}

  gain = result["differences"][_SBP]
  share = _share_text(label, result["recovered"].get(_SBP), gain["outcome"])
  claims = [
    claim("gain_at_equal_tokens", gain, "the baseline", "At equal training tokens, ", share)
  ]
  if control := result["versus"].get(_UNCONDITIONAL):
    claims.append(
      claim(
        "gain_over_unconditional",
        control,
        "the arm trained on unconditional samples from the same model",
        after=""
        if control["outcome"] == "better"
        else " So no gain can be attributed to conditioning on a related document.",
      )
    )
  if costly := result["versus"].get(_ALL_IN):
    claims.append(
      claim(
        "gain_at_equal_flops",
        costly,
        "the baseline trained longer",
        "At equal all-in FLOPs, which include tuning and sampling, ",
      )
    )
  return claims


def _share_text(label: str, share: Mapping[str, Any] | None, outcome: str) -> str:
  if share is None:
    return ""
  if outcome == "better":
    written = formatting.text(Number(share["value"], share["stderr"], form="percent"))
    return f" {label} recovers {written} (standard error) of the oracle's gain."
  part = "none" if outcome == "worse" else "no measurable part"
  return f" {label} recovers {part} of the oracle's gain."


def _was_as_good(arm: ArmResult, sbp: ArmResult, seed_noise: float | int) -> bool:
  return arm.best_validation <= sbp.best_validation and _overfits(arm, seed_noise)


def _overfits(arm: ArmResult, seed_noise: float | int) -> bool:
  return arm.final_validation - arm.best_validation > max(seed_noise, 0.01)


def _outcome_text(
  difference: Mapping[str, Any], first: str, second: str, seed_noise: float | int
) -> str:
  """Writes a difference as a sentence, with its interval and the noise in it."""
  low, high = difference["interval"]
  noise = f", including {seed_noise:.3f} nats of training-seed noise" if seed_noise else ""
  if difference["outcome"] == "tie":
    text = (
      f"{first} and {second} are statistically indistinguishable: difference "
      f"{formatting.signed(difference['value'])} nats per token, 95% interval "
      f"{formatting.interval((low, high))}{noise}."
    )
    low_documents, high_documents = difference["document_interval"]
    if low_documents > 0 or high_documents < 0:
      text += (
        " The interval over documents alone excludes zero; the noise of a single training seed per "
        "arm widens it to include zero."
      )
    return text
  if difference["outcome"] == "better":
    low, high = -high, -low
  return (
    f"{first} is {abs(difference['value']):.3f} nats per token {difference['outcome']} than "
    f"{second} (95% interval {low:.3f} to {high:.3f}{noise})."
  )


def _gap_claim(gap: Estimate, gate: float) -> dict[str, Any]:
  low, high = gap.interval95
  holds = True if low > gate else False if high < gate else None
  text = {
    True: "The synthesizer uses d1",
    False: "The synthesizer makes almost no use of d1",
    None: "It is undecided whether the synthesizer uses d1",
  }[holds]
  return {
    "claim": "synthesizer_uses_d1",
    "holds": holds,
    "sentence": (
      f"{text}: a random d1 in place of the true neighbor costs {formatting.signed(gap.value)} "
      f"nats per token of d2 (95% interval {formatting.interval((low, high))} over pairs; the gate "
      f"is {gate:g})."
    ),
  }


def _caveats(result: Mapping[str, Any], arms: Mapping[str, ArmResult]) -> list[str]:
  lines = ["One training seed per arm and no allowance for seed noise: intervals are too narrow."]
  if result["seed_noise"]:
    lines = [
      f"One training seed per arm: every interval includes {result['seed_noise']:.3f} nats per "
      "token of seed noise (the standard deviation of a difference), assumed and not measured here."
    ]
  settings = {(arm.weight_decay, arm.dropout) for arm in arms.values()}
  if len(settings) > 1:
    each = "; ".join(f"{a.label} {a.weight_decay:g} and {a.dropout:g}" for a in arms.values())
    lines.append(f"Arms differ in weight decay and dropout: {each}.")
  for arm in arms.values():
    if _overfits(arm, result["seed_noise"]):
      lines.append(
        f"{arm.label} overfits: its validation loss was {arm.best_validation:.3f} at its best and "
        f"{arm.final_validation:.3f} at the end. Part of a gain over it may be early stopping."
      )
  return lines


# The sentences of the verdict: claim -> by whether it holds.
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


def _verdict(holds: Mapping[str, bool | None]) -> str:
  """Sums up the claims in one paragraph."""
  if "gain_at_equal_tokens" not in holds:
    return "There is no SBP arm to judge."
  parts = []
  for claim, sentences in _VERDICTS.items():
    if claim in holds:
      parts.append(sentences[holds[claim]])
  if holds["gain_at_equal_tokens"] and not holds.get("gain_over_unconditional", True):
    parts.insert(2, "So the gain cannot be attributed to related documents.")
  return " ".join(parts)
