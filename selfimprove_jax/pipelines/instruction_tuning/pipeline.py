"""Instruction tuning on conversations or reasoning traces, as a list of stages.

  initial -> tokenizer -> rows -> tuned -> export
      conversations ->

EntiGraph's models learn to follow instructions this way (arXiv 2409.07431, appendix D), and s1
learns to think before it answers (arXiv 2501.19393, section 2). The loss is on what the assistant
wrote. Some conversations are held out and scored before and after.
"""

import selfimprove_jax.pipelines.instruction_tuning.conversations as conversations

# The module: after the package's import, its attribute `stages` is the function below.
import selfimprove_jax.pipelines.instruction_tuning.stages as tuning
from selfimprove_jax.pipelines.common import initial, planning
from selfimprove_jax.pipelines.instruction_tuning.config import Config
from selfimprove_jax.runs.stage import Stage


def stages(config: Config) -> list[Stage]:
  """Returns the stages, each after those it reads."""
  c = config
  start = initial.InitialStageConfig(path=c.initial.path, model=c.model)
  tokenizer = initial.ChatTokenizerStageConfig(
    special_tokens=c.initial.special_tokens, chat_template=c.initial.chat_template
  )
  selected = conversations.ConversationsStageConfig(**vars(c.conversations), seed=c.split_seed)
  source = c.conversations.source
  rows = tuning.RowsStageConfig(
    **vars(c.rows),
    seq_len=c.seq_len,
    on_error=c.conversations.on_error,
    thinking=source.thinking if isinstance(source, conversations.TracesConfig) else None,
  )
  tuned = tuning.TunedStageConfig(
    **vars(c.tuning),
    model=c.model,
    mesh=c.mesh,
    training=c.training,
    seq_len=c.seq_len,
    evaluation=c.evaluation,
    seed=c.seed,
  )
  plan = planning.training_plan(c.model, None, c.seq_len)
  export = tuning.ExportStageConfig(**vars(c.export), mesh=c.mesh)
  model = {"initial": "initial", "tokenizer": "tokenizer"}
  reads = {"conversations": "conversations", "tokenizer": "tokenizer"}
  return [
    Stage("initial", initial.initial, start),
    Stage("tokenizer", initial.chat_tokenizer, tokenizer, {"initial": "initial"}),
    Stage("conversations", conversations.conversations, selected),
    Stage("rows", tuning.conversation_rows, rows, reads),
    Stage("tuned", tuning.tuned, tuned, model | {"rows": "rows"}, plan, uses_devices=True),
    Stage("export", tuning.export, export, model | {"tuned": "tuned"}, uses_devices=True),
  ]
