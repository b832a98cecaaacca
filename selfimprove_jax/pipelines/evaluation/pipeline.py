"""An evaluation as a list of stages.

checkpoint, examples/TASK -> scores/TASK -> metrics/TASK
"""

import selfimprove_jax.pipelines.common.endpoints as endpoints
from selfimprove_jax.pipelines.common import benchmarks
from selfimprove_jax.pipelines.common.checkpoints import CheckpointConfig, checkpoint
from selfimprove_jax.pipelines.evaluation.config import Config
from selfimprove_jax.pipelines.evaluation.stages import ScoresConfig, scores
from selfimprove_jax.runs.stage import Stage


def stages(config: Config) -> list[Stage]:
  """Returns the stages, each after those it reads."""
  made = [_checkpoint(config)]
  computed = ScoresConfig(
    mesh=config.mesh,
    compute=config.compute,
    engine=config.engine,
    endpoint=config.endpoint,
    examples_per_shard=config.examples_per_shard,
  )
  for name, (path, _) in config.named_tasks.items():
    made.append(Stage(f"examples/{name}", benchmarks.examples, examples_config(config, name)))
    made += benchmarks.task_stages(name, path, scores, computed, model="checkpoint")
  return made


def examples_config(config: Config, name: str) -> benchmarks.ExamplesConfig:
  """Returns the config of the stage that makes the examples of a task."""
  path, task = config.named_tasks[name]
  return benchmarks.examples_config(
    path, task, data_dir=config.data_dir, hub=config.hub, max_examples=config.max_examples
  )


def _checkpoint(config: Config) -> Stage:
  if endpoints.is_url(config.checkpoint):
    address = endpoints.AddressConfig(url=config.checkpoint, model=config.endpoint.model)
    return Stage("checkpoint", endpoints.endpoint, address)
  return Stage("checkpoint", checkpoint, CheckpointConfig(path=config.checkpoint))
