"""Budget forcing on a scripted model whose thoughts end where a question says."""

import dataclasses
import random

import pytest

from selfimprove_jax.sampling import budget_forcing
from selfimprove_jax.sampling.budget_forcing import Budget
from selfimprove_jax.sampling.sampler import SamplingConfig

_GREEDY = SamplingConfig(temperature=0.0)


def _respond(thinker, questions, *, num_samples=1, sampling=_GREEDY, seed=0, **budget):
  return budget_forcing.think_and_answer(
    questions,
    thinker.generate,
    tokens=thinker.tokens,
    budget=Budget(**{"max_tokens": 20, "max_answer_tokens": 5} | budget),
    sampling=sampling,
    seed=seed,
    num_samples=num_samples,
    decode=thinker.decode,
  )


def _one(thinker, text, **budget):
  (response,) = _respond(thinker, [thinker.question(text)], **budget)
  return response


def test_a_thought_that_ends_by_itself_is_closed_by_the_delimiter_alone(thinker):
  response = _one(thinker, "abc|")
  assert (response.thinking, response.forced, response.num_ignored) == ("abc", "none", 0)
  assert (response.answer, response.finish_reason) == ("=3", "stop")
  assert thinker.prompts() == [["abc|("], ["abc|(abc)"]]
  assert response.sampled_tokens == 3 + 2


def test_a_thought_at_its_maximum_is_closed_and_asked_for_the_answer_on_a_line_of_its_own(thinker):
  response = _one(thinker, "abcdef|", max_tokens=4)
  assert (response.thinking, response.forced) == ("abcd", "max")
  assert thinker.prompts()[-1] == ["abcdef|(abcd\n)\nA:"]
  assert (response.answer_start, response.answer) == ("\n\nA:", "=4")


def test_no_newline_is_added_where_the_thought_ends_with_one(thinker):
  response = _one(thinker, "abc\ndef|", max_tokens=4)
  assert (response.thinking, response.forced) == ("abc\n", "max")
  assert thinker.prompts()[-1] == ["abc\ndef|(abc\n)\nA:"]


@pytest.mark.parametrize(
  ("num_ignored", "thought", "forced"),
  [(0, "ab", "none"), (1, "abWab", "min"), (2, "abWabWab", "min")],
)
def test_ends_are_suppressed_as_often_as_is_asked_for(thinker, num_ignored, thought, forced):
  response = _one(thinker, "ab|", num_ignored=num_ignored)
  assert (response.thinking, response.forced) == (thought, forced)
  assert response.num_ignored == num_ignored
  assert thinker.prompts()[-1] == [f"ab|({thought})"]
  assert response.answer == f"={len(thought)}"
  assert len(thinker.batches) == num_ignored + 2


def test_a_continuation_may_use_only_what_is_left_of_the_budget(thinker):
  response = _one(thinker, "abcd|", max_tokens=8, num_ignored=2)
  assert (response.thinking, response.forced, response.num_ignored) == ("abcdWabc", "max", 1)
  assert [batch[0].max_new_tokens for batch in thinker.batches] == [8, 3, 5]
  assert response.sampled_tokens == 4 + 3 + 2
  assert thinker.prompts()[-1] == ["abcd|(abcdWabc\n)\nA:"]


def test_what_takes_the_place_of_an_end_does_not_exceed_the_maximum(thinker):
  thinker.format = dataclasses.replace(thinker.format, ignore="Wait")
  response = _one(thinker, "abcd|", max_tokens=5, num_ignored=1)
  assert (response.thinking, response.forced, response.num_ignored) == ("abcdW", "max", 1)
  assert len(thinker.batches) == 2


def test_ends_are_suppressed_until_the_thought_has_as_many_tokens_as_is_asked_for(thinker):
  response = _one(thinker, "abc|", min_tokens=9)
  assert (response.thinking, response.num_ignored, response.forced) == ("abcWabcWabc", 2, "min")
  assert _one(thinker, "abc|", min_tokens=3).thinking == "abc"
  # the count asks for more than the tokens do
  assert _one(thinker, "abc|", min_tokens=3, num_ignored=1).thinking == "abcWabc"


def test_a_model_that_would_end_at_once_says_something_new_after_each_suppression(thinker):
  response = _one(thinker, "|", min_tokens=6)
  assert response.thinking == ".W.W.W."
  assert _one(thinker, "|").thinking == ""


def test_before_the_least_number_of_unstopped_tokens_no_end_is_drawn(thinker):
  response = _one(thinker, "ab|", min_unstopped_tokens=6)
  assert (response.thinking, response.forced) == ("ab.ab.ab", "none")


def test_stop_tokens_are_never_part_of_a_thought(thinker):
  questions = [thinker.question("?", id_=str(n)) for n in range(40)]
  for response in _respond(thinker, questions, num_ignored=3, min_tokens=6):
    assert "|" not in response.thinking
    assert thinker.decode(response.thinking_tokens) == response.thinking
    assert len(response.thinking_tokens) <= 20


def test_a_response_depends_on_its_question_and_sample_alone(thinker):
  questions = [thinker.question("?", id_=f"question {n}") for n in range(12)]
  options = dict(num_samples=3, num_ignored=1, sampling=SamplingConfig(), seed=7)
  expected = _respond(thinker, questions, **options)
  assert [(r.question_id, r.sample) for r in expected[:4]] == [
    ("question 0", 0),
    ("question 0", 1),
    ("question 0", 2),
    ("question 1", 0),
  ]
  assert len({r.thinking for r in expected}) > 30
  shuffled = random.Random(0).sample(questions, 5)
  found = {(r.question_id, r.sample): r for r in _respond(thinker, shuffled, **options)}
  assert found == {
    (r.question_id, r.sample): r for r in expected if (r.question_id, r.sample) in found
  }
  assert _respond(thinker, questions, **options | {"seed": 8}) != expected


def test_a_smaller_maximum_cuts_the_same_thought(thinker):
  questions = [thinker.question("?", id_=str(n)) for n in range(20)]
  long, short = (
    _respond(thinker, questions, sampling=SamplingConfig(), max_tokens=n) for n in (20, 4)
  )
  assert [r.thinking[:4] for r in long] == [r.thinking for r in short]
  assert {r.forced for r in short} == {"none", "max"}


def test_samples_of_one_question_stand_together_so_that_they_share_a_prefill(thinker):
  questions = [thinker.question("ab|", id_="a"), thinker.question("cd|", id_="b")]
  _respond(thinker, questions, num_samples=2)
  assert thinker.prompts()[0] == ["ab|(", "ab|(", "cd|(", "cd|("]
  assert [request.sample for request in thinker.batches[0]] == [0, 1, 0, 1]


def test_a_row_that_fails_says_why_and_harms_no_other(thinker):
  failed, fine = _respond(thinker, [thinker.question("!", "a"), thinker.question("ab|", "b")])
  assert (failed.error, failed.answer, failed.finish_reason) == ("NaN in the logits", "", None)
  assert (fine.error, fine.answer) == (None, "=2")
  assert len(thinker.batches[-1]) == 1


def test_an_automatic_maximum_is_what_the_longest_prompt_leaves_of_the_window(thinker):
  questions = [thinker.question("ab|", "a"), thinker.question("abcdef|", "b")]

  def fit(max_tokens, **options):
    options = dict(max_answer_tokens=5, window=200) | options
    return budget_forcing.fit_max_tokens(max_tokens, questions, thinker.tokens, **options)

  assert fit("auto") == 200 - 7 - len("(") - len("\n)\nA:") - 100
  assert fit("auto", max_answer_tokens=130) == 200 - 7 - 6 - 130
  assert fit(182) == 182
  with pytest.raises(ValueError, match="needs a window of 201, but there are 200"):
    fit(183)
  with pytest.raises(ValueError, match="a window of 110 tokens leaves none to think"):
    fit("auto", window=110)
  with pytest.raises(ValueError, match="'all' must be a number of tokens or 'auto'"):
    fit("all")


@pytest.mark.parametrize(
  ("options", "told"),
  [
    ({"max_tokens": 0}, "max_tokens and max_answer_tokens must be at least 1"),
    ({"num_ignored": -1}, "num_ignored at least 0"),
    ({"min_tokens": 21}, "min_tokens=21 must be between 0 and max_tokens=20"),
    ({"min_unstopped_tokens": 30}, "min_unstopped_tokens=30"),
  ],
)
def test_a_budget_that_makes_no_sense_is_refused(options, told):
  with pytest.raises(ValueError, match=told):
    Budget(**{"max_tokens": 20, "max_answer_tokens": 5} | options)
