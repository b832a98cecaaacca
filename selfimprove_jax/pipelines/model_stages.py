"""Stages that train: the seed model, the synthesizer, the arms."""

import dataclasses
import math
from typing import Any

import jax

from selfimprove_jax import artifacts, partitioning
from selfimprove_jax.data import mixture as mixtures
from selfimprove_jax.data import rows
from selfimprove_jax.evaluation import conditioning, perplexity
from selfimprove_jax.models.checksums import DamagedCheckpointError, checksums
from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.models.params import abstract_params
from selfimprove_jax.pipelines.stages import Context
from selfimprove_jax.pipelines.text_stages import open_tokenizer
from selfimprove_jax.training import checkpoint, loop, optimizer


def load_model(artifact: artifacts.Artifact, mesh: Any) -> tuple[Llama, Any]:
  """The model of a trained stage, without dropout, and its parameters on a mesh.

  Raises:
    artifacts.ArtifactError: the parameters are missing, damaged, or not those that were trained.
  """
  summary = artifact.summary
  model = Llama(LlamaConfig(**{**summary["model"], "dropout_rate": 0.0}))
  abstract = abstract_params(model, mesh)
  with checkpoint.Checkpoints(artifact.folder / "checkpoints", keep=None) as saved:
    try:
      params = saved.restore_params(summary["step"], abstract)
    except DamagedCheckpointError as error:
      raise artifacts.ArtifactError(
        f"{error}. Delete the folder {artifact.folder} and run the same command again"
      ) from error
  if checksums(params) != summary["checksums"]:
    raise artifacts.ArtifactError(
      f"the parameters in {artifact.folder} are not those of its manifest"
    )
  return model, params


def pretrain(
  context: Context,
  *,
  model: dict[str, Any],
  mesh: dict[str, int],
  training: dict[str, Any],
  num_steps: int,
  mixture: dict[str, float],
  weight_decay: float,
  evaluation: dict[str, Any],
  seed: int,
) -> dict[str, Any]:
  """Trains from scratch on a mixture: the seed model, or an arm.

  Args:
    mixture: source -> weight. `unique` and `oracle` are repeated as often as the steps ask;
      another source is an input of that name, and is never repeated.
    training: see `train`.
  """
  tokens = context.inputs["tokens"]
  seq_len = training["seq_len"]
  components = []
  for name, weight in mixture.items():
    is_real = name in ("unique", "oracle")
    artifact, prefix = (tokens, f"{name}.") if is_real else (context.inputs[name], "rows.")
    source = rows.open_rows(artifact, seq_len=seq_len, prefix=prefix)
    components.append(mixtures.Component(name, source, float(weight), repeat=is_real))
  network, mesh = LlamaConfig(**model), partitioning.make_mesh(**mesh)
  summary, params = train(
    context,
    model=network,
    mesh=mesh,
    training=training,
    num_steps=num_steps,
    components=components,
    validation=rows.open_rows(tokens, seq_len=seq_len, prefix="validation."),
    weight_decay=weight_decay,
    evaluation=evaluation,
    seed=seed,
  )
  test = rows.open_rows(tokens, seq_len=seq_len, prefix="test.")
  found = _document_losses(context, network, mesh, params, test, evaluation)
  context.writer.write_jsonl(
    "test.jsonl",
    (
      {"nll": nll, "tokens": int(count), "bytes": int(num_bytes)}
      for nll, count, num_bytes in zip(
        found.nll_sums.tolist(), found.token_counts, found.byte_counts
      )
    ),
  )
  return summary


def pretrain_all_in(
  context: Context, *, num_steps: int, matched_inputs: list[str], **options: Any
) -> dict[str, Any]:
  """An arm that trains longer than `num_steps`, by what the inputs named cost in FLOPs together."""
  model, training = LlamaConfig(**options["model"]), options["training"]
  step_tokens = training["batch_rows"] * training["seq_len"]
  step_flops = step_tokens * model.train_flops_per_token(training["seq_len"])
  cost = sum(context.inputs[name].summary["flops"] for name in matched_inputs)
  return pretrain(context, num_steps=num_steps + round(cost / step_flops), **options)


def tune_synthesizer(
  context: Context,
  *,
  pairs: str,
  mesh: dict[str, int],
  training: dict[str, Any],
  passes: float,
  dropout_rate: float,
  weight_decay: float,
  evaluation: dict[str, Any],
  gate: float,
  seed: int,
) -> dict[str, Any]:
  """Tunes the seed model to p(d2 | d1), and measures how much of d1 it uses (SBP, section 3.1).

  Loss on d2 and its end only; stops when the loss on held-out pairs no longer falls, and keeps the
  best parameters.

  Args:
    pairs: "nearest", or "random" for the control.
    passes: at most so many over the pairs.
    gate: of `conditioning.conditioning_gap`.
  """
  mesh = partitioning.make_mesh(**mesh)
  seed_model, params = load_model(context.inputs["seed"], mesh)
  model = dataclasses.replace(seed_model.c, dropout_rate=dropout_rate)
  artifact, seq_len = context.inputs["pairs"], training["seq_len"]
  source = rows.open_rows(artifact, seq_len=seq_len, prefix=f"{pairs}-unique.")
  summary, params = train(
    context,
    model=model,
    mesh=mesh,
    training=training,
    num_steps=max(1, math.ceil(passes * len(source) / training["batch_rows"])),
    components=[mixtures.Component("pairs", source, 1.0, repeat=True)],
    validation=rows.open_rows(artifact, seq_len=seq_len, prefix=f"{pairs}-validation."),
    weight_decay=weight_decay,
    evaluation=evaluation,
    seed=seed,
    initial_params=params,
  )
  true, random = (
    _document_losses(
      context,
      model,
      mesh,
      params,
      rows.open_rows(artifact, seq_len=seq_len, prefix=f"gap-{d1}."),
      evaluation,
    )
    for d1 in ("true", "random")
  )
  gap = conditioning.conditioning_gap(true.nll_sums, random.nll_sums, true.token_counts, gate=gate)
  return {**summary, "conditioning": gap}


def _document_losses(context, model, mesh, params, source, evaluation):
  scorer = perplexity.RowScorer(Llama(model), mesh, source, batch_size=evaluation["batch_rows"])
  return scorer.documents(params, open_tokenizer(context.inputs["tokenizer"]))


def _optimizer(t, num_steps, weight_decay):
  learning_rate = optimizer.warmup_cosine(
    peak_lr=t["peak_lr"],
    final_lr=t["final_lr"],
    warmup_steps=min(round(t["warmup_fraction"] * num_steps), num_steps - 1),
    num_steps=num_steps,
  )
  tx = optimizer.make_optimizer(
    t["optimizer"],
    learning_rate,
    weight_decay=weight_decay,
    b1=t["b1"],
    b2=t["b2"],
    eps=t["eps"],
    clip_norm=t["clip_norm"],
    momentum_dtype=t["momentum_dtype"],
    skip_spikes=t["skip_spikes"],
  )
  return learning_rate, tx


def train(
  context: Context,
  *,
  model: LlamaConfig,
  mesh: jax.sharding.Mesh,
  training: dict[str, Any],
  num_steps: int,
  components: list[mixtures.Component],
  validation: rows.RowSource,
  weight_decay: float,
  evaluation: dict[str, Any],
  seed: int,
  initial_params: Any = None,
) -> tuple[dict[str, Any], Any]:
  """One run of the loop: the summary of it, and the parameters that it ended with.

  Args:
    training: batch_rows, seq_len, optimizer, momentum_dtype, skip_spikes, peak_lr, final_lr,
      warmup_fraction, b1, b2, eps, clip_norm, accumulation_steps, num_evaluations,
      num_checkpoints, keep, patience, board_every.
    evaluation: batch_rows, and max_validation_rows for the evaluations between steps.
  """
  t = training
  learning_rate, tx = _optimizer(t, num_steps, weight_decay)
  vocab_size = context.inputs["tokenizer"].summary["vocab_size"]
  if vocab_size > model.vocab_size:
    raise ValueError(f"model.vocab_size={model.vocab_size} is below the tokenizer's {vocab_size}")
  partitioning.check_batch(t["batch_rows"], mesh, accumulation_steps=t["accumulation_steps"])
  process_index, process_count = partitioning.process_rows(mesh)
  mixture = mixtures.Mixture(
    components,
    batch_size=t["batch_rows"],
    num_steps=num_steps,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
  )
  network = Llama(model)
  scorer = perplexity.RowScorer(
    network,
    mesh,
    validation,
    batch_size=evaluation["batch_rows"],
    max_rows=evaluation["max_validation_rows"],
  )
  result = loop.train(
    folder=context.folder,
    model=network,
    tx=tx,
    learning_rate=learning_rate,
    mesh=mesh,
    mixture=mixture,
    schedule=loop.Schedule(
      num_steps=num_steps,
      board_every=t["board_every"],
      evaluate_every=-(-num_steps // t["num_evaluations"]),
      checkpoint_every=-(-num_steps // t["num_checkpoints"]),
      keep=t["keep"],
      patience=t["patience"],
      accumulation_steps=t["accumulation_steps"],
    ),
    seed=seed,
    evaluate=scorer.mean,
    label=context.name,
    progress=context.progress,
    initial_params=initial_params,
  )
  context.writer.write_jsonl("curve.jsonl", result.curve)
  # Step 0 is where the run starts, and never its result.
  evaluations = [r for r in result.curve if "validation/loss" in r and r["step"] > 0]
  tokens = result.steps_made * t["batch_rows"] * t["seq_len"]
  summary = {
    "model": dataclasses.asdict(model),
    "num_parameters": model.num_parameters,
    "step": result.step,
    "steps_made": result.steps_made,
    "checksums": checksums(result.params),
    "tokens": tokens,
    "flops": tokens * model.train_flops_per_token(t["seq_len"]),
    "passes": mixture.passes(result.steps_made),
    "best_validation": min(r["validation/loss"] for r in evaluations),
    "final_validation": evaluations[-1]["validation/loss"],
  }
  return summary, result.params
