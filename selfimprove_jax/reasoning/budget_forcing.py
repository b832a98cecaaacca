"""Budget forcing: bounds on the length of thinking, kept in decoding (s1; arXiv 2501.19393, 3.1).

Maximum: a thought that reaches its budget is closed, and the answer is sampled. Minimum: if the
model ends its thinking too early, the end is dropped and replaced by "Wait".

In each round, all rows that still think are one batch. A row's response does not depend on the
other rows, and different maxima cut the same thought at different places.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from selfimprove_jax.language_models import Reply
from selfimprove_jax.reasoning import thinking
from selfimprove_jax.reasoning.thinking import Question, Response, Row, Thinker, ThinkingTokens
from selfimprove_jax.runtime.config import section

_AUTO_RESERVE = 100  # tokens that the reference leaves for the answer after an automatic budget


@section
class BudgetConfig:
  """Bounds on a model's thinking, in tokens between the delimiters.

  Attributes:
    max_tokens: a thought that reaches it is closed by force; None for what the longest prompt
      leaves of the model's window.
    num_ignored: number of ends that are suppressed (the paper's method), while the budget lasts.
    min_tokens: ends are suppressed while the thought is shorter.
    min_unstopped_tokens: no end is sampled before this many tokens, so there is none to suppress.
  """

  max_tokens: Annotated[int, Field(ge=1)] | None = None
  num_ignored: Annotated[int, Field(ge=0)] = 0
  min_tokens: Annotated[int, Field(ge=0)] = 0
  min_unstopped_tokens: Annotated[int, Field(ge=0)] = 0

  def __post_init__(self) -> None:
    for name in ("min_tokens", "min_unstopped_tokens"):
      if self.max_tokens is not None and getattr(self, name) > self.max_tokens:
        raise ValueError(
          f"{name}={getattr(self, name)} must be between 0 and max_tokens={self.max_tokens}"
        )


def fit(
  budget: BudgetConfig,
  questions: Sequence[Question],
  tokens: ThinkingTokens,
  *,
  max_answer_tokens: int,
  window: int,
) -> BudgetConfig:
  """Returns the budget with `max_tokens` as a number that fits into the window.

  Differs from the reference: an automatic maximum leaves room for the whole answer, not for 100
  tokens of it, which is the minimum here.

  Args:
    window: maximum number of tokens of a prompt with its new tokens.

  Raises:
    ValueError: the thinking does not fit, or the window leaves no room to think.
  """
  longest = max(len(question.prompt) for question in questions)
  tail = max(len(tokens.newline) + len(tokens.forced_end), len(tokens.end))
  around = longest + len(tokens.start) + tail
  if budget.max_tokens is None:
    reserve = max(_AUTO_RESERVE, max_answer_tokens)
    if around + reserve >= window:
      raise ValueError(
        f"a window of {window} tokens leaves none to think: the longest prompt has {longest}, the "
        f"delimiters {around - longest}, and {reserve} are reserved for the answer"
      )
    return dataclasses.replace(budget, max_tokens=window - around - reserve)
  if (needed := around + budget.max_tokens + max_answer_tokens) > window:
    raise ValueError(
      f"max_tokens={budget.max_tokens} does not fit: with the longest prompt ({longest} tokens), "
      f"the delimiters and {max_answer_tokens} tokens of answer it needs a window of {needed}, but "
      f"the window has {window}"
    )
  return budget


def think_and_answer(
  questions: Sequence[Question],
  thinker: Thinker,
  *,
  budget: BudgetConfig,
  max_answer_tokens: int,
  num_samples: int,
) -> list[Response]:
  """Samples thoughts within a budget, and their answers: all samples of each question in turn.

  Differs from the reference: a round of continuation may use what is left of the budget, not all of
  it again, so nothing is sampled that would be cut off.

  Args:
    budget: as `fit` returns it.
  """
  rows = thinking.make_rows(questions, num_samples)
  # With suppressed ends, a round of no tokens would put one "Wait" directly after another.
  least = int(budget.num_ignored > 0 or budget.min_tokens > 0)
  open_rows, round_number = rows, 0
  while open_rows:
    replies = thinker.generate(
      thinker.request(
        row,
        f"thought {round_number}",
        max_tokens=budget.max_tokens - len(row.thought),
        min_tokens=max(least, budget.min_unstopped_tokens - len(row.thought)),
        stop_ids=thinker.tokens.stop_ids,
      )
      for row in open_rows
    )
    open_rows = [
      row
      for row, reply in zip(open_rows, replies, strict=True)
      if _continues(row, reply, thinker.tokens, budget)
    ]
    round_number += 1
  return thinker.answer(rows, max_tokens=max_answer_tokens)


def _continues(row: Row, reply: Reply, tokens: ThinkingTokens, budget: BudgetConfig) -> bool:
  """Appends a round to a row's thought; returns whether another round follows."""
  row.thought += reply.tokens or ()
  if not row.note(reply):
    return False
  if reply.finish_reason == "length":
    row.forced = "max"
    return False
  if row.num_ignored >= budget.num_ignored and len(row.thought) >= budget.min_tokens:
    return False
  row.thought += tokens.ignore
  row.num_ignored += 1
  # The replacement itself may exceed the budget: it is cut like any other token.
  del row.thought[budget.max_tokens :]
  row.forced = "max" if len(row.thought) == budget.max_tokens else "min"
  return row.forced == "min"
