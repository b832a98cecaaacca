"""What budget forcing is compared with: other ways to spend more or less compute on a question.

Rejection sampling and prompts that ask for a length (s1; arXiv 2501.19393, 3.2), and many thoughts
side by side with a vote on their answers. A prompt that asks for a length goes with all the others.
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Sequence

from selfimprove_jax.sampling import thinking
from selfimprove_jax.sampling.requests import Completion
from selfimprove_jax.sampling.sampler import SamplingConfig

STEP_TOKENS = 100
"""Of one step, in the step-conditional control."""
LENGTHS = {
  "short": "Think only for a short time before you answer.",
  "long": "Think for a long time before you answer.",
}


def token_conditional(num_tokens: int) -> str:
  """Asks for at most so many tokens of thinking."""
  _check_positive("num_tokens", num_tokens)
  return f"Think for up to {num_tokens} tokens before you answer."


def step_conditional(num_steps: int) -> str:
  """Asks for at most so many steps of about `STEP_TOKENS` tokens each."""
  _check_positive("num_steps", num_steps)
  return f"Think in up to {num_steps} steps before you answer, each of about {STEP_TOKENS} tokens."


def class_conditional(length: str) -> str:
  """Asks for a "short" or a "long" thought.

  Raises:
    ValueError: another one.
  """
  if length not in LENGTHS:
    raise ValueError(f"length={length!r} is unknown; there are {sorted(LENGTHS)}")
  return LENGTHS[length]


def _check_positive(name, number):
  if number < 1:
    raise ValueError(f"{name}={number} must be at least 1")


_CONDITIONS = {"token": token_conditional, "step": step_conditional, "class": class_conditional}


def instruction(*, kind: str, amount: int | str) -> str:
  """What a conditional control asks for: "token" and "step" of a number, "class" of a word.

  Raises:
    ValueError: there is no such kind, or the amount is none of its.
  """
  if kind not in _CONDITIONS:
    raise ValueError(f"kind={kind!r} is unknown; there are {sorted(_CONDITIONS)}")
  if isinstance(amount, str) != (kind == "class"):
    raise ValueError(f"amount={amount!r} does not fit kind={kind!r}")
  return _CONDITIONS[kind](amount)


def think_within(
  questions: Sequence[thinking.Question],
  generate: thinking.Generate,
  *,
  tokens: thinking.ThinkingTokens,
  max_tokens: int,
  max_answer_tokens: int,
  max_tries: int,
  num_slots: int,
  sampling: SamplingConfig,
  seed: int,
  decode: thinking.Decode,
) -> list[thinking.Response]:
  """Rejection sampling: thoughts are drawn until one ends by itself within `max_tokens`.

  A try has at most `max_tokens + 1` tokens, so that one that ends just in time is seen to. Slots
  that are free draw several tries of a question at once; the one of the lowest number that fits is
  kept, so the number of slots changes no response.

  Differs from the reference, which tries for ever: after `max_tries` a question has no answer, and
  its response is `rejected`.

  Args:
    max_tries: for each question.
    num_slots: requests that are worth sending at a time.

  Raises:
    ValueError: the temperature is 0, at which all tries are one; or two questions have one id.
  """
  if sampling.temperature == 0:
    raise ValueError("temperature=0 draws the same thought at every try; it must be above 0")
  for name, number in (("max_tokens", max_tokens), ("max_tries", max_tries)):
    _check_positive(name, number)
  rows = thinking.make_rows(questions, 1)
  open_rows, num_tried = rows, 0
  while open_rows and num_tried < max_tries:
    tries = range(num_tried, min(max_tries, num_tried + max(1, num_slots // len(open_rows))))
    requests = [
      row.request(
        tokens.start,
        "try",
        sample=number,
        max_new_tokens=max_tokens + 1,
        stop_ids=tokens.stop_ids,
        sampling=sampling,
        seed=seed,
      )
      for row in open_rows
      for number in tries
    ]
    completions = generate(requests)
    size = len(tries)
    open_rows = [
      row
      for index, row in enumerate(open_rows)
      if not _is_settled(row, completions[index * size : (index + 1) * size], max_tokens)
    ]
    num_tried = tries.stop
  for row in open_rows:
    row.forced = "rejected"
  return thinking.answer(
    rows,
    generate,
    tokens=tokens,
    max_answer_tokens=max_answer_tokens,
    sampling=sampling,
    seed=seed,
    decode=decode,
  )


def _is_settled(row: thinking.Row, tries: Sequence[Completion], max_tokens: int) -> bool:
  """Takes the first try that fits; whether there is one, or a try that failed."""
  for completion in tries:
    if not row.note(completion):
      return True
    if completion.finish_reason == "stop" and len(completion.tokens) <= max_tokens:
      row.thought = list(completion.tokens)
      return True
  return False


@dataclasses.dataclass(frozen=True)
class Vote:
  """A majority vote: the index of a sample that gave the answer, and how many gave it."""

  index: int
  num_votes: int


def majority_vote(answers: Sequence[Hashable | None]) -> Vote | None:
  """The answer that most samples gave, named by the first sample that gave it.

  Of answers with as many votes the one that was given first wins, in the samples' order: any other
  rule would look at what the answers say. A sample without an answer (None) does not vote.

  Args:
    answers: of one question, in a form in which what counts as one answer is equal.

  Returns:
    None where no sample has an answer.
  """
  votes = Counter(answer for answer in answers if answer is not None)
  if not votes:
    return None
  ((answer, num_votes),) = votes.most_common(1)  # of equals the one that came first
  return Vote(list(answers).index(answer), num_votes)
