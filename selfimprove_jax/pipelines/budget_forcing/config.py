"""The config of the comparison of test-time compute."""

from typing import Annotated, Literal

from pydantic import Field

from selfimprove_jax.language_models.local import ComputeConfig
from selfimprove_jax.pipelines.budget_forcing.stages import (
  GradingConfig,
  PromptConfig,
  QuestionsConfig,
  ResponseConfig,
  SettingConfig,
)
from selfimprove_jax.pipelines.common.checkpoints import CheckpointConfig
from selfimprove_jax.reasoning.thinking import ThinkingFormat
from selfimprove_jax.runs.runner import RuntimeConfig
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import LocalMeshConfig
from selfimprove_jax.sampling.engine import EngineConfig

_Tokens = Annotated[int, Field(ge=0)]


@section
class DemandedConfig:
  """Range of thinking tokens per sample that a setting asks for; Control is measured against it."""

  min_tokens: _Tokens = 0
  max_tokens: _Tokens | None = None


@section
class ArmConfig(SettingConfig):
  """One arm: a setting, and how it is reported.

  Attributes:
    method: arms of one method, which differ in their compute, form a curve.
    votes: numbers of samples; each gives a point, by a majority vote of the first samples.
  """

  method: str
  demanded: DemandedConfig = DemandedConfig()
  votes: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)

  def __post_init__(self) -> None:
    super().__post_init__()
    if not all(1 <= k <= self.num_samples for k in self.votes):
      raise ValueError(
        f"votes={list(self.votes)} must be numbers of samples, from 1 to "
        f"num_samples={self.num_samples}"
      )


@section
class Config:
  """Config of the pipeline.

  Attributes:
    seed: seed of all samples.
    mesh: devices of one process; each process of a pod job answers its own shards of questions.
    arms: name -> arm.
  """

  pipeline: Literal["budget_forcing"]
  title: str
  runtime: RuntimeConfig
  seed: Annotated[int, Field(ge=0, lt=2**32)]
  mesh: LocalMeshConfig
  checkpoint: CheckpointConfig
  questions: QuestionsConfig
  prompt: PromptConfig
  thinking: ThinkingFormat
  response: ResponseConfig
  compute: ComputeConfig
  engine: EngineConfig
  arms: Annotated[dict[str, ArmConfig], Field(min_length=1)]
  grading: GradingConfig
