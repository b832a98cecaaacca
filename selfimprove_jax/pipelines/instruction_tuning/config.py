"""Configures instruction tuning."""

from typing import Annotated, Literal

from pydantic import Field

from selfimprove_jax.data.tokenizer import SpecialTokens
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.common import planning
from selfimprove_jax.pipelines.common.export import ExportConfig
from selfimprove_jax.pipelines.common.models import EvaluationConfig
from selfimprove_jax.pipelines.instruction_tuning.conversations import ConversationsConfig
from selfimprove_jax.pipelines.instruction_tuning.stages import RowsConfig, TuningConfig
from selfimprove_jax.runs.runner import RuntimeConfig
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.training.config import TrainingConfig

_Seed = Annotated[int, Field(ge=0, lt=2**32)]


@section
class InitialConfig:
  """Names the model to start from, with its own tokenizer.

  Attributes:
    path: a Hugging Face folder, a GGUF file, an orbax folder of `save_params`, or a stage that
      trained a model, such as an arm of EntiGraph.
    special_tokens: tokens that the tokenizer does not define itself.
    chat_template: file with a Jinja template, for a model that has none or to replace its own. Its
      special tokens must be in the vocabulary.
  """

  path: str
  special_tokens: SpecialTokens = SpecialTokens()
  chat_template: str | None = None


@section
class Config:
  """Configures the pipeline.

  Attributes:
    seed: seeds the training.
    split_seed: seeds the choice of held-out conversations.
    model: the model to train; the checkpoint must have its shape.
  """

  pipeline: Literal["instruction_tuning"]
  title: str
  runtime: RuntimeConfig
  seed: _Seed
  split_seed: _Seed
  seq_len: Annotated[int, Field(ge=2)]
  mesh: MeshConfig
  initial: InitialConfig
  conversations: ConversationsConfig
  rows: RowsConfig = RowsConfig()
  model: LlamaConfig
  training: TrainingConfig
  tuning: TuningConfig
  evaluation: EvaluationConfig
  export: ExportConfig

  def __post_init__(self) -> None:
    if self.model.dropout_rate:
      raise ValueError(
        f"model.dropout_rate={self.model.dropout_rate} must be 0: instruction tuning has none"
      )
    planning.check_validates(
      "conversations", self.conversations.validation_fraction, {"training": self.training}
    )
