"""What a task asks a language model: choices to score, a text to generate, or a text to score."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Grader = Literal["words", "numbers", "math"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
  """An item whose choices are scored.

  Attributes:
    contexts: one for all choices, or one each (winogrande's partial evaluation).
    continuations: one for all contexts, or one each; with the space before a word.
    texts: the choices as normalization counts them, without that space.
    gold: indices of the right choices.
    preamble: characters with which the contexts begin, and those of other items too: the shots.
  """

  contexts: tuple[str, ...]
  continuations: tuple[str, ...]
  texts: tuple[str, ...]
  gold: tuple[int, ...]
  preamble: int = 0

  def __post_init__(self) -> None:
    number = len(self.texts)
    if not number or not all(self.texts) or not all(self.continuations):
      raise ValueError(f"the choices are {list(self.texts)}; there must be one, and none empty")
    if not self.gold or not all(0 <= index < number for index in self.gold):
      raise ValueError(f"gold is {list(self.gold)}; it must name one or more of {number} choices")

  def pairs(self) -> list[tuple[str, str]]:
    """Returns (context, continuation) of every choice."""
    number = len(self.texts)
    contexts, continuations = self.contexts, self.continuations
    return [
      (contexts[i if len(contexts) > 1 else 0], continuations[i if len(continuations) > 1 else 0])
      for i in range(number)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """An item whose answer is generated up to a stop string, greedily unless it has a temperature.

  Attributes:
    answers: accepted answers.
    shown: the answer as a shot shows it.
    grader: compares whole answers without case and punctuation ("words"), and without articles
      ("squad"); the letter that a text states ("letter", see `metrics.stated_letter`); or the
      answer that a text states by `reasoning.math_answers`, as a number or as mathematics.
    preamble: as in `Choices`, of the prompt.
    num_samples: generations of the prompt; more than one need a temperature.
    letters: the letters of the choices, for the grader "letter".
  """

  prompt: str
  stop: tuple[str, ...]
  max_tokens: int
  answers: tuple[str, ...]
  shown: str
  grader: Grader | Literal["squad", "letter"] = "words"
  preamble: int = 0
  num_samples: int = 1
  temperature: float = 0.0
  letters: str = ""

  def __post_init__(self) -> None:
    if self.num_samples < 1 or (self.num_samples > 1 and self.temperature == 0):
      raise ValueError(
        f"num_samples={self.num_samples} with temperature={self.temperature:g}: there must be at "
        f"least one, and at temperature 0, where all are equal, only one"
      )
    if (self.grader == "letter") != bool(self.letters):
      raise ValueError(f"grader={self.grader!r} with letters={self.letters!r}: they go together")
    if not self.prompt.strip():
      raise ValueError("the prompt is empty")
    if not self.answers or not all(self.answers):
      raise ValueError(f"the answers are {list(self.answers)}; there must be one, and none empty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """A text that is scored whole, in windows as long as the model's context."""

  text: str

  def __post_init__(self) -> None:
    if not self.text:
      raise ValueError("the text is empty")


Item = Choices | Generation | Document
_KINDS = {kind.__name__: kind for kind in (Choices, Generation, Document)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """An item of a task.

  Attributes:
    id: task, file line.
    group: items of one group are not independent: a subject, an article.
  """

  id: str
  group: str
  item: Item

  def to_json(self) -> dict[str, Any]:
    """Returns JSON values that `from_json` reads."""
    return {**dataclasses.asdict(self), "kind": type(self.item).__name__}

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Example":
    """Returns the example that `to_json` wrote."""
    fields = {n: tuple(v) if isinstance(v, list) else v for n, v in value["item"].items()}
    item = _KINDS[value["kind"]](**fields)
    return cls(id=value["id"], group=value["group"], item=item)


Record = Mapping[str, Any]
