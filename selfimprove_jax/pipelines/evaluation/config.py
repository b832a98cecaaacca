"""Configures an evaluation."""

from typing import Annotated, Literal

from pydantic import Field

import selfimprove_jax.pipelines.common.endpoints as endpoints
from selfimprove_jax.evaluation.tasks import builtin
from selfimprove_jax.evaluation.tasks.task import Task
from selfimprove_jax.language_models.local import ComputeConfig
from selfimprove_jax.pipelines.common.endpoints import EndpointConfig
from selfimprove_jax.runs.runner import RuntimeConfig
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import LocalMeshConfig
from selfimprove_jax.sampling.engine import EngineConfig


@section
class Config:
  """Configures the pipeline.

  Attributes:
    checkpoint: path of a Hugging Face folder, a GGUF file, or a checkpoint of ours; or the address
      (https://HOST/v1) of an endpoint.
    endpoint: for an address.
    tasks: names in `evaluation.tasks.builtin.TASKS`, and paths of YAML files with tasks of your own
      (`evaluation.tasks.user.UserTask`), separated by commas.
    data_dir: folder of the tasks' files.
    hub: reads the tasks from the Hugging Face hub; data sets that `save_to_disk` wrote in
      `data_dir` come first. A task of a YAML file is read from its file.
    max_examples: takes the first examples of each task; None takes all.
    examples_per_shard: examples per file, which is the unit of resumption.
    mesh: over the devices of one process; each process of a pod job scores its own shards.
  """

  pipeline: Literal["evaluation"]
  title: str
  runtime: RuntimeConfig
  checkpoint: str
  endpoint: EndpointConfig
  tasks: str
  data_dir: str
  hub: bool = False
  max_examples: Annotated[int, Field(ge=2)] | None = None
  examples_per_shard: Annotated[int, Field(ge=1)]
  mesh: LocalMeshConfig
  compute: ComputeConfig
  engine: EngineConfig

  def __post_init__(self) -> None:
    if not self.named_tasks:
      raise ValueError(f"tasks={self.tasks!r} must name at least one task")
    if endpoints.is_url(self.checkpoint) and not self.endpoint.model:
      raise ValueError(
        f"checkpoint={self.checkpoint!r} is an endpoint; endpoint.model must name its model"
      )

  @property
  def named_tasks(self) -> dict[str, tuple[str, Task]]:
    """The tasks by name, each with what `tasks` calls it."""
    return builtin.named(self.tasks)
