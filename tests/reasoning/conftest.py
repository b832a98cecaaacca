"""A model that follows a rule: a token is a character, and the question says how long it thinks."""

import random
from collections.abc import Iterable, Iterator

import pytest

from selfimprove_jax.language_models import Reply, TextRequest, Usage
from selfimprove_jax.reasoning import thinking
from selfimprove_jax.sampling.requests import SamplingConfig

_EOS = "$"
GREEDY = SamplingConfig(temperature=0.0)


class FakeModel:
  """Thinks as a question says, such as "abc|", and again after "W"; answers "=n", its length.

  It thinks about a question "?" in random letters, and fails at a question "!". "|" and "$" are
  stop tokens.
  """

  name = "fake"
  format = thinking.ThinkingFormat(
    think_start="(", think_end=")", answer_start="\nA:", ignore="W", stop=("|",)
  )

  def __init__(self):
    self.batches: list[list[TextRequest]] = []

  def encode(self, text: str) -> list[int]:
    return [ord(character) for character in text]

  def decode(self, ids) -> str:
    return "".join(chr(id_) for id_ in ids).replace("(", "").replace(")", "")

  @property
  def tokens(self) -> thinking.ThinkingTokens:
    return thinking.tokenize(self.format, self.encode)

  def thinker(self, sampling: SamplingConfig = GREEDY, seed: int = 0) -> thinking.Thinker:
    return thinking.Thinker(
      model=self, tokens=self.tokens, decode=self.decode, sampling=sampling, seed=seed
    )

  def question(self, text: str, id_: str = "q") -> thinking.Question:
    return thinking.Question(id_, tuple(self.encode(text)))

  def prompts(self) -> list[list[str]]:
    """The prompts, batch by batch."""
    return [["".join(map(chr, request.prompt)) for request in batch] for batch in self.batches]

  def generate(self, requests: Iterable[TextRequest]) -> Iterator[Reply]:
    requests = list(requests)
    if requests:
      self.batches.append(requests)
    return map(self._reply, requests)

  def score(self, requests):
    raise NotImplementedError

  def close(self):
    pass

  def _reply(self, request: TextRequest) -> Reply:
    context = "".join(map(chr, request.prompt))
    if context.startswith("!"):
      return Reply.failed(request, "NaN in the logits")
    rng = random.Random(f"{request.seed} {request.record_id} {request.sample} {context}")
    new, reason = "", "length"
    while len(new) < request.max_tokens:
      drawn = self._next(context + new, rng)
      ends = drawn == _EOS or ord(drawn) in request.stop_ids
      if ends and len(new) >= request.min_tokens:
        reason = "stop"
        break
      new += "." if ends else drawn
    return Reply(
      id=request.id,
      text=self.decode(self.encode(new)),
      finish_reason=reason,
      usage=Usage(len(request.prompt), len(new)),
      tokens=tuple(self.encode(new)),
    )

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
def model() -> FakeModel:
  return FakeModel()
