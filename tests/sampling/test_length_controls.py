"""Rejection sampling, prompts that ask for a length, and votes."""

import pytest

from selfimprove_jax.sampling import length_controls
from selfimprove_jax.sampling.length_controls import Vote, majority_vote
from selfimprove_jax.sampling.sampler import SamplingConfig


def _within(thinker, questions, **options):
  defaults = dict(
    max_tokens=4,
    max_answer_tokens=5,
    max_tries=6,
    num_slots=1,
    sampling=SamplingConfig(),
    seed=0,
  )
  return length_controls.think_within(
    questions,
    thinker.generate,
    tokens=thinker.tokens,
    decode=thinker.decode,
    **defaults | options,
  )


def test_thoughts_that_are_too_long_are_drawn_again_until_one_fits(thinker):
  questions = [thinker.question("?", id_=str(n)) for n in range(30)]
  responses = _within(thinker, questions, max_tries=200)
  assert all(len(r.thinking) <= 4 and r.forced == "none" and r.answer for r in responses)
  sizes = [len(batch) for batch in thinker.batches[:-1]]
  assert sizes[0] == 30 and sizes == sorted(sizes, reverse=True) and len(sizes) > 3
  assert all(request.max_new_tokens == 5 for batch in thinker.batches[:-1] for request in batch)


def test_a_thought_of_just_the_maximum_is_kept_and_one_token_more_is_not(thinker):
  kept, dropped = _within(
    thinker, [thinker.question("abcd|", "a"), thinker.question("abcde|", "b")], max_tries=3
  )
  assert (kept.thinking, kept.forced, kept.sampled_tokens) == ("abcd", "none", 4 + 2)
  assert (dropped.thinking, dropped.forced, dropped.answer) == ("", "rejected", "")
  assert dropped.sampled_tokens == 3 * 5


def test_tries_are_bounded(thinker):
  (response,) = _within(thinker, [thinker.question("abcdefgh|")], max_tries=5, num_slots=2)
  assert response.forced == "rejected"
  assert sum(len(batch) for batch in thinker.batches) == 5


def test_free_slots_are_used_for_several_tries_and_change_no_response(thinker):
  questions = [thinker.question("?", id_=str(n)) for n in range(10)]
  one_by_one = _within(thinker, questions, max_tries=50)
  num_batches = len(thinker.batches)
  assert _within(thinker, questions, max_tries=50, num_slots=64) == one_by_one
  assert len(thinker.batches) - num_batches < num_batches


def test_a_try_that_fails_is_not_repeated(thinker):
  (response,) = _within(thinker, [thinker.question("!")])
  assert (response.error, response.forced) == ("NaN in the logits", "none")
  assert len(thinker.batches) == 1


def test_greedy_tries_would_all_be_one(thinker):
  with pytest.raises(ValueError, match="temperature=0 draws the same thought at every try"):
    _within(thinker, [thinker.question("?")], sampling=SamplingConfig(temperature=0.0))


def test_controls_ask_for_a_length():
  assert "up to 512 tokens" in length_controls.token_conditional(512)
  assert "up to 8 steps" in length_controls.step_conditional(8)
  assert length_controls.class_conditional("short") != length_controls.class_conditional("long")
  with pytest.raises(
    ValueError, match=r"length='medium' is unknown; there are \['long', 'short'\]"
  ):
    length_controls.class_conditional("medium")
  with pytest.raises(ValueError, match="num_tokens=0"):
    length_controls.token_conditional(0)


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
def test_the_answer_that_most_samples_gave_wins(answers, vote):
  assert majority_vote(answers) == vote
