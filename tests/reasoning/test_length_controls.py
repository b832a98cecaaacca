"""Rejection sampling, prompts that ask for a length, and votes."""

import pytest

from selfimprove_jax.reasoning import length_controls
from selfimprove_jax.reasoning.length_controls import ConditionConfig, Vote, majority_vote
from selfimprove_jax.sampling.requests import SamplingConfig

_AT_ONE = SamplingConfig()


def _within(model, questions, *, sampling=_AT_ONE, **options):
  defaults = dict(max_tokens=4, max_answer_tokens=5, max_tries=6, num_slots=1)
  return length_controls.think_within(questions, model.thinker(sampling), **defaults | options)


def test_thoughts_that_are_too_long_are_drawn_again_until_one_fits(model):
  questions = [model.question("?", id_=str(n)) for n in range(30)]
  responses = _within(model, questions, max_tries=200)
  assert all(len(r.thinking) <= 4 and r.forced == "none" and r.answer for r in responses)
  sizes = [len(batch) for batch in model.batches[:-1]]
  assert sizes[0] == 30 and sizes == sorted(sizes, reverse=True) and len(sizes) > 3
  assert all(request.max_tokens == 5 for batch in model.batches[:-1] for request in batch)


def test_a_thought_of_exactly_the_maximum_is_kept(model):
  kept, dropped = _within(
    model, [model.question("abcd|", "a"), model.question("abcde|", "b")], max_tries=3
  )
  assert (kept.thinking, kept.forced, kept.sampled_tokens) == ("abcd", "none", 4 + 2)
  assert (dropped.thinking, dropped.forced, dropped.answer) == ("", "rejected", "")
  assert dropped.sampled_tokens == 3 * 5


def test_tries_are_bounded(model):
  (response,) = _within(model, [model.question("abcdefgh|")], max_tries=5, num_slots=2)
  assert response.forced == "rejected"
  assert sum(len(batch) for batch in model.batches) == 5


def test_free_slots_run_several_tries_and_change_no_response(model):
  questions = [model.question("?", id_=str(n)) for n in range(10)]
  one_by_one = _within(model, questions, max_tries=50)
  num_batches = len(model.batches)
  assert _within(model, questions, max_tries=50, num_slots=64) == one_by_one
  assert len(model.batches) - num_batches < num_batches


def test_a_try_that_fails_is_not_repeated(model):
  (response,) = _within(model, [model.question("!")])
  assert (response.error, response.forced) == ("NaN in the logits", "none")
  assert len(model.batches) == 1


def test_greedy_tries_are_refused(model):
  with pytest.raises(ValueError, match="temperature=0 draws the same thought at every try"):
    _within(model, [model.question("?")], sampling=SamplingConfig(temperature=0.0))


def test_conditions_ask_for_a_length():
  assert "up to 512 tokens" in ConditionConfig(kind="token", amount=512).instruction
  assert "up to 8 steps" in ConditionConfig(kind="step", amount=8).instruction
  assert ConditionConfig(kind="short").instruction != ConditionConfig(kind="long").instruction
  assert ConditionConfig().instruction == ""
  with pytest.raises(ValueError, match="'none', 'token', 'step', 'short' or 'long'"):
    ConditionConfig(kind="medium")
  for wrong in (dict(kind="token"), dict(kind="short", amount=3), dict(amount=3)):
    with pytest.raises(ValueError, match="does not fit kind="):
      ConditionConfig(**wrong)


@pytest.mark.parametrize(
  ("answers", "vote"),
  [
    (["3", "4", "4"], Vote(1, 2)),
    (["5", "4", "4", "5"], Vote(0, 2)),  # of two with as many votes, the one given first
    (["1", "2", "3"], Vote(0, 1)),
    ([None, None, "7"], Vote(2, 1)),
    ([None, None], None),
    ([], None),
  ],
)
def test_the_most_frequent_answer_wins(answers, vote):
  assert majority_vote(answers) == vote
