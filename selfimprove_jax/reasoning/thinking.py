"""Thoughts and answers: how thinking is delimited, how it is closed, and what is recorded of it."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from selfimprove_jax.language_models import LanguageModel, Reply, TextRequest
from selfimprove_jax.runtime.config import section
from selfimprove_jax.sampling.requests import SamplingConfig


@section
class ThinkingFormat:
  """Delimiters of thinking, as text in which special tokens are spelled out.

  Attributes:
    think_start: appended to the prompt; may be empty.
    think_end: closes the thinking and opens the answer.
    answer_start: appended to `think_end` if the thinking was closed by force; may be empty.
    ignore: replaces a suppressed end.
    stop: texts that end the thinking, in addition to the end of sequence; each is one token.
  """

  think_start: str = ""
  think_end: str = "\n\nFinal Answer:"
  answer_start: str = ""
  ignore: str = "\nWait"
  stop: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    for name in ("think_end", "ignore"):
      if not getattr(self, name):
        raise ValueError(f"{name} is empty; it must be some text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinkingTokens:
  """A `ThinkingFormat` as token ids.

  Attributes:
    end, forced_end: close a thought that ended by itself, and one that did not.
    newline: precedes `forced_end` if the thought does not end with a newline; empty if the format
      has its own.
    stop_ids: end a thought, and never are part of it.
  """

  start: tuple[int, ...]
  end: tuple[int, ...]
  forced_end: tuple[int, ...]
  newline: tuple[int, ...]
  ignore: tuple[int, ...]
  stop_ids: tuple[int, ...]


def tokenize(format: ThinkingFormat, encode: Callable[[str], Sequence[int]]) -> ThinkingTokens:
  """Returns the token ids of a format.

  Args:
    encode: text -> ids, with special tokens recognized.

  Raises:
    ValueError: a stop text is not a single token, so its sampling could not be suppressed.
  """
  stops = [encode(text) for text in format.stop]
  for text, ids in zip(format.stop, stops, strict=True):
    if len(ids) != 1:
      raise ValueError(f"stop text {text!r} is {len(ids)} tokens {list(ids)}; it must be one token")
  # The reference tests the opening delimiter alone; a closing one that begins with a newline needs
  # no other newline either.
  has_newline = format.think_start.startswith("\n") or format.think_end.startswith("\n")
  return ThinkingTokens(
    start=tuple(encode(format.think_start)),
    end=tuple(encode(format.think_end)),
    forced_end=tuple(encode(format.think_end + format.answer_start)),
    newline=() if has_newline else tuple(encode("\n")),
    ignore=tuple(encode(format.ignore)),
    stop_ids=tuple(ids[0] for ids in stops),
  )


@dataclasses.dataclass(frozen=True)
class Question:
  """A question with a unique id, and the token ids of its whole prompt."""

  id: str
  prompt: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
  """One thought and its answer.

  Attributes:
    sample: number of the sample.
    thinking, thinking_tokens: the thought with the replacements of suppressed ends, without stop
      tokens and delimiters.
    answer_start: text that closed the thought, without special tokens.
    answer, answer_tokens: text and tokens sampled after it.
    forced: `max` if the thought was closed by force, else `min` if an end was suppressed, else
      `none`. `rejected` if no try was short enough, which leaves no answer.
    num_ignored: number of suppressed ends.
    sampled_tokens: all tokens that were sampled, rejected tries included.
    finish_reason: the answer's finish reason.
    error: why sampling failed, which leaves no answer.
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


@dataclasses.dataclass(eq=False)
class Row:
  """A response in progress; its fields are those of `Response`, and `thought` its token ids."""

  question: Question
  sample: int
  thought: list[int] = dataclasses.field(default_factory=list)
  forced: str = "none"
  num_ignored: int = 0
  sampled_tokens: int = 0
  error: str | None = None

  def note(self, reply: Reply) -> bool:
    """Adds up a reply's tokens; returns whether the reply succeeded."""
    self.sampled_tokens += len(reply.tokens or ())
    if reply.finish_reason not in ("stop", "length"):
      self.error = reply.error or reply.finish_reason
    return self.error is None


def make_rows(questions: Sequence[Question], num_samples: int) -> list[Row]:
  """Returns a row for each sample of the first question, then of the next.

  Raises:
    ValueError: two questions have the same id, so they would share random numbers.
  """
  seen: set[str] = set()
  for question in questions:
    if question.id in seen:
      raise ValueError(f"two questions have the id {question.id!r}; each needs its own")
    seen.add(question.id)
  return [Row(question, sample) for question in questions for sample in range(num_samples)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thinker:
  """A language model that thinks before it answers, and how it is sampled.

  Attributes:
    model: returns token ids, as `LocalModel` does.
    decode: ids -> text, without special tokens.
    on_reply: called with each reply, for a progress bar.
  """

  model: LanguageModel
  tokens: ThinkingTokens
  decode: Callable[[Sequence[int]], str]
  sampling: SamplingConfig
  seed: int
  on_reply: Callable[[Reply], None] = lambda reply: None

  def request(
    self,
    row: Row,
    step: str,
    *,
    tail: Sequence[int] = (),
    sample: int | None = None,
    **limits: Any,
  ) -> TextRequest:
    """Returns a request for the continuation of a row's thought, and of a tail after it.

    Its random numbers are derived from the question's id, the step and the sample's number, so its
    reply depends neither on the other rows of the batch nor on a budget.

    Args:
      limits: fields of the request that end its reply: `max_tokens`, `min_tokens`, `stop_ids`.
    """
    key = hashlib.sha256(f"{step}\0{row.question.id}".encode()).digest()
    return TextRequest(
      prompt=(*row.question.prompt, *self.tokens.start, *row.thought, *tail),
      id=f"{row.question.id}, {step}",
      record_id=int.from_bytes(key[:8], "little"),
      sample=row.sample if sample is None else sample,
      seed=self.seed,
      **limits,
      **dataclasses.asdict(self.sampling),
    )

  def generate(self, requests: Iterable[TextRequest]) -> list[Reply]:
    """Returns the model's replies.

    Raises:
      ValueError: the model returns no token ids, so that a thought cannot be continued.
    """
    replies = []
    for reply in self.model.generate(requests):
      if reply.tokens is None and reply.error is None:
        raise ValueError(f"{self.model.name} returns no token ids; budgets of tokens need them")
      self.on_reply(reply)
      replies.append(reply)
    return replies

  def answer(self, rows: Sequence[Row], *, max_tokens: int) -> list[Response]:
    """Closes every thought and samples its answer, except for rows that failed or were rejected."""
    tails = {row: self._tail(row) for row in rows if row.error is None and row.forced != "rejected"}
    replies = self.generate(
      self.request(row, "answer", tail=tail, max_tokens=max_tokens) for row, tail in tails.items()
    )
    answers = dict(zip(tails, replies, strict=True))
    responses = []
    for row in rows:
      reply = answers.get(row)
      answered = reply is not None and row.note(reply)
      responses.append(
        Response(
          question_id=row.question.id,
          sample=row.sample,
          thinking=self.decode(row.thought),
          thinking_tokens=row.thought,
          answer_start=self.decode(tails.get(row, ())),
          answer=reply.text if answered else "",
          answer_tokens=list(reply.tokens) if answered else [],
          forced=row.forced,
          num_ignored=row.num_ignored,
          sampled_tokens=row.sampled_tokens,
          finish_reason=reply.finish_reason if answered else None,
          error=row.error,
        )
      )
    return responses

  def _tail(self, row: Row) -> tuple[int, ...]:
    """Returns the ids that close a thought."""
    if row.forced != "max":
      return self.tokens.end
    if self.decode(row.thought).endswith("\n"):
      return self.tokens.forced_end
    return (*self.tokens.newline, *self.tokens.forced_end)
