"""Checks trainings and estimates their cost from a pipeline's config, before anything runs."""

from collections.abc import Mapping

from selfimprove_jax.data.split import SplitConfig
from selfimprove_jax.data.tokenizer import TokenizerConfig
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.runs.stage import Plan
from selfimprove_jax.training.config import TrainingConfig


def check_has_steps(path: str, total_tokens: int, training: TrainingConfig, seq_len: int) -> None:
  """Raises ValueError if a token budget is smaller than one optimizer step."""
  step_tokens = training.batch_rows * seq_len
  if total_tokens < step_tokens:
    raise ValueError(
      f"{path}={total_tokens} must be at least the {step_tokens} tokens of one optimizer step "
      f"(training.batch_rows={training.batch_rows} rows of seq_len={seq_len})"
    )


def check_holds_out(path: str, split: SplitConfig) -> None:
  """Raises ValueError if a split holds out no documents to measure results on."""
  for name in ("validation_fraction", "test_fraction"):
    if not getattr(split, name) > 0:
      raise ValueError(
        f"{path}.{name}={getattr(split, name)} must be above 0: results are measured on held-out "
        f"documents"
      )


def check_validates(
  path: str, validation_fraction: float, trainings: Mapping[str, TrainingConfig]
) -> None:
  """Raises ValueError if a training may stop early and there is no validation split to tell."""
  for name, training in trainings.items():
    for knob in ("patience", "stop_at_loss"):
      if getattr(training, knob) is not None and not validation_fraction:
        raise ValueError(
          f"{name}.{knob}={getattr(training, knob)} needs a validation loss: set it to None, or "
          f"{path}.validation_fraction above 0"
        )


def check_model(model: LlamaConfig, *, dropout_knob: str) -> None:
  """Raises ValueError for a dropout rate in the model's section; it belongs in `dropout_knob`."""
  if model.dropout_rate:
    raise ValueError(
      f"model.dropout_rate={model.dropout_rate} must be 0: each training has a rate of its own, "
      f"{dropout_knob}"
    )


def check_vocabulary(path: str, tokenizer: TokenizerConfig, model: LlamaConfig) -> None:
  """Raises ValueError if a new tokenizer has more ids than the model has embeddings."""
  if tokenizer.path is None and tokenizer.vocab_size > model.vocab_size:
    raise ValueError(
      f"{path}.vocab_size={tokenizer.vocab_size} must be at most "
      f"model.vocab_size={model.vocab_size}"
    )


def training_plan(model: LlamaConfig, tokens: int | None, seq_len: int) -> Plan:
  """Returns the cost of training a model; `tokens` is None where it is not known yet."""
  flops = None if tokens is None else tokens * model.train_flops_per_token(seq_len)
  # Parameters, gradients and AdamW's two moments, all of them float32.
  return Plan(tokens, flops, 16.0 * model.num_parameters)
