"""Baselines of budget forcing: other ways to spend more or less compute on a question.

Rejection sampling and prompts that ask for a length (s1; arXiv 2501.19393, 3.2), and parallel
samples with a majority vote on their answers. Prompts that ask for a length can be combined with
each of the others.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from selfimprove_jax.language_models import Reply
from selfimprove_jax.reasoning import thinking
from selfimprove_jax.reasoning.thinking import Question, Response, Row, Thinker
from selfimprove_jax.runtime.config import section

_INSTRUCTIONS = {
  "none": "",
  "token": "Think for up to {} tokens before you answer.",
  "step": "Think in up to {} steps before you answer, each of about 100 tokens.",
  "short": "Think only for a short time before you answer.",
  "long": "Think for a long time before you answer.",
}


@section
class ConditionConfig:
  """A prompt that asks for a length of thinking, in addition to the question.

  Attributes:
    kind: "none"; "token" and "step" ask for at most `amount` tokens, or steps of about 100 tokens;
      "short" and "long" ask in words (class-conditional control).
    amount: number of tokens or steps; 0 for the other kinds.
  """

  kind: Literal["none", "token", "step", "short", "long"] = "none"
  amount: Annotated[int, Field(ge=0)] = 0

  def __post_init__(self) -> None:
    if (self.amount > 0) != (self.kind in ("token", "step")):
      raise ValueError(
        f"amount={self.amount} does not fit kind={self.kind!r}: it must be at least 1 for 'token' "
        f"and 'step', and 0 for the others"
      )

  @property
  def instruction(self) -> str:
    """The sentence of the prompt; empty for "none"."""
    return _INSTRUCTIONS[self.kind].format(self.amount)


def think_within(
  questions: Sequence[Question],
  thinker: Thinker,
  *,
  max_tokens: int,
  max_answer_tokens: int,
  max_tries: int,
  num_slots: int,
) -> list[Response]:
  """Rejection sampling: samples thoughts until one ends by itself within `max_tokens`.

  A try may have `max_tokens + 1` tokens, so that an end just in time is seen. Free slots sample
  several tries of a question at once, and the first try that fits is kept, so the number of slots
  does not change a response.

  Differs from the reference, which never gives up: after `max_tries` a question has no answer, and
  its response is `rejected`.

  Raises:
    ValueError: the temperature is 0, at which all tries are equal.
  """
  if thinker.sampling.temperature == 0:
    raise ValueError("temperature=0 draws the same thought at every try; it must be above 0")
  rows = thinking.make_rows(questions, 1)
  open_rows, num_tried = rows, 0
  while open_rows and num_tried < max_tries:
    tries = range(num_tried, min(max_tries, num_tried + max(1, num_slots // len(open_rows))))
    replies = thinker.generate(
      thinker.request(
        row,
        "try",
        sample=number,
        max_tokens=max_tokens + 1,
        stop_ids=thinker.tokens.stop_ids,
      )
      for row in open_rows
      for number in tries
    )
    size = len(tries)
    open_rows = [
      row
      for index, row in enumerate(open_rows)
      if not _is_settled(row, replies[index * size : (index + 1) * size], max_tokens)
    ]
    num_tried = tries.stop
  for row in open_rows:
    row.forced = "rejected"
  return thinker.answer(rows, max_tokens=max_answer_tokens)


def _is_settled(row: Row, tries: Sequence[Reply], max_tokens: int) -> bool:
  """Keeps the first try that fits; returns whether one fits or failed."""
  for reply in tries:
    # Tries after the kept one are not counted: one slot alone would not have sampled them.
    if not row.note(reply):
      return True
    if reply.finish_reason == "stop" and len(reply.tokens) <= max_tokens:
      row.thought = list(reply.tokens)
      return True
  return False


class Vote(NamedTuple):
  """A majority vote: the first sample that gave the winning answer, and how many gave it."""

  index: int
  num_votes: int


def majority_vote(answers: Sequence[Hashable | None]) -> Vote | None:
  """Finds the answer that most samples gave; returns None if no sample has an answer.

  Ties go to the answer that was given first, in the samples' order: any other rule would depend on
  the answers' content. A sample without an answer (None) does not vote.

  Args:
    answers: answers to one question, normalized so that equivalent answers are equal.
  """
  votes = Counter(answer for answer in answers if answer is not None)
  if not votes:
    return None
  [(answer, num_votes)] = votes.most_common(1)  # the first one among equals
  return Vote(list(answers).index(answer), num_votes)
