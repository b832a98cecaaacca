"""From per-document results of the arms to statements about them, with the noise that they carry.

A difference of two arms has two kinds of noise: which documents were held out (measured here, by
pairing the documents) and which initialisation and data order training drew (not measurable from
one seed per arm, so it is an argument, `seed_noise`; 0.03 nats per token at half a million
parameters, in a prototype). Both enter every interval, in quadrature; a difference is a win only
where the 95% interval excludes zero.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from selfimprove_jax.evaluation import statistics
from selfimprove_jax.evaluation.statistics import Estimate


@dataclasses.dataclass(frozen=True)
class ArmResult:
  """What one trained arm did on the held-out documents, and what it was given.

  Attributes:
    name: `baseline`, `sbp`, `unconditional`, `oracle`, `baseline_all_in`, or another.
    label: how a reader is told of it.
    nll_sums: negative log-likelihood of each held-out document, nats.
    token_counts: predicted tokens of each document.
    byte_counts: UTF-8 bytes of those tokens.
    train_tokens: tokens of the arm's own training.
    steps: optimizer steps of the arm's own training.
    schedule: what else must be equal: learning rates, batch, row length, seed, parameters.
    train_flops: of the arm's own training.
    all_in_flops: `train_flops` and everything that had to be computed first (seed pretraining,
      embedding, synthesizer tuning, sampling).
    weight_decay: the arm's own; arms may differ.
    dropout: the arm's own; arms may differ.
    best_validation: lowest validation loss over training, nats per token.
    final_validation: validation loss at the end, nats per token.
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
  """Checks that arms called equal had the same training tokens, steps and schedule.

  Raises:
    ValueError: they had not; the message names the first arm that differs, and in what.
  """
  first = arms[0]
  for arm in arms[1:]:
    for field in ("train_tokens", "steps", "schedule", "train_flops"):
      ours, theirs = getattr(first, field), getattr(arm, field)
      if ours != theirs:
        raise ValueError(
          f"arms of equal compute must agree in {field}: {first.name} has {ours!r}, "
          f"{arm.name} has {theirs!r}"
        )


def evals(arm: ArmResult) -> dict[str, dict[str, Any]]:
  """Held-out nats per token and bits per byte of one arm, with standard errors over documents."""
  return {
    "heldout_nll": statistics.weighted_mean(arm.nll_sums, arm.token_counts).to_dict(),
    "bits_per_byte": statistics.bits_per_byte(arm.nll_sums, arm.byte_counts).to_dict(),
  }


def compare(
  arms: Sequence[ArmResult],
  *,
  seed_noise: float | int,
  conditioning_gap: Estimate | None = None,
  gate: float | int = 0.05,
  baseline: str = "baseline",
  sbp: str = "sbp",
  unconditional: str = "unconditional",
  oracle: str = "oracle",
  all_in: str = "baseline_all_in",
) -> dict[str, Any]:
  """Compares the arms; what is compared with what, and what may be claimed.

  Args:
    arms: every arm; `baseline` must be there, the others make the statements they are needed for.
      All but `all_in` are held to equal compute.
    seed_noise: standard deviation, in nats per token, of the difference of two arms that differ
      only in their training seed. It enters every interval.
    conditioning_gap: held-out NLL of d2 given a random d1 minus that given its neighbour.
    gate: the gap, in nats per token, that must be exceeded to say that the synthesizer uses d1.
    all_in: the arm that repeats real data with as many FLOPs as `sbp` took all-in.

  Returns:
    JSON-able: `evals` (arm -> measure -> value, stderr, unit), `differences` (arm -> its paired
    difference to the baseline), `versus` (the differences of `sbp` to `unconditional` and to
    `all_in`, by the name of the other arm), `recovered` (arm -> share of the oracle's gain;
    absent where the oracle shows none), `claims`, `caveats`, `verdict`. A difference is first
    minus second, so a negative one favours the first; `stderr` and `document_interval` are over
    documents alone, `interval` is 95% with the seed noise, `outcome` is better, worse or tie.
    A claim's `holds` is None where the difference is inside the noise, the other arm was as good
    at its best over training, or the gap is not clearly on one side of the gate.

  Raises:
    ValueError: `seed_noise` is negative, an arm is missing or there twice, the arms were
      evaluated on different documents, or the compute that should be equal is not.
  """
  by_name = {arm.name: arm for arm in arms}
  _check(arms, by_name, seed_noise=seed_noise, baseline=baseline)
  check_equal_compute([arm for arm in arms if arm.name != all_in])
  if sbp in by_name and all_in in by_name:
    _check_equal_all_in(by_name[sbp], by_name[all_in])

  def difference(first: str, second: str) -> dict[str, Any]:
    return _difference(by_name[first], by_name[second], seed_noise=seed_noise)

  result: dict[str, Any] = {
    "baseline": baseline,
    "oracle": oracle if oracle in by_name else None,
    "seed_noise": seed_noise,
    "num_documents": int(by_name[baseline].token_counts.size),
    "num_tokens": int(by_name[baseline].token_counts.sum()),
    "evals": {arm.name: evals(arm) for arm in arms},
    "differences": {
      arm.name: difference(arm.name, baseline) for arm in arms if arm.name != baseline
    },
    "versus": {},
    "recovered": {},
  }
  if sbp in by_name:
    against = [unconditional, all_in]
    result["versus"] = {other: difference(sbp, other) for other in against if other in by_name}
  shared = [arm for arm in arms if arm.name not in (baseline, oracle, all_in)]
  if oracle in by_name and result["differences"][oracle]["outcome"] == "better":
    for arm in shared:
      share = _recovered(by_name[baseline], arm, by_name[oracle], seed_noise=seed_noise)
      result["recovered"] |= {arm.name: share} if share else {}
  roles = {"sbp": sbp, "unconditional": unconditional, "all_in": all_in}
  result["claims"] = (
    _claims(result, sbp_label=by_name[sbp].label, **roles) if sbp in by_name else []
  )
  for claim in result["claims"]:
    _discount_overfitting(claim, by_name[sbp], by_name[claim.pop("against")], seed_noise)
  if conditioning_gap is not None:
    result["claims"].append(_gap_claim(conditioning_gap, gate))
  result["caveats"] = _caveats(result, by_name)
  if oracle in by_name and shared and not result["recovered"]:
    result["caveats"].append(
      f"{by_name[oracle].label} is not clearly better than {by_name[baseline].label}, so no share "
      "of its gain can be given."
    )
  result["verdict"] = _verdict({claim["claim"]: claim["holds"] for claim in result["claims"]})
  return result


def _check(
  arms: Sequence[ArmResult],
  by_name: dict[str, ArmResult],
  *,
  seed_noise: float | int,
  baseline: str,
) -> None:
  if not seed_noise >= 0:
    raise ValueError(f"seed_noise is {seed_noise}; it is a standard deviation, 0 or more")
  if len(by_name) != len(arms):
    raise ValueError(f"an arm is there twice: {[arm.name for arm in arms]}")
  if baseline not in by_name:
    raise ValueError(f"no arm is called {baseline!r}; there are {sorted(by_name)}")
  first = by_name[baseline]
  for arm in arms:
    if not (
      np.array_equal(arm.token_counts, first.token_counts)
      and np.array_equal(arm.byte_counts, first.byte_counts)
      and arm.nll_sums.shape == first.nll_sums.shape
    ):
      raise ValueError(f"{arm.name} and {first.name} were evaluated on different documents")


def _check_equal_all_in(sbp: ArmResult, all_in: ArmResult) -> None:
  step = all_in.train_flops / all_in.steps
  if abs(sbp.all_in_flops - all_in.all_in_flops) > max(step, 0.01 * sbp.all_in_flops):
    raise ValueError(
      f"{all_in.name} must take as many FLOPs as {sbp.name} took all-in, to one step: "
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
  """Share of the oracle's gain, with the seeds' part of its error by the delta method.

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
  """95%, with a second noise of that standard deviation added in quadrature."""
  both = math.hypot(estimate.stderr, noise)
  return list(dataclasses.replace(estimate, stderr=both).interval95)


def _claims(
  result: dict[str, Any], *, sbp_label: str, sbp: str, unconditional: str, all_in: str
) -> list[dict[str, Any]]:
  seed_noise = result["seed_noise"]
  gain = result["differences"][sbp]
  text = f"At equal training tokens {_outcome_text(gain, sbp_label, 'the baseline', seed_noise)}"
  if sbp in result["recovered"] and gain["outcome"] == "better":
    share = result["recovered"][sbp]
    text += (
      f" It recovers {100 * share['value']:.0f}% \N{PLUS-MINUS SIGN} {100 * share['stderr']:.0f}% "
      "(standard error) of the oracle's gain."
    )
  elif sbp in result["recovered"]:
    beyond = "" if gain["outcome"] == "worse" else " that can be told from the noise"
    text += f" It recovers none of the oracle's gain{beyond}."
  claims = [_claim("gain_at_equal_tokens", gain, text)]
  if unconditional in result["versus"]:
    control = result["versus"][unconditional]
    other = "the arm of unconditional samples of the same model"
    text = _outcome_text(control, sbp_label, other, seed_noise)
    if control["outcome"] != "better":
      text += " So no gain can be put down to conditioning on a related document."
    claims.append(_claim("gain_over_unconditional", control, text))

  if all_in in result["versus"]:
    costly = result["versus"][all_in]
    text = _outcome_text(costly, sbp_label, "the baseline trained longer", seed_noise)
    text = f"At equal all-in FLOPs, tuning and sampling counted, {text}"
    claims.append(_claim("gain_at_equal_flops", costly, text))
  return claims


def _claim(claim: str, difference: dict[str, Any], sentence: str) -> dict[str, Any]:
  holds = {"better": True, "worse": False, "tie": None}[difference["outcome"]]
  return {"claim": claim, "holds": holds, "sentence": sentence, "against": difference["second"]}


def _discount_overfitting(
  claim: dict[str, Any], first: ArmResult, second: ArmResult, seed_noise: float | int
) -> None:
  """A gain over an arm that was as good earlier in its training is early stopping, not a gain."""
  was_as_good = second.best_validation <= first.best_validation
  if claim["holds"] and was_as_good and _overfits(second, seed_noise):
    claim["holds"] = None
    claim["sentence"] += (
      f" But that is overfitting: over training, its best validation loss was "
      f"{second.best_validation:.3f}, and {first.label}'s {first.best_validation:.3f}."
    )


def _overfits(arm: ArmResult, seed_noise: float | int) -> bool:
  return arm.final_validation - arm.best_validation > max(seed_noise, 0.01)


def _outcome_text(
  difference: dict[str, Any], first: str, second: str, seed_noise: float | int
) -> str:
  """`SBP is 0.069 nats per token better than ... .`, with the interval and what is in it."""
  low, high = difference["interval"]
  noise = f", with {seed_noise:.3f} nats of training-seed noise" if seed_noise else ""
  if difference["outcome"] == "tie":
    low_documents, high_documents = difference["document_interval"]
    text = (
      f"{first} and {second} cannot be told apart: difference {_signed(difference['value'])} nats "
      f"per token, 95% interval {_signed(low)} to {_signed(high)}{noise}."
    )
    if low_documents > 0 or high_documents < 0:
      text += " Over documents alone it would be clear; one training seed per arm makes it a tie."
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
  text = {True: "uses d1", False: "hardly uses d1", None: "may or may not use d1"}[holds]
  return {
    "claim": "synthesizer_uses_d1",
    "holds": holds,
    "sentence": (
      f"The synthesizer {text}: a random d1 in the place of the true neighbour costs "
      f"{_signed(gap.value)} nats per token of d2 (95% interval {_signed(low)} to {_signed(high)} "
      f"over pairs; the gate is {gate:g})."
    ),
  }


def _caveats(result: dict[str, Any], arms: dict[str, ArmResult]) -> list[str]:
  lines = ["One training seed per arm, and no noise allowed for it: intervals are too narrow."]
  if result["seed_noise"]:
    lines = [
      f"One training seed per arm: every interval allows {result['seed_noise']:.3f} nats per token "
      "(standard deviation of a difference) for it, a number that is given, not measured here."
    ]
  settings = {(arm.weight_decay, arm.dropout) for arm in arms.values()}
  if len(settings) > 1:
    each = "; ".join(f"{a.label} {a.weight_decay:g} and {a.dropout:g}" for a in arms.values())
    lines.append(f"Arms differ in weight decay and dropout: {each}.")
  for arm in arms.values():
    if _overfits(arm, result["seed_noise"]):
      lines.append(
        f"{arm.label} overfits: its validation loss was {arm.best_validation:.3f} at best and "
        f"{arm.final_validation:.3f} at the end. Part of a gain over it may be early stopping."
      )
  return lines


def _verdict(holds: dict[str, bool | None]) -> str:
  """One paragraph from the claims, for a reader who reads nothing else."""
  if "gain_at_equal_tokens" not in holds:
    return "There is no SBP arm to judge."
  gain = holds["gain_at_equal_tokens"]
  parts = [
    {
      True: "At this size SBP is better than repeating the real data for the same training tokens.",
      False: "At this size SBP is worse than repeating the real data for the same training tokens.",
      None: "At this size SBP shows no gain over repeating the real data.",
    }[gain]
  ]
  if "gain_over_unconditional" in holds:
    control = holds["gain_over_unconditional"]
    if control:
      parts.append("SBP is better than training on unconditional samples of the same model.")
    else:
      told = "cannot be told from" if control is None else "is worse than"
      parts.append(
        f"SBP {told} training on unconditional samples of the same model"
        + (", so the gain cannot be put down to related documents." if gain else ".")
      )
  if "synthesizer_uses_d1" in holds:
    parts.append(
      {
        True: "The synthesizer does read the document it is given.",
        False: "The synthesizer hardly reads the document it is given.",
        None: "Whether the synthesizer reads the document it is given is not clear.",
      }[holds["synthesizer_uses_d1"]]
    )
  if "gain_at_equal_flops" in holds:
    parts.append(
      {
        True: "With tuning and sampling counted, SBP is better than training longer.",
        False: "With tuning and sampling counted, training longer is better.",
        None: "With tuning and sampling counted, SBP cannot be told from training longer.",
      }[holds["gain_at_equal_flops"]]
    )
  return " ".join(parts)


def _signed(number: float) -> str:
  return f"{number:+.3f}".replace("-", "\N{MINUS SIGN}")
