"""Stages of instruction tuning, each after the config sections that it reads."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.data import mixture, packing, rows, split
from selfimprove_jax.evaluation import perplexity
from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.pipelines.common import checkpoints, models
from selfimprove_jax.pipelines.common.export import ExportConfig, write_model
from selfimprove_jax.pipelines.common.initial import open_chat
from selfimprove_jax.pipelines.common.text import write_packed
from selfimprove_jax.pipelines.instruction_tuning.conversations import REJECTED, Record
from selfimprove_jax.pipelines.instruction_tuning.rendering import Renderer
from selfimprove_jax.reasoning.thinking import ThinkingFormat
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section, to_json
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.training.config import TrainingConfig


@section
class RowsConfig:
  """Configures the rows.

  Attributes:
    too_long: what happens to a conversation of more than `seq_len` tokens: "cut" ends it after the
      last answer that fits, and drops it if there is none; "drop" drops it.
  """

  too_long: Literal["cut", "drop"] = "cut"


@section
class RowsStageConfig(RowsConfig):
  """Configures the stage `rows`; `thinking` delimits the thoughts of traces."""

  seq_len: Annotated[int, Field(ge=2)]
  on_error: Literal["raise", "skip"]
  thinking: ThinkingFormat | None


class _Examples:
  """Renders conversations, and counts those that are cut, dropped or rejected."""

  def __init__(self, renderer: Renderer, config: RowsStageConfig):
    self._renderer = renderer
    self._config = config
    self.counts = {"cut": 0, "dropped": 0}
    self.rejected: list[dict[str, str]] = []

  def of(self, records: Iterator[Record]) -> Iterator[packing.Example]:
    """Yields an example of each conversation, with loss on the assistant's tokens alone."""
    max_tokens = self._config.seq_len
    for record in records:
      try:
        rendered = self._renderer.render(record["messages"])
      except ValueError as error:
        message = f"conversation {record['id']!r}: {error}"
        if self._config.on_error == "raise":
          raise ValueError(message) from error
        self.rejected.append({"message": message})
        continue
      if len(rendered.tokens) > max_tokens:
        num_turns = len(rendered.spans)
        rendered = rendered.cut(max_tokens)
        if rendered is None or (
          self._config.too_long == "drop" and len(rendered.spans) < num_turns
        ):
          self.counts["dropped"] += 1
          continue
        self.counts["cut"] += len(rendered.spans) < num_turns
      label = packing.Label(record["id"], record["group"], sum(rendered.num_bytes))
      yield packing.Example(rendered.tokens, rendered.loss_mask, label)


def conversation_rows(context: Context, config: RowsStageConfig) -> dict[str, Any]:
  """Packs conversations into rows; attention does not cross conversations.

  Writes `train.array_record` and so on, the held-out splits with the conversations of their
  segments. The loss is on what the assistant wrote, with the token that ends its turn.

  Raises:
    ValueError: the chat template cannot render a conversation, and `on_error` is "raise"; or no
      conversation to train on fits into a row.
  """
  artifact = context.inputs["conversations"]
  pad_id = open_chat(context.inputs["tokenizer"]).tokenizer.pad_id
  made = _Examples(Renderer(open_chat(context.inputs["tokenizer"]), config.thinking), config)
  summary: dict[str, Any] = {}
  with context.progress.track(None, label=context.name, unit="conversations") as bar:

    def records(name: str) -> Iterator[Record]:
      for record in artifact.read_jsonl("conversations.jsonl"):
        if record["split"] == name:
          yield record
          bar.update(1)

    for name in split.SPLITS:
      examples = made.of(records(name))
      is_scored = name in split.HELD_OUT
      summary[name] = write_packed(
        context, name, examples, config.seq_len, pad_id, is_scored=is_scored
      )
      for _ in examples:  # of a run that ended after this shard: the counts are not in it
        pass
  context.writer.write_jsonl(REJECTED, made.rejected)
  if not summary["train"]["records"]:
    raise ValueError(
      f"no conversation to train on fits into seq_len={config.seq_len} tokens "
      f"({made.counts['dropped']} are longer, {len(made.rejected)} were rejected); raise seq_len"
    )
  return summary | {**made.counts, "rejected": len(made.rejected)}


@section
class TuningConfig:
  """Configures the training; `epochs` counts passes over the rows of the train split."""

  epochs: Annotated[float, Field(gt=0)]
  weight_decay: Annotated[float, Field(ge=0)]


@section
class TunedStageConfig(TuningConfig):
  """Configures `tuned`."""

  model: LlamaConfig
  mesh: MeshConfig
  training: TrainingConfig
  seq_len: int
  evaluation: models.EvaluationConfig
  seed: int


def tuned(context: Context, config: TunedStageConfig) -> dict[str, Any]:
  """Trains the initial model on conversations; scores the held-out ones before and after."""
  mesh = config.mesh.make()
  opened = checkpoints.open_recorded(context.inputs["initial"])
  model_config = opened.compute_config(to_json(config.model))
  artifact = context.inputs["rows"]
  test = models.open_held_out(artifact, config.seq_len, "test")
  batch_size = config.evaluation.batch_rows
  scorer = test and perplexity.RowScorer(Llama(model_config), mesh, test, batch_size=batch_size)

  def score(shard: str, params: Any) -> None:
    if scorer and not context.writer.has(shard):
      context.writer.write_jsonl(shard, models.loss_records(scorer.documents(params)))

  params = opened.load_params(mesh, model_config)
  score("before.jsonl", params)
  train = rows.open_rows(artifact, seq_len=config.seq_len, prefix="train.")
  summary, params = models.train(
    context,
    model_config=model_config,
    mesh=mesh,
    training=config.training,
    seq_len=config.seq_len,
    num_steps=max(1, round(config.epochs * len(train) / config.training.batch_rows)),
    components=[mixture.Component("conversations", train, 1.0, repeat=True)],
    validation=models.open_held_out(artifact, config.seq_len, "validation"),
    weight_decay=config.weight_decay,
    evaluation=config.evaluation,
    seed=config.seed,
    initial_params=params,
  )
  score("after.jsonl", params)
  return summary | {"max_positions": opened.max_positions}


@section
class ExportStageConfig(ExportConfig):
  """Configures `export`."""

  mesh: MeshConfig


def export(context: Context, config: ExportStageConfig) -> dict[str, Any]:
  """Writes the tuned model as the Hugging Face folder `model`, with its chat template."""
  artifact = context.inputs["tokenizer"]
  return write_model(
    context,
    config,
    mesh=config.mesh.make(),
    files=artifact.path("original"),
    eos_token_id=artifact.summary["stop_ids"],
    max_positions=context.inputs["initial"].summary["max_positions"],
  )
