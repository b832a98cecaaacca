"""A thought and its answer: how a model's thinking is marked, how it is closed, what is kept of it.

What budget forcing and the other ways to control the length of thinking have in common.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

from selfimprove_jax.sampling.requests import Completion, Request
from selfimprove_jax.sampling.sampler import SamplingConfig

Generate = Callable[[Sequence[Request]], Sequence[Completion]]
"""Requests to their completions, in order: `Engine.generate`."""
Decode = Callable[[Sequence[int]], str]
"""Ids to text, special tokens left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkingFormat:
  """How thinking is marked, as text in which special tokens are spelled.

  Attributes:
    think_start: put behind the prompt; may be empty.
    think_end: closes the thinking, and opens the answer.
    answer_start: put behind `think_end` where the thinking was closed by force; may be empty.
    ignore: put in the place of an end that is suppressed.
    stop: what ends the thinking beside the end of sequence; one token each.
  """

  think_start: str
  think_end: str
  answer_start: str
  ignore: str
  stop: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkingTokens:
  """A `ThinkingFormat` as token ids.

  Attributes:
    start: opens a thought.
    end: closes one that ended by itself.
    forced_end: closes one that did not.
    newline: put ahead of `forced_end` where the thought does not end with one; empty where the
      format brings it.
    ignore: in the place of a suppressed end.
    stop_ids: none of them is ever part of a thought.
  """

  start: tuple[int, ...]
  end: tuple[int, ...]
  forced_end: tuple[int, ...]
  newline: tuple[int, ...]
  ignore: tuple[int, ...]
  stop_ids: tuple[int, ...]


def tokenize(format: ThinkingFormat, encode: Callable[[str], Sequence[int]]) -> ThinkingTokens:
  """The ids of a format.

  Args:
    encode: text to ids, special tokens in it recognized.

  Raises:
    ValueError: a stop text is not one token, so that it could not be suppressed; or nothing closes
      a thought, or takes the place of its end.
  """
  for name in ("think_end", "ignore"):
    if not getattr(format, name):
      raise ValueError(f"{name} is empty; it must be some text")
  stop_ids = []
  for text in format.stop:
    ids = encode(text)
    if len(ids) != 1:
      raise ValueError(f"stop text {text!r} is {len(ids)} tokens {list(ids)}; it must be one token")
    stop_ids.append(ids[0])
  # The reference looks at the opening delimiter alone; a closing one that begins so needs none too.
  brings_newline = format.think_start.startswith("\n") or format.think_end.startswith("\n")
  return ThinkingTokens(
    start=tuple(encode(format.think_start)),
    end=tuple(encode(format.think_end)),
    forced_end=tuple(encode(format.think_end + format.answer_start)),
    newline=() if brings_newline else tuple(encode("\n")),
    ignore=tuple(encode(format.ignore)),
    stop_ids=tuple(stop_ids),
  )


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked: an id that no other question has, and the prompt's token ids."""

  id: str
  prompt: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
  """One thought and its answer.

  Attributes:
    question_id, sample: whose.
    thinking, thinking_tokens: the thought, with what stands in the place of suppressed ends,
      without stop tokens and delimiters.
    answer_start: the text that closed the thought, special tokens left out.
    answer, answer_tokens: what was sampled behind it.
    forced: `max` where the thought was closed by force; else `min` where an end of it was
      suppressed, else `none`. `rejected` where no try was short enough: then there is no answer.
    num_ignored: suppressed ends.
    sampled_tokens: all that were drawn for it, tries that were rejected included.
    finish_reason: of the answer.
    error: why there is no answer, if sampling failed.
  """

  question_id: str
  sample: int
  thinking: str
  thinking_tokens: list[int]
  answer_start: str
  answer: str
  answer_tokens: list[int]
  forced: str
  num_ignored: int
  sampled_tokens: int
  finish_reason: str | None
  error: str | None


@dataclasses.dataclass
class Row:
  """A response in the making; `thought` and `forced` and so on as `Response` has them."""

  question: Question
  sample: int
  thought: list[int] = dataclasses.field(default_factory=list)
  forced: str = "none"
  num_ignored: int = 0
  sampled_tokens: int = 0
  error: str | None = None

  def request(
    self, behind: Sequence[int], step: str, *, sample: int | None = None, **options
  ) -> Request:
    """A request for what follows the prompt and the ids `behind` it.

    Its random numbers come from the question's id, the step and the sample's number, so that what
    it gives depends neither on the rows beside it nor on a budget.
    """
    key = hashlib.sha256(f"{step}\0{self.question.id}".encode()).digest()
    return Request(
      prompt=(*self.question.prompt, *behind),
      record_id=int.from_bytes(key[:8], "little"),
      sample=self.sample if sample is None else sample,
      **options,
    )

  def note(self, completion: Completion) -> bool:
    """Counts a completion's tokens; whether it succeeded."""
    self.sampled_tokens += len(completion.tokens)
    if completion.finish_reason not in ("stop", "length"):
      self.error = completion.error or completion.finish_reason
    return self.error is None


def make_rows(questions: Sequence[Question], num_samples: int) -> list[Row]:
  """All samples of the first question, then of the next.

  Raises:
    ValueError: two questions have one id, or there is to be no sample.
  """
  if num_samples < 1:
    raise ValueError(f"num_samples={num_samples} must be at least 1")
  seen: set[str] = set()
  for question in questions:
    if question.id in seen:
      raise ValueError(f"two questions have the id {question.id!r}; each needs its own")
    seen.add(question.id)
  return [Row(question, sample) for question in questions for sample in range(num_samples)]


def answer(
  rows: Sequence[Row],
  generate: Generate,
  *,
  tokens: ThinkingTokens,
  max_answer_tokens: int,
  sampling: SamplingConfig,
  seed: int,
  decode: Decode,
) -> list[Response]:
  """Closes every thought and asks for its answer; rows that failed or were rejected have none."""
  asked = [row for row in rows if row.error is None and row.forced != "rejected"]
  tails = [_tail(row, tokens, decode) for row in asked]
  requests = [
    row.request(
      (*tokens.start, *row.thought, *tail),
      "answer",
      max_new_tokens=max_answer_tokens,
      sampling=sampling,
      seed=seed,
    )
    for row, tail in zip(asked, tails, strict=True)
  ]
  completions = generate(requests) if requests else []
  answered = {
    id(row): (tail, completion)
    for row, tail, completion in zip(asked, tails, completions, strict=True)
  }
  return [_response(row, *answered.get(id(row), ((), None)), decode) for row in rows]


def _tail(row: Row, tokens: ThinkingTokens, decode: Decode) -> tuple[int, ...]:
  if row.forced != "max":
    return tokens.end
  if decode(row.thought).endswith("\n"):
    return tokens.forced_end
  return (*tokens.newline, *tokens.forced_end)


def _response(
  row: Row, tail: tuple[int, ...], completion: Completion | None, decode: Decode
) -> Response:
  text, answer_tokens, finish_reason = "", [], None
  if completion is not None and row.note(completion):
    answer_tokens, finish_reason = list(completion.tokens), completion.finish_reason
    text = decode(answer_tokens) if completion.text is None else completion.text
  return Response(
    question_id=row.question.id,
    sample=row.sample,
    thinking=decode(row.thought),
    thinking_tokens=row.thought,
    answer_start=decode(tail),
    answer=text,
    answer_tokens=answer_tokens,
    forced=row.forced,
    num_ignored=row.num_ignored,
    sampled_tokens=row.sampled_tokens,
    finish_reason=finish_reason,
    error=row.error,
  )
