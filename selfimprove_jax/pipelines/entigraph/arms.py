"""Stages that train the arms, and the losses of the initial model to compare with."""

import dataclasses
from typing import Annotated, Any

from pydantic import Field

from selfimprove_jax.data import mixture, rows
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.common import checkpoints, models
from selfimprove_jax.pipelines.common.models import EvaluationConfig
from selfimprove_jax.pipelines.entigraph.corpora import Corpus
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section, to_json
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.training.config import TrainingConfig

_Share = Annotated[float, Field(ge=0, lt=1)]


@section
class ArmConfig:
  """One continued pretraining of the initial model.

  Attributes:
    corpora: weight of each corpus; the rows that are not replay are shared out by these.
    target_tokens: tokens to predict, of replay too. Arms with equal numbers are matched.
    replay_share: share of replay rows; exact and evenly spaced, drawn without replacement.
    corpus_share: takes this share of the rows of each corpus, the first ones: a point of the
      scaling curve.
    early_stopping: the corpus on which a validation loss is measured; the step with the lowest is
      the result. None takes the last step.
    curve: arms with the same name here are joined in the report's scaling curve; empty for none.
  """

  corpora: Annotated[dict[Corpus, Annotated[float, Field(gt=0)]], Field(min_length=1)]
  target_tokens: Annotated[int, Field(ge=1)]
  replay_share: _Share = 0.1
  corpus_share: Annotated[float, Field(gt=0, le=1)] = 1.0
  early_stopping: Corpus | None = None
  curve: str = ""

  def __post_init__(self) -> None:
    if self.early_stopping in self.corpora:
      raise ValueError(
        f"early_stopping={self.early_stopping!r} is a corpus that the arm trains on; its loss "
        f"falls while the model memorizes it. Name another one"
      )


@section
class ArmStageConfig:
  """Configures the stage `arms/NAME/SEED`; the first fields are those of `ArmConfig`."""

  corpora: dict[Corpus, float]
  target_tokens: int
  replay_share: float
  corpus_share: float
  early_stopping: Corpus | None

  model: LlamaConfig
  mesh: MeshConfig
  training: TrainingConfig
  weight_decay: float
  seq_len: int
  evaluation: EvaluationConfig
  seed: int


def arm(context: Context, config: ArmStageConfig) -> dict[str, Any]:
  """Trains the initial model on corpora and replay; scores the held-out replay documents."""
  mesh = config.mesh.make()
  opened = checkpoints.open_recorded(context.inputs["initial"])
  model_config = opened.compute_config(to_json(config.model))
  components, targets_per_row = _components(context, config)
  validation = None
  if config.early_stopping is not None:
    artifact = context.inputs[config.early_stopping]
    validation = rows.open_labeled(artifact, seq_len=config.seq_len, name="unique")
  num_steps = round(config.target_tokens / (config.training.batch_rows * targets_per_row))
  summary, params = models.train(
    context,
    model_config=model_config,
    mesh=mesh,
    training=_training(config),
    seq_len=config.seq_len,
    num_steps=max(1, num_steps),
    components=components,
    validation=validation,
    weight_decay=config.weight_decay,
    evaluation=config.evaluation,
    seed=config.seed,
    initial_params=opened.load_params(mesh, model_config),
  )
  _write_losses(context, config, params, model_config, mesh)
  return summary | {"max_positions": opened.max_positions}


def _training(config: ArmStageConfig) -> TrainingConfig:
  """Returns the training with every evaluation's state kept, where the best one is the result."""
  if config.early_stopping is None:
    return config.training
  return dataclasses.replace(config.training, patience=config.training.num_evaluations)


def _components(context: Context, config: ArmStageConfig) -> tuple[list[mixture.Component], float]:
  """Returns the sources of rows with their weights, and the mean number of targets per row."""
  shares = {name: weight / sum(config.corpora.values()) for name, weight in config.corpora.items()}
  weights = {name: share * (1 - config.replay_share) for name, share in shares.items()}
  if config.replay_share:
    weights["replay"] = config.replay_share
  components, targets_per_row = [], 0.0
  for name, weight in weights.items():
    artifact = context.inputs[name]
    source = rows.open_rows(artifact, seq_len=config.seq_len, prefix="unique.")
    if name != "replay":
      source = source.first(max(1, round(config.corpus_share * len(source))))
    components.append(mixture.Component(name, source, weight, repeat=True))
    counts = artifact.shards["unique" + rows.SUFFIX]
    targets_per_row += weight * counts["targets"] / counts["records"]
  return components, targets_per_row


@section
class InitialLossesConfig:
  """Configures the stage `losses/initial`."""

  model: LlamaConfig
  mesh: MeshConfig
  seq_len: int
  evaluation: EvaluationConfig


def initial_losses(context: Context, config: InitialLossesConfig) -> dict[str, Any]:
  """Scores the held-out replay documents with the initial model."""
  mesh = config.mesh.make()
  opened = checkpoints.open_recorded(context.inputs["initial"])
  model_config = opened.compute_config(to_json(config.model))
  params = opened.load_params(mesh, model_config)
  return {"documents": _write_losses(context, config, params, model_config, mesh)}


def _write_losses(
  context: Context, config: Any, params: Any, model_config: LlamaConfig, mesh: Any
) -> int:
  test = models.open_held_out(context.inputs["replay"], config.seq_len, "test")
  if test is None:
    return 0
  found = models.document_losses(model_config, mesh, params, test, config.evaluation)
  context.writer.write_jsonl("test.jsonl", models.loss_records(found))
  return context.writer.counts("test.jsonl")["records"]
