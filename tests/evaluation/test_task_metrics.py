"""Metrics of records: formulations, micro and macro means, perplexities, chance."""

import math

import numpy as np
import pytest

from selfimprove_jax.evaluation.tasks import metrics


def _record(logprobs, *, choices=None, gold=(0,), group="g", greedy=None, **others):
  choices = (
    [f"{'x' * 3}{number}" for number in range(len(logprobs))] if choices is None else choices
  )
  return {
    "id": "t:1",
    "group": group,
    "choices": choices,
    "gold": list(gold),
    "logprobs": list(logprobs),
    "num_tokens": [1] * len(logprobs),
    "greedy": [False] * len(logprobs) if greedy is None else greedy,
    **others,
  }


def _value(name, *records):
  return metrics.estimate(name, records).value


def test_normalization_by_characters_and_by_bytes_are_different_metrics():
  """lm-eval #2605: acc, acc_norm and acc_bytes each choose another answer."""
  record = _record([-6.0, -7.0, -8.0], choices=["a", "bcdefgh", "ééééé"])
  assert [metrics.predicted(record, by) for by in (None, "characters", "bytes")] == [0, 1, 2]


def test_equal_likelihoods_predict_the_first():
  assert metrics.predicted(_record([-2.0, -1.0, -1.0])) == 1


def test_micro_and_macro_means_differ_on_groups_of_unequal_size():
  right, wrong = [0.0, -1.0], [-1.0, 0.0]
  records = [_record(right, group="a") for _ in range(3)] + [_record(wrong, group="b")]
  assert _value("acc_micro", *records) == 0.75
  macro = metrics.estimate("acc_macro", records)
  assert macro.value == 0.5
  # The standard error of the mean of two numbers, 1 and 0.
  assert macro.stderr == pytest.approx(np.std([1, 0], ddof=1) / math.sqrt(2))
  assert macro.unit == "accuracy, mean over groups"


def test_perplexities_are_over_the_vocabulary_and_over_the_choices():
  records = [_record([math.log(0.1), math.log(0.3)], group=name) for name in "ab"]
  assert _value("ppl", *records) == pytest.approx(10)
  assert _value("ppl_choices", *records) == pytest.approx(4)


def test_perplexity_per_word_is_over_documents_and_per_token_over_tokens():
  words = [_record([-2.0], group="a"), _record([-4.0], group="b")]
  assert _value("ppl_word", *words) == pytest.approx(math.exp(3))
  texts = [
    {"group": "a", "logprobs": [-2.0], "num_tokens": [1], "num_bytes": 4},
    {"group": "b", "logprobs": [-4.0], "num_tokens": [5], "num_bytes": 8},
  ]
  assert _value("ppl_token", *texts) == pytest.approx(math.e)
  assert _value("bits_per_byte", *texts) == pytest.approx(6 / 12 / math.log(2))


def test_any_accepted_answer_may_be_the_greedy_one():
  records = [
    _record([-1.0, -2.0], gold=(0, 1), greedy=[False, True], group="a"),
    _record([-1.0, -2.0], gold=(0, 1), group="b"),
  ]
  assert _value("greedy_acc", *records) == 0.5


def test_chance_is_that_of_guessing_a_choice():
  records = [_record([0.0] * 4, group="a"), _record([0.0] * 2, group="b", gold=(0, 0))]
  assert metrics.chance("acc", records) == 0.375
  records.append(_record([0.0] * 2, group="b"))
  assert metrics.chance("acc_micro", records) == pytest.approx((0.25 + 0.5 + 0.5) / 3)
  assert metrics.chance("acc_macro", records) == 0.375
  # All choices of webqs are right; a guess of the text is not.
  assert metrics.chance("greedy_acc", records) == 0
  assert metrics.chance("ppl", records) is None


def test_the_worst_and_the_best_are_those_of_the_right_choice():
  records = [_record([-p, -1.0]) | {"id": str(p)} for p in (3, 1, 2)]
  worst, best = metrics.worst_and_best(records, 2)
  assert [record["id"] for record in worst] == ["3", "2"]
  assert [record["id"] for record in best] == ["1", "2"]


def test_answers_are_compared_without_case_and_punctuation():
  assert metrics.plain(" St. John's! ") == "st johns"


def _records(nats, *, tokens=4):
  return [
    {"id": f"t:{i}", "group": f"g{i}", "logprobs": [-n], "num_tokens": [tokens]}
    for i, n in enumerate(nats)
  ]


def test_several_trainings_count_with_their_mean_per_example():
  trainings = [_records([8.0, 12.0, 9.0]), _records([10.0, 10.0, 11.0])]
  means = _records([9.0, 11.0, 10.0])
  assert metrics.estimate("ppl_token", *trainings) == metrics.estimate("ppl_token", means)
  other = [_records([7.0, 9.0, 12.0])]
  found = metrics.compare("ppl_token", trainings, other)
  assert found == metrics.compare("ppl_token", [means], other)
  assert (found.won, found.lost, found.tied) == (2, 1, 0)


def test_a_perplexity_changes_in_its_own_unit_with_the_error_of_the_delta_method():
  rng = np.random.default_rng(0)
  nats = rng.normal(8, 1, (2, 400))
  nats[1] = nats[0] + rng.normal(-0.4, 0.2, 400)
  first, second = map(_records, nats)
  found = metrics.compare("ppl_token", [first], [second]).change
  values = [metrics.estimate("ppl_token", records) for records in (first, second)]
  assert found.value == pytest.approx(values[1].value - values[0].value)
  draws = rng.integers(400, size=(4000, 400))
  perplexities = np.exp(nats[:, draws].mean(axis=2) / 4)
  assert found.stderr == pytest.approx((perplexities[1] - perplexities[0]).std(), rel=0.1)
  assert found.stderr < values[0].stderr / 2  # paired


def test_models_on_other_examples_are_not_compared():
  with pytest.raises(ValueError, match="acc is not of the same examples"):
    metrics.compare("acc", [[_record([0.0, -1.0])]], [[_record([0.0, -1.0]) | {"id": "t:2"}]])
