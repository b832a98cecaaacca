"""Metrics of scored examples; the formulation stands in each name.

A metric maps a record of `evaluation.scoring` to a numerator and a denominator. Its value is their
ratio over all records, with a standard error that is clustered by group; perplexities are the
exponential of such a ratio. A mean over groups ("macro") weighs each group's records by one over
their number.
"""

import collections
import dataclasses
import math
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from selfimprove_jax.evaluation import statistics
from selfimprove_jax.evaluation.statistics import Estimate
from selfimprove_jax.evaluation.tasks.items import Record

Parts = Callable[[Record], tuple[float, float]]


def predicted(record: Record, divide_by: str | None = None) -> int:
  """Returns the choice of the largest log-likelihood; the first of equals, as argmax does.

  Args:
    divide_by: "characters" or "bytes" of the choice, without the space before it.
  """
  sizes = {
    None: lambda text: 1,
    "characters": len,
    "bytes": lambda text: len(text.encode()),
  }[divide_by]
  values = [lp / sizes(text) for lp, text in zip(record["logprobs"], record["choices"])]
  return int(np.argmax(values))


def _accuracy(divide_by: str | None) -> Parts:
  return lambda record: (float(predicted(record, divide_by) in record["gold"]), 1.0)


def _any_gold_is_greedy(record: Record) -> tuple[float, float]:
  return float(any(record["greedy"][index] for index in record["gold"])), 1.0


def _gold_nll(record: Record) -> tuple[float, float]:
  return -record["logprobs"][record["gold"][0]], 1.0


def _gold_nll_among_choices(record: Record) -> tuple[float, float]:
  logprobs = np.array(record["logprobs"])
  return float(np.logaddexp.reduce(logprobs) - logprobs[record["gold"][0]]), 1.0


def _margin(record: Record) -> tuple[float, float]:
  """Returns the log-likelihood of the likeliest right choice minus that of the likeliest other."""
  gold = set(record["gold"])
  right, wrong = [
    max(lp for index, lp in enumerate(record["logprobs"]) if (index in gold) == is_right)
    for is_right in (True, False)
  ]
  return right - wrong, 1.0


def _gold_nats(record: Record) -> tuple[float, float]:
  index = record["gold"][0]
  return -record["logprobs"][index], float(record["num_tokens"][index])


def _is_correct(record: Record) -> tuple[float, float]:
  return float(record["correct"]), 1.0


def _exact_match(record: Record) -> tuple[float, float]:
  if record["grader"] != "squad":
    return _is_correct(record)  # compared when the record was graded
  words = squad_words(record["generation"])
  return float(any(words == squad_words(answer) for answer in record["answers"])), 1.0


def _contains(record: Record) -> tuple[float, float]:
  return float(any(contains(record["generation"], answer) for answer in record["answers"])), 1.0


def _best_f1(record: Record) -> tuple[float, float]:
  return max(f1(record["generation"], answer) for answer in record["answers"]), 1.0


def _is_attempted(record: Record) -> tuple[float, float]:
  return float(stated_letter(record) is not None), 1.0


def _states_right_letter(record: Record) -> tuple[float, float]:
  return float(stated_letter(record) in record["answers"]), 1.0


def _right_of_attempted(record: Record) -> tuple[float, float]:
  return _states_right_letter(record)[0], _is_attempted(record)[0]


def plain(text: str) -> str:
  """Returns a text without case and punctuation, as answers are compared."""
  return re.sub(f"[{re.escape(string.punctuation)}]", "", text.strip().lower())


def squad_words(text: str) -> list[str]:
  """Returns the words of a text as SQuAD compares them: no case, punctuation or articles."""
  return [word for word in plain(text).split() if word not in ("a", "an", "the")]


def f1(text: str, answer: str) -> float:
  """Returns the harmonic mean of precision and recall of the words of an answer (SQuAD's F1)."""
  words, accepted = squad_words(text), squad_words(answer)
  common = sum((collections.Counter(words) & collections.Counter(accepted)).values())
  if not words or not accepted:
    return float(words == accepted)
  return 2 * common / (len(words) + len(accepted))


def contains(text: str, answer: str) -> bool:
  """Tells whether an answer occurs in a text as whole words, without case and punctuation.

  Numbers keep their decimal point ("5.6" does not contain "6"), and lose commas ("18,600").
  """
  words, sought = _folded_words(text), _folded_words(answer)
  starts = range(len(words) - len(sought) + 1)
  return bool(sought) and any(words[i : i + len(sought)] == sought for i in starts)


def _folded_words(text: str) -> list[str]:
  folded = re.sub("['\u2019]", "", unicodedata.normalize("NFKC", text).casefold())
  return [word.replace(",", "") for word in re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+", folded)]


def stated_letter(record: Record) -> str | None:
  """Returns the letter of the first sample that states an answer; None if none does.

  A sample states its answer by the first line that ends in "Answer: X.", where X may be several
  letters, of which the last one counts (the parser of arXiv 2409.07431's code). That code stops
  generating there, and discards other samples. Here a sample may also end with that line's period,
  since chat models end without a line break.
  """
  texts = record.get("generations") or [record["generation"]]
  reasons = record.get("finish_reasons") or [record["finish_reason"]]
  for text, reason in zip(texts, reasons, strict=True):
    for match in re.finditer(r"Answer: ([A-Z]+)\.\n", text + "\n" * (reason == "stop")):
      letters = match[1]
      if len(set(letters)) == len(letters) and set(letters) <= set(record["letters"]):
        return letters[-1]
  return None


def _nats_per_token(record: Record) -> tuple[float, float]:
  return -record["logprobs"][0], float(record["num_tokens"][0])


def _bits_per_byte(record: Record) -> tuple[float, float]:
  return -record["logprobs"][0] / math.log(2), float(record["num_bytes"])


# Name -> its parts, its unit, and whether the value is the exponential of the ratio.
METRICS: dict[str, tuple[Parts, str, bool]] = {
  "acc": (_accuracy(None), "accuracy", False),
  "acc_micro": (_accuracy(None), "accuracy over questions", False),
  "acc_macro": (_accuracy(None), "accuracy, mean over groups", False),
  "acc_norm": (_accuracy("characters"), "accuracy", False),
  "acc_bytes": (_accuracy("bytes"), "accuracy", False),
  "greedy_acc": (_any_gold_is_greedy, "accuracy", False),
  "margin": (_margin, "margin in nats", False),
  "gold_nats": (_gold_nats, "nats per token of the right choice", False),
  "exact_match": (_exact_match, "accuracy", False),
  "contains": (_contains, "accuracy: an accepted answer occurs", False),
  "f1": (_best_f1, "F1 of words", False),
  "attempt_rate": (_is_attempted, "share of questions", False),
  "acc_attempted": (_right_of_attempted, "accuracy over attempted questions", False),
  "acc_asked": (_states_right_letter, "accuracy, without an attempt 0", False),
  "number_match": (_is_correct, "accuracy", False),
  "math_match": (_is_correct, "accuracy", False),
  "ppl": (_gold_nll, "perplexity over the vocabulary", True),
  "ppl_choices": (
    _gold_nll_among_choices,
    "perplexity of the right choice among the choices",
    True,
  ),
  "ppl_word": (_gold_nll, "perplexity per word", True),
  "ppl_token": (_nats_per_token, "perplexity per token", True),
  "bits_per_byte": (_bits_per_byte, "bits per byte", False),
}


def is_accuracy(name: str) -> bool:
  """Tells whether a metric is a share of right answers."""
  return METRICS[name][1].startswith("accuracy")


def _grows(name: str) -> bool:
  """Tells whether more of a metric is better."""
  return METRICS[name][1].startswith(("accuracy", "margin", "F1", "share"))


def estimate(name: str, *trainings: Sequence[Record]) -> Estimate:
  """Estimates a metric over the records of one task, with errors clustered by group.

  Args:
    trainings: the records of each training of a model, on the same examples in the same order. What
      an example counts is its mean over the trainings; the error is not that of their seeds.
  """
  _, unit, is_exponential = METRICS[name]
  groups = [record["group"] for record in trainings[0]]
  tops, bottoms = _mean_parts(name, trainings)
  found = statistics.ratio(tops, bottoms, unit, groups=groups)
  if not is_exponential:
    return found
  value = math.exp(found.value)
  return statistics.Estimate(value, value * found.stderr, unit, found.num_groups)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """How a second model differs from a first one on the same examples.

  Attributes:
    difference: second minus first, paired by example; of mean nats for a perplexity.
    change: second minus first in the unit of the metric, also for a perplexity.
    won, lost, tied: examples on which the second model is better, worse, and equal.
  """

  difference: Estimate
  change: Estimate
  won: int
  lost: int
  tied: int


def compare(
  name: str, first: Sequence[Sequence[Record]], second: Sequence[Sequence[Record]]
) -> Comparison:
  """Compares a metric of two models on the same examples.

  Args:
    first, second: the records of each training of a model, as in `estimate`.

  Raises:
    ValueError: the records are of other examples, the metric divides by other numbers of tokens,
      or it is "acc_attempted", of which each model has questions of its own.
  """
  if name == "acc_attempted":
    raise ValueError("acc_attempted is of other questions for each model; compare acc_asked")
  _, unit, is_exponential = METRICS[name]
  groups = [record["group"] for record in first[0]]
  _mean_parts(name, [*first, *second])  # checks that all are of the same thing
  (tops_1, bottoms), (tops_2, _) = _mean_parts(name, first), _mean_parts(name, second)
  changes = tops_2 - tops_1
  difference = statistics.ratio(changes, bottoms, "nats" if is_exponential else unit, groups=groups)
  change = difference
  if is_exponential:
    # The delta method: the residuals of each perplexity, as if it were linear in the nats.
    mean_1, mean_2 = (float(tops.sum() / bottoms.sum()) for tops in (tops_1, tops_2))
    residuals = math.exp(mean_2) * (tops_2 - mean_2 * bottoms)
    residuals -= math.exp(mean_1) * (tops_1 - mean_1 * bottoms)
    value = math.exp(mean_2) - math.exp(mean_1)
    change = statistics.ratio(residuals + value * bottoms, bottoms, unit, groups=groups)
  gains = changes if _grows(name) else -changes
  won, lost = int((gains > 0).sum()), int((gains < 0).sum())
  return Comparison(difference, change, won, lost, len(changes) - won - lost)


def _mean_parts(
  name: str, trainings: Sequence[Sequence[Record]]
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
  """Returns the weighted parts of each example: the mean numerator, and the denominator.

  The denominator of "acc_attempted" is a mean, too: trainings attempt other questions.

  Raises:
    ValueError: the trainings have other examples or other denominators.
  """
  first, groups = trainings[0], [record["group"] for record in trainings[0]]
  parts_TN2 = np.array([[METRICS[name][0](record) for record in records] for records in trainings])
  for records, parts_N2 in zip(trainings[1:], parts_TN2[1:]):
    if [record["id"] for record in records] != [record["id"] for record in first]:
      raise ValueError(f"{name} is not of the same examples: their ids or their order differ")
    if name == "acc_attempted":
      continue
    if len(differing := np.flatnonzero(parts_N2[:, 1] != parts_TN2[0, :, 1])):
      index = differing[0]
      raise ValueError(
        f"{first[index]['id']} has {parts_TN2[0, index, 1]:g} tokens in one run and "
        f"{parts_N2[index, 1]:g} in the other, so {name} is not of the same thing: the tokenizers "
        f"differ"
      )
  weights = _weights(name, groups)
  return parts_TN2[:, :, 0].mean(axis=0) * weights, parts_TN2[:, :, 1].mean(axis=0) * weights


def _weights(name: str, groups: Sequence[str]) -> np.ndarray:
  counts = collections.Counter(groups)
  is_macro = name.endswith("_macro")
  return np.array([1.0 / counts[group] if is_macro else 1.0 for group in groups])


def chance(name: str, records: Sequence[Record]) -> float | None:
  """Returns what guessing one of the choices gives; 0 where there are none, None if no accuracy."""
  if not is_accuracy(name):
    return None
  if not name.startswith("acc"):
    return 0.0
  shares = [
    1 / len(record["letters"])
    if "letters" in record
    else len(set(record["gold"])) / len(record["choices"])
    for record in records
  ]
  weights = _weights(name, [record["group"] for record in records])
  return float(np.average(shares, weights=weights))


def worst_and_best(records: Sequence[Record], number: int) -> tuple[list[Any], list[Any]]:
  """Returns the records with the smallest and the largest likelihood of what is right."""

  def key(record: Record) -> float:
    if "generation" in record:
      return float(record["correct"])
    if len(record["logprobs"]) > 1:
      return -_gold_nll_among_choices(record)[0]
    return record["logprobs"][0] / record["num_tokens"][0]

  ranked = sorted(records, key=key)
  return list(ranked[:number]), list(ranked[::-1][:number])
