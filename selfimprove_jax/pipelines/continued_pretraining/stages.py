"""Stages of continued pretraining, each after the config sections that it reads."""

import dataclasses
from typing import Annotated, Any, Literal

from jax.sharding import Mesh
from pydantic import Field

from selfimprove_jax.data import mixture, rows
from selfimprove_jax.evaluation import perplexity
from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.pipelines.common import checkpoints, models
from selfimprove_jax.pipelines.common.export import ExportConfig, write_model
from selfimprove_jax.pipelines.common.text import open_tokenizer
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section, to_json
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.training.config import TrainingConfig

CORPORA = ("new_text", "replay")

Kind = Literal["checkpoint", "pretrain"]


@section
class TuningConfig:
  """Configures continued pretraining of the initial model.

  Attributes:
    epochs: training rows divided by rows of new text. Replay rows count: they replace rows of new
      text, as in the paper, which leaves `(1 - replay_share) * epochs` passes over it.
    replay_share: share of replay rows; exact and evenly spaced, drawn without replacement. The
      paper draws each row with this probability, and with replacement.
  """

  epochs: Annotated[float, Field(gt=0)]
  replay_share: Annotated[float, Field(ge=0, lt=1)]
  weight_decay: Annotated[float, Field(ge=0)]
  dropout_rate: Annotated[float, Field(ge=0, lt=1)]


@section
class TunedStageConfig(TuningConfig):
  """Configures `tuned`; `kind` tells whether `initial` is a checkpoint or a pretrained stage."""

  kind: Kind
  model: LlamaConfig
  mesh: MeshConfig
  training: TrainingConfig
  seq_len: int
  evaluation: models.EvaluationConfig
  seed: int


def tuned(context: Context, config: TunedStageConfig) -> dict[str, Any]:
  """Trains the initial model on new text and replay; scores both corpora before and after.

  A corpus of which nothing is held out is not scored.
  """
  mesh = config.mesh.make()
  initial_config, params = _load_initial(context, config, mesh)
  model_config = dataclasses.replace(initial_config, dropout_rate=config.dropout_rate)

  def open_unique(corpus: str) -> rows.RowSource:
    return rows.open_rows(context.inputs[corpus], seq_len=config.seq_len, prefix="unique.")

  def open_held_out(corpus: str, name: str) -> rows.LabeledRows | None:
    return models.open_held_out(context.inputs[corpus], config.seq_len, name)

  scorers = {
    corpus: perplexity.RowScorer(
      Llama(model_config), mesh, test, batch_size=config.evaluation.batch_rows
    )
    for corpus in CORPORA
    if (test := open_held_out(corpus, "test"))
  }

  def score(when: str, params: Any) -> None:
    for corpus, scorer in scorers.items():
      shard = f"{when}-{corpus}.jsonl"
      if not context.writer.has(shard):
        context.writer.write_jsonl(shard, models.loss_records(scorer.documents(params)))

  score("before", params)
  new_text = open_unique("new_text")
  components = [mixture.Component("new_text", new_text, 1 - config.replay_share, repeat=True)]
  if config.replay_share:
    replay = open_unique("replay")
    components.append(mixture.Component("replay", replay, config.replay_share, repeat=True))
  summary, params = models.train(
    context,
    model_config=model_config,
    mesh=mesh,
    training=config.training,
    seq_len=config.seq_len,
    num_steps=max(1, round(config.epochs * len(new_text) / config.training.batch_rows)),
    components=components,
    validation=open_held_out("new_text", "validation"),
    weight_decay=config.weight_decay,
    evaluation=config.evaluation,
    seed=config.seed,
    initial_params=params,
  )
  score("after", params)
  return summary


def _load_initial(
  context: Context, config: TunedStageConfig, mesh: Mesh
) -> tuple[LlamaConfig, Any]:
  artifact = context.inputs["initial"]
  if config.kind == "checkpoint":
    opened = checkpoints.open_recorded(artifact)
    model_config = opened.compute_config(to_json(config.model))
    return model_config, opened.load_params(mesh, model_config)
  model, params = models.load_model(artifact, mesh)
  return model.c, params


@section
class ExportStageConfig(ExportConfig):
  """Configures `export`; `seq_len` becomes the context length if no checkpoint has one."""

  kind: Kind
  mesh: MeshConfig
  seq_len: int


def export(context: Context, config: ExportStageConfig) -> dict[str, Any]:
  """Writes the tuned model and its tokenizer as the Hugging Face folder `model`."""
  artifact = context.inputs["tokenizer"]
  if config.kind == "checkpoint":
    files = artifact.path("original")
    max_positions = context.inputs["initial"].summary["max_positions"]
  else:
    files, max_positions = artifact.path("tokenizer"), config.seq_len
  return write_model(
    context,
    config,
    mesh=config.mesh.make(),
    files=files,
    eos_token_id=open_tokenizer(artifact).eos_id,
    max_positions=max_positions,
  )
