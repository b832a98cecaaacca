"""Budget forcing: bounds on how long a model thinks, kept in decoding (s1; arXiv 2501.19393, 3.1).

Maximum: where the thinking has used its budget it is closed, and the answer is asked for. Minimum:
where the model would end its thinking, the end is dropped and "Wait" is put in its place.

All rows that still think form one batch for each round of continuation. What a row says does not
depend on the rows beside it, and different maxima cut the same thought at different places.
"""

import dataclasses
from collections.abc import Sequence

from selfimprove_jax.sampling import thinking
from selfimprove_jax.sampling.requests import Completion
from selfimprove_jax.sampling.sampler import SamplingConfig

_AUTO_RESERVE = 100  # tokens that the reference keeps free behind an automatic budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """How long a model may and must think, in tokens between the delimiters.

  Attributes:
    max_tokens: a thought that reaches it is closed by force.
    max_answer_tokens: of the answer behind it.
    num_ignored: so many ends are suppressed (the paper's way), while the budget lasts.
    min_tokens: ends are suppressed while the thought is shorter.
    min_unstopped_tokens: before so many no end is drawn, so that there is none to suppress.
  """

  max_tokens: int
  max_answer_tokens: int
  num_ignored: int = 0
  min_tokens: int = 0
  min_unstopped_tokens: int = 0

  def __post_init__(self):
    if self.max_tokens < 1 or self.max_answer_tokens < 1 or self.num_ignored < 0:
      raise ValueError(
        f"{self}: max_tokens and max_answer_tokens must be at least 1, num_ignored at least 0"
      )
    for name in ("min_tokens", "min_unstopped_tokens"):
      if not 0 <= getattr(self, name) <= self.max_tokens:
        raise ValueError(
          f"{name}={getattr(self, name)} must be between 0 and max_tokens={self.max_tokens}"
        )


def fit_max_tokens(
  max_tokens: int | str,
  questions: Sequence[thinking.Question],
  tokens: thinking.ThinkingTokens,
  *,
  max_answer_tokens: int,
  window: int,
) -> int:
  """The maximum of thinking as a number, seen to fit into the window.

  Args:
    max_tokens: a number; or "auto" for what the longest prompt leaves of the window. The reference
      keeps 100 tokens free behind it; we keep as many as the answer may have, and at least those.
    window: prompt and new tokens of one request, at most.

  Raises:
    ValueError: it does not fit, or "auto" leaves nothing.
  """
  longest = max(len(question.prompt) for question in questions)
  tail = max(len(tokens.newline) + len(tokens.forced_end), len(tokens.end))
  around = longest + len(tokens.start) + tail
  if max_tokens == "auto":
    reserve = max(_AUTO_RESERVE, max_answer_tokens)
    if around + reserve >= window:
      raise ValueError(
        f"a window of {window} tokens leaves none to think: the longest prompt has {longest}, the "
        f"delimiters {around - longest}, and {reserve} are kept for the answer"
      )
    return window - around - reserve
  if isinstance(max_tokens, str):
    raise ValueError(f"max_tokens={max_tokens!r} must be a number of tokens or 'auto'")
  if (needed := around + max_tokens + max_answer_tokens) > window:
    raise ValueError(
      f"max_tokens={max_tokens} does not fit: with the longest prompt ({longest} tokens), the "
      f"delimiters and {max_answer_tokens} tokens of answer it needs a window of {needed}, but "
      f"there are {window}"
    )
  return max_tokens


def think_and_answer(
  questions: Sequence[thinking.Question],
  generate: thinking.Generate,
  *,
  tokens: thinking.ThinkingTokens,
  budget: Budget,
  sampling: SamplingConfig,
  seed: int,
  num_samples: int,
  decode: thinking.Decode,
) -> list[thinking.Response]:
  """Thoughts within a budget, and their answers.

  Differs from the reference: a round of continuation may use what is left of the budget, not the
  whole of it again, so nothing is sampled to be cut off.

  Args:
    num_samples: independent responses to each question.

  Returns:
    All samples of the first question, then of the next.

  Raises:
    ValueError: two questions have one id.
  """
  rows = thinking.make_rows(questions, num_samples)
  open_rows, round_number = rows, 0
  while open_rows:
    requests = [
      row.request(
        (*tokens.start, *row.thought),
        f"thought {round_number}",
        max_new_tokens=budget.max_tokens - len(row.thought),
        min_new_tokens=_min_new_tokens(budget, len(row.thought)),
        stop_ids=tokens.stop_ids,
        sampling=sampling,
        seed=seed,
      )
      for row in open_rows
    ]
    completions = generate(requests)
    open_rows = [
      row
      for row, completion in zip(open_rows, completions, strict=True)
      if _continues(row, completion, tokens, budget)
    ]
    round_number += 1
  return thinking.answer(
    rows,
    generate,
    tokens=tokens,
    max_answer_tokens=budget.max_answer_tokens,
    sampling=sampling,
    seed=seed,
    decode=decode,
  )


def _min_new_tokens(budget: Budget, num_tokens: int) -> int:
  # Where ends are suppressed a round must bring something new, or "Wait" would follow on "Wait".
  suppresses = budget.num_ignored > 0 or budget.min_tokens > 0
  return max(int(suppresses), budget.min_unstopped_tokens - num_tokens)


def _continues(
  row: thinking.Row, completion: Completion, tokens: thinking.ThinkingTokens, budget: Budget
) -> bool:
  """Adds a round to a row's thought; whether another follows."""
  row.thought += completion.tokens
  if not row.note(completion):
    return False
  if completion.finish_reason == "length":
    row.forced = "max"
    return False
  if row.num_ignored >= budget.num_ignored and len(row.thought) >= budget.min_tokens:
    return False
  row.thought += tokens.ignore
  row.num_ignored += 1
  row.forced = "min"
  if len(row.thought) < budget.max_tokens:
    return True
  del row.thought[budget.max_tokens :]
  row.forced = "max"
  return False
