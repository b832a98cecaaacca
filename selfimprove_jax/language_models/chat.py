"""Chat templates: rendering messages to the token ids of a prompt."""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers

from selfimprove_jax.data.tokenizer import Tokenizer
from selfimprove_jax.language_models.protocol import ROLES
from selfimprove_jax.language_models.template import Template, TemplateError

PLAIN = "plain"
# For base models, which never saw a chat: role names, and an empty line between the turns.
_PLAIN_SOURCE = (
  "{{ bos_token if bos_token is defined }}"
  "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
  "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_PLAIN_STOPS = ("\n\nUser:", "\n\nSystem:")


class ChatTemplate:
  """A model's chat template, rendered in a sandbox with a budget, and without prompt injection.

  Special tokens in the template become special tokens. In a message they never do: a user's
  "<|im_end|>" is encoded as its ten characters. The same holds for added tokens that are not
  special but appear in the template, such as `<think>`, except in the assistant's messages, which
  may hold what the model itself wrote.

  Differs from transformers' `apply_chat_template`, which it otherwise equals: `strftime_now` is not
  defined, so a prompt does not depend on the date. Templates that test for it fall back to a fixed
  date.

  Attributes:
    stop_ids: token ids that end a reply: the ends of sequence, and the end of a turn.
    stop_strings: texts that end a reply.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    source: str | None,
    *,
    special_tokens: Mapping[str, str],
    eos_ids: Sequence[int],
  ) -> None:
    """Compiles a template.

    Args:
      source: Jinja source, or `PLAIN` for turns that begin with the role's name; None is refused.
      special_tokens: variables of the template (`bos_token`, ...).
    """
    if source is None:
      raise ValueError(
        f"the model has no chat template: name a file with one, or {PLAIN!r} for turns that begin "
        f"with role names (a model that was not trained on chats may answer anything)"
      )
    self.tokenizer = tokenizer
    self.stop_strings: tuple[str, ...] = _PLAIN_STOPS if source == PLAIN else ()
    source = _PLAIN_SOURCE if source == PLAIN else source
    self._special_tokens = dict(special_tokens)
    self._template = Template(source)
    self._encoder = _Encoder(tokenizer, source)
    self.stop_ids = self._find_stop_ids(tuple(eos_ids))

  def render(
    self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
  ) -> list[int]:
    """Returns the token ids of a conversation.

    Args:
      messages: `{"role": ..., "content": ...}`; content is a text or a list of parts
        `{"type": "text", "text": ...}`, which are joined. The role `developer` becomes `system`.
      add_generation_prompt: append what precedes the assistant's next message.

    Raises:
      ValueError: the messages are not supported; a TemplateError if the template rejects them, with
        its reason, or would loop or allocate too much.
    """
    if not messages:
      raise ValueError("messages is empty; at least one message is needed")
    marked = [self._mark(index, message) for index, message in enumerate(messages)]
    text = self._template.render(
      marked, add_generation_prompt=add_generation_prompt, **self._special_tokens
    )
    return self._encoder.encode(text)

  def _mark(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message whose spelled control tokens are replaced by marks."""
    role = message.get("role")
    if role not in ROLES:
      raise ValueError(f"messages[{index}] has role {role!r}; supported are {', '.join(ROLES)}")
    mark = self._encoder.mark_special if role == "assistant" else self._encoder.mark_all
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
      content = ""  # clients leave it out then
    marked: dict[str, Any] = {
      "role": "system" if role == "developer" else role,
      "content": mark(_content_text(index, content)),
    }
    if role == "assistant" and message.get("tool_calls"):
      marked["tool_calls"] = _map_strings(message["tool_calls"], self._encoder.mark_all)
    if isinstance(message.get("name"), str):
      marked["name"] = self._encoder.mark_all(message["name"])
    return marked

  def _find_stop_ids(self, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the ends of sequence and the control token that follows an assistant's message."""
    user = {"role": "user", "content": "a"}
    try:
      # Two conversations that differ in the answer alone: their common suffix follows the answer.
      one, other = (
        self.render([user, {"role": "assistant", "content": content}], add_generation_prompt=False)
        for content in "bc"
      )
    except TemplateError:  # the template has no assistant messages
      return eos_ids
    after = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one[::-1], other[::-1]))
    ends = [token for token, _ in after if self._encoder.is_control(token)][-1:]
    return tuple(dict.fromkeys([*eos_ids, *ends]))


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
  """Changes all strings of a JSON value."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, Mapping):
    return {key: _map_strings(item, change) for key, item in value.items()}
  if isinstance(value, list):
    return [_map_strings(item, change) for item in value]
  return value


def _content_text(index: int, content: Any) -> str:
  if isinstance(content, str):
    return content
  if isinstance(content, list) and all(
    isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
    for part in content
  ):
    return "".join(part["text"] for part in content)
  given = json.dumps(content, default=repr)[:100]
  raise ValueError(
    f"messages[{index}].content is {given}; supported are a string and a list of "
    f'{{"type": "text", "text": ...}}'
  )


class _Encoder:
  """Encodes rendered text; control tokens that messages spelled out become plain text.

  Before rendering, each spelled control token is replaced by a mark. The marks are special tokens
  of a copy of the tokenizer, so they survive encoding, and are then replaced by the token ids of
  the spelling.
  """

  def __init__(self, tokenizer: Tokenizer, source: str) -> None:
    self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    self._backend.encode_special_tokens = False
    added = tokenizer.backend.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    named = {token.content for token in added.values() if token.content in source}
    self._control_ids = {id_ for id_, token in added.items() if token.content in special | named}
    # A mark is a number between two noncharacters of Unicode. A message that forges a mark only
    # gets the spelling of a control token, as plain text, which is harmless.
    self._marks = {
      content: f"\ufdd0{number}\ufdd1" for number, content in enumerate(sorted(special | named))
    }
    self._backend.add_special_tokens(
      [tokenizers.AddedToken(mark, special=True, normalized=False) for mark in self._marks.values()]
    )
    self._spelled = {
      self._backend.token_to_id(mark): _spell(tokenizer, content)
      for content, mark in self._marks.items()
    }
    # The marks' ids come after the tokenizer's own, so no ordinary token is replaced.
    assert not self._spelled or min(self._spelled) >= tokenizer.vocab_size
    self._special, self._all = any_of(special), any_of(special | named)

  def mark_special(self, text: str) -> str:
    return self._special.sub(lambda match: self._marks[match[0]], text)

  def mark_all(self, text: str) -> str:
    return self._all.sub(lambda match: self._marks[match[0]], text)

  def encode(self, text: str) -> list[int]:
    ids = self._backend.encode(text, add_special_tokens=False).ids
    return [out for id_ in ids for out in self._spelled.get(id_, (id_,))]

  def is_control(self, token: int) -> bool:
    return token in self._control_ids


def encode_markup(tokenizer: Tokenizer, text: str) -> list[int]:
  """Returns the ids of a text in which special tokens are recognized; not for users' texts."""
  backend = tokenizer.backend
  special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
  ids: list[int] = []
  position = 0
  for match in any_of(special).finditer(text):
    ids += [*tokenizer.encode(text[position : match.start()]), backend.token_to_id(match[0])]
    position = match.end()
  return ids + tokenizer.encode(text[position:])


def any_of(texts: Sequence[str] | set[str]) -> re.Pattern[str]:
  """Returns a pattern that matches any of some texts, and the longest one at each position."""
  longest_first = sorted(texts, key=len, reverse=True)
  return re.compile("|".join(re.escape(text) for text in longest_first) or "(?!)")


def _spell(tokenizer: Tokenizer, content: str) -> tuple[int, ...]:
  """Encodes the characters of a special token without using the token's own id."""
  ids = tokenizer.encode(content)
  if tokenizer.backend.token_to_id(content) in ids:  # the tokenizer merges it back into one token
    ids = [*tokenizer.encode(content[:1]), *tokenizer.encode(content[1:])]
  return tuple(ids)
