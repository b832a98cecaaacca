"""Stages of a pretrained checkpoint to start from: the checkpoint and its tokenizer."""

import pathlib
from typing import Any

from selfimprove_jax.data import files as data_files
from selfimprove_jax.data.tokenizer import SpecialTokens, load_tokenizer, make_tokenizer
from selfimprove_jax.language_models.chat import ChatTemplate
from selfimprove_jax.models.checkpoints.tokenizer_files import TEMPLATE_FILE, read_tokenizer
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.common import checkpoints
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section, to_json


@section
class InitialStageConfig:
  """Configures `initial`; `model` must have the checkpoint's shape."""

  path: str
  model: LlamaConfig


def initial(context: Context, config: InitialStageConfig) -> dict[str, Any]:
  """Records the checkpoint to start from; its weights stay where they are.

  Raises:
    ValueError: there is no model at the path, its weights can't be read, or it has another shape;
      every difference is named.
  """
  del context  # the artifact is its summary
  try:
    return checkpoints.describe_checkpoint(config.path, changes=to_json(config.model))
  except ValueError as error:
    raise ValueError(f"initial.path={config.path!r}: {error}") from error


@section
class TokenizerStageConfig:
  """Configures `tokenizer`."""

  special_tokens: SpecialTokens


def tokenizer(context: Context, config: TokenizerStageConfig) -> dict[str, Any]:
  """Converts the checkpoint's tokenizer, and copies its files unchanged to `original`.

  Raises:
    ValueError: the checkpoint has no tokenizer, or one with more ids than the model.
  """
  return _write_tokenizer(context, config.special_tokens, template=None)


@section
class ChatTokenizerStageConfig(TokenizerStageConfig):
  """Configures `tokenizer` for a model that learns to chat.

  Attributes:
    chat_template: file with a Jinja template; None takes the checkpoint's own.
  """

  chat_template: str | None


def chat_tokenizer(context: Context, config: ChatTokenizerStageConfig) -> dict[str, Any]:
  """Does what `tokenizer` does, and adds the chat template to both copies.

  The summary has `stop_ids`, the tokens that end a reply.

  Raises:
    ValueError: there is no chat template, or it can't be compiled.
  """
  opened = checkpoints.open_recorded(context.inputs["initial"])
  files = opened.tokenizer_files()
  source = files.chat_template
  if config.chat_template is not None:
    found = data_files.read_text(pathlib.Path(config.chat_template))
    if isinstance(found, ValueError):
      raise found
    source = found
  if source is None:
    raise ValueError(
      f"the checkpoint {opened.path} has no chat template: set initial.chat_template to a file "
      f"with one, such as the chat_template.jinja of a chat model with these special tokens"
    )
  special = files.special_tokens
  made = make_tokenizer(files.backend, special, config.special_tokens, name=str(opened.path))
  eos_ids = files.eos_ids or (made.eos_id,)
  chat = ChatTemplate(made, source, special_tokens=special, eos_ids=eos_ids)
  summary = _write_tokenizer(context, config.special_tokens, template=source)
  return summary | {"stop_ids": list(chat.stop_ids)}


def open_chat(artifact: Artifact) -> ChatTemplate:
  """Opens the chat template that `chat_tokenizer` wrote."""
  # The special tokens that the template may name are the checkpoint's own, as in sampling.
  files = read_tokenizer(artifact.path("original"), begins_with_bos=False)
  return ChatTemplate(
    load_tokenizer(artifact.path("tokenizer")),
    files.chat_template,
    special_tokens=files.special_tokens,
    eos_ids=artifact.summary["stop_ids"],
  )


def _write_tokenizer(
  context: Context, special_tokens: SpecialTokens, *, template: str | None
) -> dict[str, Any]:
  """Writes both copies of the tokenizer, with a chat template if one is given."""
  recorded = context.inputs["initial"].summary
  opened = checkpoints.open_recorded(context.inputs["initial"])
  files = opened.tokenizer_files()
  made = make_tokenizer(files.backend, files.special_tokens, special_tokens, name=recorded["path"])
  vocab_size = recorded["model"]["vocab_size"]
  if made.vocab_size > vocab_size:
    raise ValueError(
      f"the tokenizer of {recorded['path']} has {made.vocab_size} ids with {special_tokens}, and "
      f"its model {vocab_size}; give initial.special_tokens only tokens that the tokenizer has, so "
      f"that none is added"
    )
  for name, write in (("tokenizer", made.save), ("original", opened.copy_tokenizer)):
    if not context.writer.has(name):
      with context.writer.shard(name) as (folder, counts):
        folder.mkdir()
        write(folder)
        if template is not None:
          (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        counts["records"] = made.vocab_size
  ids = {"bos_token_id": made.bos_id, "eos_token_id": made.eos_id}
  return {"vocab_size": made.vocab_size, "trained": False, **ids}
