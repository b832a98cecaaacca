"""Stages of a pretrained checkpoint to start from: the checkpoint and its tokenizer."""

from typing import Any

from selfimprove_jax.data.tokenizer import SpecialTokens, make_tokenizer
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.common import checkpoints
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
  recorded = context.inputs["initial"].summary
  opened = checkpoints.open_recorded(context.inputs["initial"])
  files = opened.tokenizer_files()
  special_tokens = config.special_tokens
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
        counts["records"] = made.vocab_size
  ids = {"bos_token_id": made.bos_id, "eos_token_id": made.eos_id}
  return {"vocab_size": made.vocab_size, "trained": False, **ids}
