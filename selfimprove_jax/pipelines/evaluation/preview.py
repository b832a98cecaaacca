"""Shows what an evaluation will ask, and what it costs (`--dry_run`)."""

from collections.abc import Sequence

import selfimprove_jax.pipelines.common.endpoints as endpoints
import selfimprove_jax.pipelines.evaluation.pipeline as pipeline
from selfimprove_jax.data.tokenizer import Tokenizer, make_tokenizer
from selfimprove_jax.evaluation.tasks.items import Choices, Document, Example, Generation
from selfimprove_jax.models.checkpoints import open_checkpoint
from selfimprove_jax.pipelines.common.benchmarks import read_examples
from selfimprove_jax.pipelines.common.checkpoints import planned_config
from selfimprove_jax.pipelines.evaluation.config import Config

_SHOWN = 3


def preview(config: Config) -> str:
  """Returns the first whole prompts of each task, its tokens, and the FLOPs of its forward passes.

  Every request is counted whole, as if none shared its context with another. The tokens of a model
  behind an endpoint are not known here.

  Raises:
    ValueError: like the stage `examples`.
  """
  tokenizer, model = None, None
  if not endpoints.is_url(config.checkpoint):
    model = planned_config(config.checkpoint)
    tokenizer = _tokenizer(config.checkpoint) if model is not None else None
  lines = []
  for name in config.named_tasks:
    examples = list(read_examples(pipeline.examples_config(config, name)))
    told = f"{len(examples):,} examples"
    if tokenizer is not None:
      lengths = _lengths(examples, tokenizer)
      window = config.engine.max_length
      flops = sum(
        min(length, window) * model.forward_flops_per_token(min(length, window))
        for length in lengths
      )
      told += f", {len(lengths):,} requests, at most {sum(lengths):,} tokens, {flops:.2e} FLOPs"
    lines += ["", f"== {name}: {told}"]
    for example in examples[:_SHOWN]:
      lines += [f"-- {example.id}", *_shown(example)]
  return "\n".join(lines)


def _tokenizer(checkpoint: str) -> Tokenizer:
  files = open_checkpoint(checkpoint).tokenizer_files()
  special = files.special_tokens
  return make_tokenizer(files.backend, special, name=checkpoint, default=special.get("eos_token"))


def _lengths(examples: Sequence[Example], tokenizer: Tokenizer) -> list[int]:
  texts, extra = [], []
  for example in examples:
    item = example.item
    if isinstance(item, Choices):
      some = [context + continuation for context, continuation in item.pairs()]
    else:
      generates = isinstance(item, Generation)
      some = [item.prompt] * item.num_samples if generates else [item.text]
    texts += some
    extra += [item.max_tokens if isinstance(item, Generation) else 0] * len(some)
  lengths = [len(ids) for ids in tokenizer.encode_batch(texts)]
  return [max(length, 1) + more for length, more in zip(lengths, extra, strict=True)]


def _shown(example: Example) -> list[str]:
  item = example.item
  if isinstance(item, Document):
    return [item.text]
  if isinstance(item, Generation):
    return [item.prompt, f"[generates at most {item.max_tokens} tokens; accepts {item.answers}]"]
  shown = list(item.contexts)
  for index, (_, continuation) in enumerate(item.pairs()):
    shown.append(f"[{'right' if index in item.gold else 'choice'}] {continuation!r}")
  return shown
