"""Budget forcing on a scripted model whose question says where its thought ends."""

import dataclasses
import random

import pytest

from selfimprove_jax.reasoning import budget_forcing
from selfimprove_jax.reasoning.budget_forcing import BudgetConfig
from selfimprove_jax.sampling.requests import SamplingConfig

_GREEDY = SamplingConfig(temperature=0.0)


def _respond(model, questions, *, num_samples=1, sampling=_GREEDY, seed=0, **budget):
  return budget_forcing.think_and_answer(
    questions,
    model.thinker(sampling, seed),
    budget=BudgetConfig(**{"max_tokens": 20} | budget),
    max_answer_tokens=5,
    num_samples=num_samples,
  )


def _one(model, text, **budget):
  (response,) = _respond(model, [model.question(text)], **budget)
  return response


def test_a_thought_that_ends_by_itself_is_closed_by_the_delimiter_alone(model):
  response = _one(model, "abc|")
  assert (response.thinking, response.forced, response.num_ignored) == ("abc", "none", 0)
  assert (response.answer, response.finish_reason) == ("=3", "stop")
  assert model.prompts() == [["abc|("], ["abc|(abc)"]]
  assert response.sampled_tokens == 3 + 2


def test_a_thought_at_its_maximum_is_closed_on_a_new_line(model):
  response = _one(model, "abcdef|", max_tokens=4)
  assert (response.thinking, response.forced) == ("abcd", "max")
  assert model.prompts()[-1] == ["abcdef|(abcd\n)\nA:"]
  assert (response.answer_start, response.answer) == ("\n\nA:", "=4")


def test_no_newline_is_added_where_the_thought_ends_with_one(model):
  response = _one(model, "abc\ndef|", max_tokens=4)
  assert (response.thinking, response.forced) == ("abc\n", "max")
  assert model.prompts()[-1] == ["abc\ndef|(abc\n)\nA:"]


@pytest.mark.parametrize(
  ("num_ignored", "thought", "forced"),
  [(0, "ab", "none"), (1, "abWab", "min"), (2, "abWabWab", "min")],
)
def test_as_many_ends_are_suppressed_as_requested(model, num_ignored, thought, forced):
  response = _one(model, "ab|", num_ignored=num_ignored)
  assert (response.thinking, response.forced) == (thought, forced)
  assert response.num_ignored == num_ignored
  assert model.prompts()[-1] == [f"ab|({thought})"]
  assert response.answer == f"={len(thought)}"
  assert len(model.batches) == num_ignored + 2


def test_a_continuation_may_use_only_what_is_left_of_the_budget(model):
  response = _one(model, "abcd|", max_tokens=8, num_ignored=2)
  assert (response.thinking, response.forced, response.num_ignored) == ("abcdWabc", "max", 1)
  assert [batch[0].max_tokens for batch in model.batches] == [8, 3, 5]
  assert response.sampled_tokens == 4 + 3 + 2
  assert model.prompts()[-1] == ["abcd|(abcdWabc\n)\nA:"]


def test_a_replaced_end_does_not_exceed_the_maximum(model):
  model.format = dataclasses.replace(model.format, ignore="Wait")
  response = _one(model, "abcd|", max_tokens=5, num_ignored=1)
  assert (response.thinking, response.forced, response.num_ignored) == ("abcdW", "max", 1)
  assert len(model.batches) == 2


def test_ends_are_suppressed_until_the_thought_has_its_minimum_length(model):
  response = _one(model, "abc|", min_tokens=9)
  assert (response.thinking, response.num_ignored, response.forced) == ("abcWabcWabc", 2, "min")
  assert _one(model, "abc|", min_tokens=3).thinking == "abc"
  # the count asks for more than the tokens do
  assert _one(model, "abc|", min_tokens=3, num_ignored=1).thinking == "abcWabc"


def test_each_suppression_is_followed_by_a_new_token(model):
  response = _one(model, "|", min_tokens=6)
  assert response.thinking == ".W.W.W."
  assert _one(model, "|").thinking == ""


def test_no_end_is_sampled_before_min_unstopped_tokens(model):
  response = _one(model, "ab|", min_unstopped_tokens=6)
  assert (response.thinking, response.forced) == ("ab.ab.ab", "none")


def test_stop_tokens_are_never_part_of_a_thought(model):
  questions = [model.question("?", id_=str(n)) for n in range(40)]
  for response in _respond(model, questions, num_ignored=3, min_tokens=6):
    assert "|" not in response.thinking
    assert model.decode(response.thinking_tokens) == response.thinking
    assert len(response.thinking_tokens) <= 20


def test_a_response_depends_on_its_question_and_sample_alone(model):
  questions = [model.question("?", id_=f"question {n}") for n in range(12)]
  options = dict(num_samples=3, num_ignored=1, sampling=SamplingConfig(), seed=7)
  expected = _respond(model, questions, **options)
  assert [(r.question_id, r.sample) for r in expected[:4]] == [
    ("question 0", 0),
    ("question 0", 1),
    ("question 0", 2),
    ("question 1", 0),
  ]
  assert len({r.thinking for r in expected}) > 30
  shuffled = random.Random(0).sample(questions, 5)
  found = {(r.question_id, r.sample): r for r in _respond(model, shuffled, **options)}
  assert found == {
    (r.question_id, r.sample): r for r in expected if (r.question_id, r.sample) in found
  }
  assert _respond(model, questions, **options | {"seed": 8}) != expected


def test_a_smaller_maximum_cuts_the_same_thought(model):
  questions = [model.question("?", id_=str(n)) for n in range(20)]
  long, short = (
    _respond(model, questions, sampling=SamplingConfig(), max_tokens=n) for n in (20, 4)
  )
  assert [r.thinking[:4] for r in long] == [r.thinking for r in short]
  assert {r.forced for r in short} == {"none", "max"}


def test_samples_of_one_question_are_adjacent_and_share_a_prefill(model):
  questions = [model.question("ab|", id_="a"), model.question("cd|", id_="b")]
  _respond(model, questions, num_samples=2)
  assert model.prompts()[0] == ["ab|(", "ab|(", "cd|(", "cd|("]
  assert [request.sample for request in model.batches[0]] == [0, 1, 0, 1]


def test_a_row_that_fails_has_an_error_and_affects_no_other(model):
  failed, fine = _respond(model, [model.question("!", "a"), model.question("ab|", "b")])
  assert (failed.error, failed.answer, failed.finish_reason) == ("NaN in the logits", "", None)
  assert (fine.error, fine.answer) == (None, "=2")
  assert len(model.batches[-1]) == 1


def test_an_automatic_maximum_fills_the_window_of_the_longest_prompt(model):
  questions = [model.question("ab|", "a"), model.question("abcdef|", "b")]

  def fit(max_tokens, **options):
    options = dict(max_answer_tokens=5, window=200) | options
    budget = BudgetConfig(max_tokens=max_tokens, num_ignored=2)
    fitted = budget_forcing.fit(budget, questions, model.tokens, **options)
    assert fitted.num_ignored == 2
    return fitted.max_tokens

  assert fit(None) == 200 - 7 - len("(") - len("\n)\nA:") - 100
  assert fit(None, max_answer_tokens=130) == 200 - 7 - 6 - 130
  assert fit(182) == 182
  with pytest.raises(ValueError, match="needs a window of 201, but the window has 200"):
    fit(183)
  with pytest.raises(ValueError, match="a window of 110 tokens leaves none to think"):
    fit(None, window=110)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"max_tokens": 0}, "max_tokens"),
    ({"num_ignored": -1}, "num_ignored"),
    ({"min_tokens": 21}, "min_tokens=21 must be between 0 and max_tokens=20"),
    ({"min_unstopped_tokens": 30}, "min_unstopped_tokens=30"),
  ],
)
def test_an_impossible_budget_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    BudgetConfig(**{"max_tokens": 20} | options)


def test_random_numbers_are_those_of_earlier_versions(model):
  # Responses of runs that were made before would change otherwise.
  _respond(model, [model.question("ab|", id_="question 7")], num_ignored=1)
  assert [batch[0].record_id for batch in model.batches] == [
    3340342209595908003,
    2990887466483626768,
    14150941185131165800,
  ]


def test_a_model_that_returns_no_token_ids_is_refused(model):
  reply = model._reply
  model._reply = lambda request: dataclasses.replace(reply(request), tokens=None)
  with pytest.raises(ValueError, match="fake returns no token ids"):
    _one(model, "ab|")
