"""A model that is a rule: a token is a character, and how long it thinks stands in the question."""

import random

import pytest

from selfimprove_jax.sampling import thinking
from selfimprove_jax.sampling.requests import Completion, Request

_EOS = "$"


class Thinker:
  """Thinks as a question says, such as "abc|", and after "W" again; answers "=n", its length.

  A question "?" is thought about in random letters, a question "!" fails. "|" and "$" end.
  """

  format = thinking.ThinkingFormat(
    think_start="(", think_end=")", answer_start="\nA:", ignore="W", stop=("|",)
  )

  def __init__(self):
    self.batches: list[list[Request]] = []

  def encode(self, text: str) -> list[int]:
    return [ord(character) for character in text]

  def decode(self, ids) -> str:
    return "".join(chr(id_) for id_ in ids).replace("(", "").replace(")", "")

  @property
  def tokens(self) -> thinking.ThinkingTokens:
    return thinking.tokenize(self.format, self.encode)

  def question(self, text: str, id_: str = "q") -> thinking.Question:
    return thinking.Question(id_, tuple(self.encode(text)))

  def prompts(self) -> list[list[str]]:
    """What was asked, batch by batch."""
    return [["".join(map(chr, request.prompt)) for request in batch] for batch in self.batches]

  def generate(self, requests) -> list[Completion]:
    self.batches.append(list(requests))
    return [self._complete(request) for request in requests]

  def _complete(self, request: Request) -> Completion:
    context = "".join(map(chr, request.prompt))
    if context.startswith("!"):
      return Completion([], "error", error="NaN in the logits")
    rng = random.Random(f"{request.seed} {request.record_id} {request.sample} {context}")
    new = ""
    for _ in range(request.max_new_tokens):
      drawn = self._next(context + new, rng)
      ends = drawn == _EOS or ord(drawn) in request.stop_ids
      if ends and len(new) >= request.min_new_tokens:
        return Completion(self.encode(new), "stop", stop=ord(drawn))
      new += "." if ends else drawn
    return Completion(self.encode(new), "length")

  def _next(self, context: str, rng: random.Random) -> str:
    asked, _, rest = context.partition("(")
    thought, closed, answer = rest.partition(")")
    if closed:
      return f"={len(thought.rstrip())}{_EOS}"[len(answer.removeprefix("\nA:"))]
    if asked.startswith("?"):
      return rng.choice("abcdefg|")
    since_ignored = thought.rsplit("W", 1)[-1]
    return asked[len(since_ignored) % len(asked)]


@pytest.fixture
def thinker() -> Thinker:
  return Thinker()
