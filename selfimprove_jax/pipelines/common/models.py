"""Stages that train a model, and what other stages need to train one or to load one."""

from collections.abc import Iterator
from typing import Annotated, Any

from jax.sharding import Mesh
from pydantic import Field

from selfimprove_jax.data import mixture as mixtures
from selfimprove_jax.data import rows
from selfimprove_jax.evaluation import perplexity
from selfimprove_jax.models.checkpoints import open_checkpoint
from selfimprove_jax.models.checksums import DamagedCheckpointError, checksums
from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime import config as configs
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.training import loop, losses
from selfimprove_jax.training.config import TrainingConfig

# Subsets of the real documents; a mixture may also draw from synthetic sources.
REAL = ("unique", "oracle")


@section
class EvaluationConfig:
  """How held-out rows are scored.

  Attributes:
    batch_rows: rows per batch, over all devices.
    max_validation_rows: rows scored between training steps, in turn from each group of documents.
  """

  batch_rows: Annotated[int, Field(ge=1)]
  max_validation_rows: Annotated[int, Field(ge=1)]


@section
class PretrainConfig:
  """A training run from random parameters.

  Attributes:
    total_targets: tokens to predict; padding and the first token of each document do not count, so
      that runs on other rows learn from equally many tokens. The number of steps follows.
    mixture: share of each source of rows, by its name. "unique" and "oracle" are of the input
      `tokens`, and repeat as often as the steps need; any other source is the input of that name,
      and is not repeated.
  """

  model: LlamaConfig
  mesh: MeshConfig
  training: TrainingConfig
  seq_len: int
  total_targets: Annotated[int, Field(ge=1)]
  mixture: dict[str, float]
  weight_decay: Annotated[float, Field(ge=0)]
  evaluation: EvaluationConfig
  seed: int


@section
class PretrainAllInConfig(PretrainConfig):
  """A training run that is longer than `total_targets` by the cost of other stages.

  Attributes:
    matched_inputs: inputs whose FLOPs, added up, are spent on additional steps.
  """

  matched_inputs: tuple[str, ...]


def pretrain(context: Context, config: PretrainConfig) -> dict[str, Any]:
  """Trains a seed model or an arm from scratch; writes the loss of each test document."""
  return _pretrain(context, config, more_flops=0.0)


def pretrain_all_in(context: Context, config: PretrainAllInConfig) -> dict[str, Any]:
  """Trains an arm for `total_targets` and for the FLOPs that `matched_inputs` cost."""
  cost = sum(context.inputs[name].summary["flops"] for name in config.matched_inputs)
  return _pretrain(context, config, more_flops=cost)


def _pretrain(
  context: Context, config: PretrainConfig, *, more_flops: float | int
) -> dict[str, Any]:
  tokens = context.inputs["tokens"]
  components, targets_per_row = [], 0.0
  for name, weight in config.mixture.items():
    is_real = name in REAL
    artifact, shard = (tokens, name) if is_real else (context.inputs[name], "rows")
    source = rows.open_rows(artifact, seq_len=config.seq_len, prefix=f"{shard}.")
    components.append(mixtures.Component(name, source, weight, repeat=is_real))
    counts = artifact.shards[shard + rows.SUFFIX]
    targets_per_row += weight * counts["targets"] / counts["records"]
  step_rows = config.training.batch_rows
  step_flops = step_rows * config.seq_len * config.model.train_flops_per_token(config.seq_len)
  num_steps = round(config.total_targets / (step_rows * targets_per_row))
  mesh = config.mesh.make()
  summary, params = train(
    context,
    model_config=config.model,
    mesh=mesh,
    training=config.training,
    seq_len=config.seq_len,
    num_steps=max(1, num_steps + round(more_flops / step_flops)),
    components=components,
    validation=open_held_out(tokens, config.seq_len, "validation"),
    weight_decay=config.weight_decay,
    evaluation=config.evaluation,
    seed=config.seed,
  )
  if test := open_held_out(tokens, config.seq_len, "test"):
    found = document_losses(config.model, mesh, params, test, config.evaluation)
    context.writer.write_jsonl("test.jsonl", loss_records(found))
  return summary


def open_held_out(artifact: artifacts.Artifact, seq_len: int, name: str) -> rows.LabeledRows | None:
  """Opens the rows of a split that was held out; None if none was."""
  labeled = rows.open_labeled(artifact, seq_len=seq_len, name=name)
  return labeled if len(labeled.source) else None


def train(
  context: Context,
  *,
  model_config: LlamaConfig,
  mesh: Mesh,
  training: TrainingConfig,
  seq_len: int,
  num_steps: int,
  components: list[mixtures.Component],
  validation: rows.LabeledRows | None,
  weight_decay: float,
  evaluation: EvaluationConfig,
  seed: int,
  initial_params: Any = None,
  loss: losses.Loss | None = None,
) -> tuple[dict[str, Any], Any]:
  """Runs the training loop in a stage's folder; returns the summary and the resulting parameters.

  Args:
    validation: None trains without a validation loss; the summary then has None for it.
    loss: what is minimized; None for the next-token loss.
  """
  vocab_size = context.inputs["tokenizer"].summary["vocab_size"]
  if vocab_size > model_config.vocab_size:
    raise ValueError(
      f"model.vocab_size={model_config.vocab_size} must be at least the tokenizer's {vocab_size}"
    )
  partitioning.check_batch(
    training.batch_rows, mesh, accumulation_steps=training.accumulation_steps
  )
  process_index, process_count = partitioning.process_rows(mesh)
  mixture = mixtures.Mixture(
    components,
    batch_size=training.batch_rows,
    num_steps=num_steps,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
  )
  model = Llama(model_config)
  limits = {"batch_size": evaluation.batch_rows, "max_rows": evaluation.max_validation_rows}
  scorer = validation and perplexity.RowScorer(model, mesh, validation, **limits)
  result = loop.train(
    folder=context.folder,
    model=model,
    loss=loss or losses.next_token_loss(model),
    mesh=mesh,
    training=training,
    num_steps=num_steps,
    weight_decay=weight_decay,
    mixture=mixture,
    evaluate=scorer and scorer.mean,
    seed=seed,
    label=context.name,
    progress=context.progress,
    initial_params=initial_params,
  )
  context.writer.write_jsonl("curve.jsonl", result.curve)
  evaluations = [r["validation/loss"] for r in result.curve if "validation/loss" in r] or [None]
  targets = sum(int(r["train/tokens"]) for r in result.curve if "train/tokens" in r)
  tokens = result.steps_made * training.batch_rows * seq_len
  summary = {
    "model": configs.to_json(model_config),
    "num_parameters": model_config.num_parameters,
    "step": result.step,
    "steps_made": result.steps_made,
    "checksums": checksums(result.params),
    "tokens": tokens,
    "targets": targets,
    "flops": tokens * model_config.train_flops_per_token(seq_len),
    "passes": mixture.passes(result.steps_made),
    "first_validation": evaluations[0],  # of step 0
    "best_validation": min(evaluations),
    "final_validation": evaluations[-1],
  }
  return summary, result.params


def load_model(artifact: artifacts.Artifact, mesh: Mesh) -> tuple[Llama, Any]:
  """Loads the model of a trained stage, without dropout, and its parameters onto a mesh.

  Raises:
    artifacts.ArtifactError: the parameters are missing, damaged, or not those of the summary.
  """
  try:
    opened = open_checkpoint(artifact.folder)
    params = opened.load_params(mesh, opened.config)
  except (DamagedCheckpointError, ValueError, OSError) as error:
    raise artifacts.ArtifactError(
      f"{error}. Delete the folder {artifact.folder} and run the same command again"
    ) from error
  return Llama(opened.config), params


def document_losses(
  model_config: LlamaConfig,
  mesh: Mesh,
  params: Any,
  labeled: rows.LabeledRows,
  evaluation: EvaluationConfig,
) -> perplexity.DocumentLosses:
  """Scores every document of packed rows."""
  scorer = perplexity.RowScorer(
    Llama(model_config), mesh, labeled, batch_size=evaluation.batch_rows
  )
  return scorer.documents(params)


def loss_records(found: perplexity.DocumentLosses) -> Iterator[dict[str, Any]]:
  """Yields id, group, loss, tokens and bytes of each document, as JSON."""
  for id_, group, nll, num_tokens, num_bytes in zip(
    found.ids,
    found.groups,
    found.nll_sums.tolist(),
    found.token_counts.tolist(),
    found.byte_counts.tolist(),
  ):
    yield {"id": id_, "group": group, "nll": nll, "tokens": num_tokens, "bytes": num_bytes}
