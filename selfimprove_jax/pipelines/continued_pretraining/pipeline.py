"""Continued pretraining on new text with replay, as a list of stages (EntiGraph; arXiv 2409.07431).

  initial -> tokenizer -> new_text/documents, new_text/rows -> tuned -> export
                          replay/documents,   replay/rows

The model learns the new text: in the paper, texts that are synthesized about a small corpus. Replay
is text similar to the pretraining data, mixed in to reduce forgetting. Some documents of both are
held out and scored before and after.

The initial model is a checkpoint with its own tokenizer, or a model that is first pretrained on the
replay text. In that case the tokenizer is trained on the replay text too, and both stages come
after the documents and rows of the replay.

Benchmarks are scored with both models at the end (pipelines/common/benchmarks.py).
"""

import dataclasses

# The module: after the package's import, its attribute `stages` is the function below.
import selfimprove_jax.pipelines.continued_pretraining.stages as cpt
from selfimprove_jax.pipelines.common import benchmarks, models, planning, text
from selfimprove_jax.pipelines.common import initial as initial_stages
from selfimprove_jax.pipelines.continued_pretraining.config import (
  CheckpointInitialConfig,
  Config,
  PretrainInitialConfig,
)
from selfimprove_jax.pipelines.continued_pretraining.stages import CORPORA
from selfimprove_jax.runs.stage import Plan, Stage


def stages(config: Config) -> list[Stage]:
  """Returns the stages, each after those it reads."""
  c = config
  documents = []
  for name, corpus in c.corpora.items():
    split = text.DocumentsConfig(corpus=corpus, seed=c.split_seed)
    documents.append(text.documents_stage(f"{name}/documents", split, c.checked_against))
  rows = [_rows(c, name) for name in CORPORA]
  if isinstance(c.initial, CheckpointInitialConfig):
    made = [*_checkpoint(c, c.initial), *documents, *rows]
  else:
    tokenizer = text.TokenizerStageConfig(
      **vars(c.initial.tokenizer), unique_tokens=c.tokens.replay_tokens
    )
    reads = {"documents": "replay/documents"}
    tokenizer = Stage("tokenizer", text.tokenizer, tokenizer, reads)
    made = [*documents, tokenizer, *rows, _pretraining(c, c.initial)]
  # First, so that a missing file is reported before anything is trained.
  made = [*benchmarks.examples_stages(c.benchmarks), *made]
  return [*made, _tuned(c), _export(c), *_scores(c)]


def _scores(c: Config) -> list[Stage]:
  """Returns the stages that score both models; last, since a loaded model takes memory."""
  options = {"seq_len": c.seq_len}
  return [
    *benchmarks.model_stages(c.benchmarks, "initial", **options, with_dynamics=False),
    *benchmarks.model_stages(c.benchmarks, "tuned", **options),
  ]


def _checkpoint(c: Config, initial: CheckpointInitialConfig) -> list[Stage]:
  tokenizer = initial_stages.TokenizerStageConfig(special_tokens=initial.special_tokens)
  return [
    Stage(
      "initial",
      initial_stages.initial,
      initial_stages.InitialStageConfig(path=initial.path, model=c.model),
    ),
    Stage("tokenizer", initial_stages.tokenizer, tokenizer, {"initial": "initial"}),
  ]


def _rows(c: Config, name: str) -> Stage:
  num_tokens = {"new_text": c.tokens.new_text_tokens, "replay": c.tokens.replay_tokens}[name]
  rows = text.RowsConfig(
    seq_len=c.seq_len,
    unique_tokens=num_tokens,
    batch_documents=c.tokens.batch_documents,
    may_fall_short=True,
  )
  inputs = {"documents": f"{name}/documents", "tokenizer": "tokenizer"}
  return Stage(f"{name}/rows", text.rows, rows, inputs, Plan(tokens=num_tokens))


def _pretraining(c: Config, initial: PretrainInitialConfig) -> Stage:
  model = dataclasses.replace(c.model, dropout_rate=initial.dropout_rate)
  pretraining = models.PretrainConfig(
    model=model,
    mesh=c.mesh,
    training=initial.training,
    seq_len=c.seq_len,
    total_targets=initial.total_tokens,
    mixture={"unique": 1.0},
    weight_decay=initial.weight_decay,
    evaluation=c.evaluation,
    seed=c.seed,
  )
  inputs = {"tokens": "replay/rows", "tokenizer": "tokenizer"}
  plan = planning.training_plan(model, initial.total_tokens, c.seq_len)
  return Stage("initial", models.pretrain, pretraining, inputs, plan, uses_devices=True)


def _tuned(c: Config) -> Stage:
  tuning = cpt.TunedStageConfig(
    **vars(c.tuning),
    kind=c.initial.kind,
    model=c.model,
    mesh=c.mesh,
    training=c.training,
    seq_len=c.seq_len,
    evaluation=c.evaluation,
    seed=c.seed,
  )
  inputs = {"initial": "initial", "tokenizer": "tokenizer"}
  inputs |= {name: f"{name}/rows" for name in CORPORA}
  num_tokens = round(c.tuning.epochs * c.tokens.new_text_tokens)
  plan = planning.training_plan(c.model, num_tokens, c.seq_len)
  return Stage("tuned", cpt.tuned, tuning, inputs, plan, uses_devices=True)


def _export(c: Config) -> Stage:
  export = cpt.ExportStageConfig(
    **vars(c.export), kind=c.initial.kind, mesh=c.mesh, seq_len=c.seq_len
  )
  inputs = {"initial": "initial", "tokenizer": "tokenizer", "tuned": "tuned"}
  return Stage("export", cpt.export, export, inputs, uses_devices=True)
