"""Messages to the token ids of a prompt, by the model's chat template."""

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from selfimprove_jax.data.tokenizer import Tokenizer
from selfimprove_jax.sampling import chat_files
from selfimprove_jax.sampling.chat_files import ChatFiles

ROLES = ("system", "developer", "user", "assistant", "tool")
PLAIN = "plain"
# For models that never saw a chat: names before the turns, an empty line between them.
_PLAIN_SOURCE = (
  "{{ bos_token if bos_token is defined }}"
  "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n"
  "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_PLAIN_STOPS = ("\n\nUser:", "\n\nSystem:")


class ChatTemplate:
  """A model's chat template, rendered in Jinja's sandbox.

  Special tokens that the template writes become special tokens; what messages say never does: a
  user's "<|im_end|>" is encoded as the ten characters it is. So it is with tokens that are no
  special ones but stand in the template, except in messages of the assistant, which may hold what
  the model itself wrote (`<think>`).

  Differs from transformers' `apply_chat_template`, which it equals otherwise: the date is not at
  hand (`strftime_now`), so that a prompt is the same on every day; templates that ask whether it is
  there write their own instead.
  """

  def __init__(self, files: ChatFiles, *, template: str | None = None):
    """Args:
      template: Jinja source, or `PLAIN` for turns that begin with names, instead of the model's.

    Raises:
      ValueError: there is no template, or it is no Jinja.
    """
    source = files.template if template is None else template
    if source is None:
      raise ValueError(
        f"the model has no chat template: name a file of one, or {PLAIN!r} for turns that begin "
        f"with names (a model that never saw a chat may answer anything)"
      )
    self.files = files
    self.stop_strings: tuple[str, ...] = _PLAIN_STOPS if source == PLAIN else ()
    self._source = _PLAIN_SOURCE if source == PLAIN else source
    self._template = _compile(self._source)
    self._encoder = _Encoder(files.tokenizer, self._source)
    self.stop_ids = self._find_stop_ids()

  @classmethod
  def of(cls, checkpoint: str | os.PathLike, *, template: str | None = None) -> "ChatTemplate":
    """That of the model at a path: a Hugging Face folder, a .gguf file, an orbax folder of ours.

    Raises:
      ValueError: of `__init__` and of `chat_files.read`.
    """
    return cls(chat_files.read(checkpoint), template=template)

  def render(
    self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
  ) -> list[int]:
    """The token ids of a conversation.

    Args:
      messages: `{"role": ..., "content": ...}`; content is a string, or a list of parts
        `{"type": "text", "text": ...}`, which are joined. The role `developer` is `system`.
      add_generation_prompt: ends with what comes before the assistant's next message.

    Raises:
      ValueError: there is no message; a role or a content is none of these; or the template
        refuses the messages, with its reason.
    """
    import jinja2

    if not messages:
      raise ValueError("messages is empty; at least one message is needed")
    marked = [self._mark(index, message) for index, message in enumerate(messages)]
    try:
      text = self._template.render(
        messages=marked, add_generation_prompt=add_generation_prompt, **self.files.special_tokens
      )
    except (jinja2.TemplateError, TypeError, KeyError, OverflowError) as error:
      raise ValueError(f"the chat template refuses these messages: {error}") from error
    return self._encoder.encode(text)

  def _mark(self, index, message):
    role = message.get("role")
    if role not in ROLES:
      raise ValueError(f"messages[{index}] has role {role!r}; supported are {', '.join(ROLES)}")
    mark = self._encoder.mark_special if role == "assistant" else self._encoder.mark_all
    marked = {
      "role": "system" if role == "developer" else role,
      "content": mark(_content_text(index, message.get("content"))),
    }
    if isinstance(message.get("name"), str):
      marked["name"] = self._encoder.mark_all(message["name"])
    return marked

  def _find_stop_ids(self):
    """The ends of sequence, and the special token after an assistant's message."""
    user = {"role": "user", "content": "a"}
    try:
      one, other = (
        self.render([user, {"role": "assistant", "content": content}], add_generation_prompt=False)
        for content in "bc"
      )
    except ValueError:  # a template that knows no answers
      return self.files.eos_ids
    after = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one[::-1], other[::-1]))
    ends = [token for token, _ in after if self._encoder.is_control(token)][-1:]
    return tuple(dict.fromkeys([*self.files.eos_ids, *ends]))


def _content_text(index, content):
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


def _compile(source):
  import jinja2
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model is trained on; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(("name:endgeneration",), drop_needle=True)

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def tojson(value, indent=None, ensure_ascii=False, separators=None, sort_keys=False):
    # Jinja's own escapes for HTML.
    return json.dumps(
      value, indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys
    )

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
  )
  environment.filters["tojson"] = tojson
  environment.globals["raise_exception"] = raise_exception
  try:
    return environment.from_string(source)
  except jinja2.TemplateError as error:
    raise ValueError(f"the chat template is no Jinja: {error}") from error


class _Encoder:
  """Encodes rendered text; what messages spell is marked before, and comes out as plain text."""

  def __init__(self, tokenizer: Tokenizer, source: str):
    self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    self._backend.encode_special_tokens = False
    added = tokenizer.backend.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    named = {token.content for token in added.values() if token.content in source}
    self._control_ids = {id_ for id_, token in added.items() if token.content in special | named}
    # Each control token has another that stands for its spelling: noncharacters of Unicode around
    # its number. A message that holds one of those gets the spelling, which does no harm.
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
    assert not self._spelled or min(self._spelled) >= tokenizer.vocab_size
    self._special, self._all = _pattern(special), _pattern(special | named)

  def mark_special(self, text):
    return self._special.sub(lambda match: self._marks[match[0]], text)

  def mark_all(self, text):
    return self._all.sub(lambda match: self._marks[match[0]], text)

  def encode(self, text):
    ids = self._backend.encode(text, add_special_tokens=False).ids
    return [out for id_ in ids for out in self._spelled.get(id_, (id_,))]

  def is_control(self, token):
    return token in self._control_ids


def _pattern(tokens):
  longest_first = sorted(tokens, key=len, reverse=True)
  return re.compile("|".join(re.escape(token) for token in longest_first) or "(?!)")


def _spell(tokenizer, content):
  """Ids of a token's characters, none of them the token's own."""
  ids = tokenizer.encode(content)
  if tokenizer.backend.token_to_id(content) in ids:
    ids = [*tokenizer.encode(content[:1]), *tokenizer.encode(content[1:])]
  return tuple(ids)
