"""Renders conversations to tokens, with a mask of those that the assistant wrote."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from selfimprove_jax.language_models.chat import ChatTemplate, encode_markup
from selfimprove_jax.reasoning.thinking import ThinkingFormat

_Message = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Rendered:
  """The tokens of a conversation.

  Attributes:
    spans: [start, end) of the assistant's tokens in each of its turns, up to the token that ends
      the turn, which is in the span.
    num_bytes: UTF-8 bytes that the assistant wrote in each of its turns.
  """

  tokens: list[int]
  spans: list[tuple[int, int]]
  num_bytes: list[int]

  @property
  def loss_mask(self) -> Bool[np.ndarray, "N"]:
    mask = np.zeros(len(self.tokens), bool)
    for start, end in self.spans:
      mask[start:end] = True
    return mask

  def cut(self, max_tokens: int) -> "Rendered | None":
    """Returns the first turns, up to `max_tokens`; None if the first answer does not fit."""
    fitting = [span for span in self.spans if span[1] <= max_tokens]
    if not fitting:
      return None
    # What follows the end of the last turn, such as a newline, is not predicted.
    num = len(fitting)
    return Rendered(self.tokens[: fitting[-1][1]], fitting, self.num_bytes[:num])


class Renderer:
  """Renders conversations by a chat template, and finds what the assistant wrote.

  The template is rendered for each beginning of the conversation: what it adds for an answer to the
  prompt before it are the assistant's tokens. So nothing is assumed about the template, and the
  model learns to continue exactly the prompts that it is given later.
  """

  def __init__(self, chat: ChatTemplate, thinking: ThinkingFormat | None) -> None:
    """Prepares a template; `thinking` delimits the thoughts of messages that have some."""
    self._chat = chat
    self._thinking = thinking

  def render(self, messages: Sequence[_Message]) -> Rendered:
    """Returns the tokens of a conversation that ends with the assistant.

    Raises:
      ValueError: the template rejects the messages, or renders a beginning of the conversation
        differently than the whole, as one that drops earlier thoughts does; so the assistant's
        tokens in the whole are not those that it would write.
    """
    if "thinking" in messages[-1]:
      return self._render_trace(messages)
    whole = self._chat.render(messages, add_generation_prompt=False)
    spans, num_bytes = [], []
    for index, message in enumerate(messages):
      if message["role"] == "assistant":
        prompt = self._chat.render(messages[:index])
        _check_begins(whole, prompt, f"the prompt before messages[{index}]")
        turn = self._chat.render(messages[: index + 1], add_generation_prompt=False)
        end = self._end_of_turn(turn, len(prompt))
        _check_begins(whole, turn[:end], f"messages[{index}]")
        if end <= len(prompt):
          raise ValueError(f"the chat template renders nothing for messages[{index}]")
        spans.append((len(prompt), end))
        num_bytes.append(len(message["content"].encode()))
    return Rendered(whole, spans, num_bytes)

  def _render_trace(self, messages: Sequence[_Message]) -> Rendered:
    """Returns prompt, thought and answer, tokenized in the parts that budget forcing has."""
    assert self._thinking is not None, "messages with thoughts need a thinking format"
    thinking, answer = (messages[-1][name].strip() for name in ("thinking", "content"))
    prompt = self._chat.render(messages[:-1])
    tokenizer, form = self._chat.tokenizer, self._thinking
    after_start = "\n" if form.think_start and not form.think_start.endswith("\n") else ""
    before_end = "" if form.think_end.startswith("\n") else "\n"
    written = [
      *encode_markup(tokenizer, form.think_start),
      *tokenizer.encode(after_start + thinking + before_end),
      *encode_markup(tokenizer, form.think_end),
      *tokenizer.encode("\n" + answer),
      *self._turn_end(messages[:-1]),
    ]
    num_bytes = len((thinking + answer).encode())
    return Rendered([*prompt, *written], [(len(prompt), len(prompt) + len(written))], [num_bytes])

  def _turn_end(self, prompt: Sequence[_Message]) -> list[int]:
    """Returns the token that ends an answer to a prompt; the end of sequence if there is none."""
    answer = {"role": "assistant", "content": "a"}
    turn = self._chat.render([*prompt, answer], add_generation_prompt=False)
    end = self._end_of_turn(turn, len(self._chat.render(prompt)))
    return [turn[end - 1] if turn[end - 1] in self._chat.stop_ids else self._chat.stop_ids[0]]

  def _end_of_turn(self, turn: Sequence[int], start: int) -> int:
    """Returns the place after the last token that ends a reply, or the end without such a token."""
    stops = [place for place in range(start, len(turn)) if turn[place] in self._chat.stop_ids]
    return stops[-1] + 1 if stops else len(turn)


def _check_begins(whole: Sequence[int], part: Sequence[int], name: str) -> None:
  if whole[: len(part)] != part:
    same = next((i for i, (a, b) in enumerate(zip(whole, part)) if a != b), len(whole))
    raise ValueError(
      f"the chat template renders {name} differently when the rest of the conversation follows: "
      f"token {same} is {list(part[same : same + 1])} alone, and "
      f"{list(whole[same : same + 1])} in the whole"
    )
