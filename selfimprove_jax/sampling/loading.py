"""From a checkpoint to an engine, with all that turns text into its requests."""

import dataclasses
import functools
import os
from typing import Any

from jax.sharding import Mesh

from selfimprove_jax.models import pretrained
from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.sampling import chat_files
from selfimprove_jax.sampling.chat import ChatTemplate
from selfimprove_jax.sampling.chat_files import ChatFiles
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.grammar import GrammarCompiler


@dataclasses.dataclass(frozen=True)
class LoadedModel:
  """A checkpoint that can be sampled from.

  Attributes:
    config: of the model.
    files: tokenizer and ends.
    chat: its chat template; None if it has none and none was given.
  """

  engine: Engine
  config: LlamaConfig
  files: ChatFiles
  chat: ChatTemplate | None

  @functools.cached_property
  def grammars(self) -> GrammarCompiler:
    """Of its tokens; takes seconds when it is first asked for."""
    return GrammarCompiler(
      self.files.tokenizer, eos_id=_ends(self.files, self.chat), vocab_size=self.config.vocab_size
    )


def load_model(
  checkpoint: str | os.PathLike,
  mesh: Mesh,
  *,
  num_slots: int,
  max_length: int,
  changes: dict[str, Any],
  chat_template: str | None,
  batch_invariant: bool = True,
) -> LoadedModel:
  """The model at a path, on a mesh.

  Args:
    checkpoint: what `models.pretrained` reads.
    num_slots: completions sampled at once.
    max_length: the most tokens of a prompt with its completion.
    changes: of `pretrained.read_config`.
    chat_template: in the place of the model's own: `plain`, or Jinja's source.
    batch_invariant: of `Engine`.

  Raises:
    ValueError: `max_length` is more than the model's context; of `pretrained.load_pretrained` and
      `chat_files.read`.
  """
  context = pretrained.read_max_positions(checkpoint)
  if not 2 <= max_length <= context:
    raise ValueError(f"max_length is {max_length}; the model's context is {context}")
  files = chat_files.read(checkpoint)
  has_chat = chat_template is not None or files.template is not None
  chat = ChatTemplate(files, template=chat_template) if has_chat else None
  config, params = pretrained.load_pretrained(checkpoint, mesh, changes=changes)
  engine = Engine(
    Llama(config),
    params,
    mesh,
    eos_ids=_ends(files, chat),
    pad_id=files.tokenizer.pad_id,
    num_slots=num_slots,
    max_length=max_length,
    decode_text=files.tokenizer.decode,
    batch_invariant=batch_invariant,
  )
  return LoadedModel(engine, config, files, chat)


def _ends(files, chat):
  """Tokens that end a text; where there is a chat template, the end of a turn is one."""
  return files.eos_ids if chat is None else chat.stop_ids
