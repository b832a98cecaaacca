"""Stage that scores a task with a checkpoint or with a model behind an endpoint."""

from typing import Any

import selfimprove_jax.pipelines.common.endpoints as endpoints
from selfimprove_jax.pipelines.common import benchmarks
from selfimprove_jax.pipelines.common.endpoints import EndpointConfig
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section


@section
class ScoresConfig(benchmarks.ScoresConfig):
  """Configures the stage `scores`.

  Attributes:
    endpoint: for a checkpoint that is the address of an endpoint.
  """

  endpoint: EndpointConfig


def scores(context: Context, config: ScoresConfig) -> dict[str, Any]:
  """Runs the examples of a task on the checkpoint, or on the model behind an endpoint."""
  path = context.inputs["checkpoint"].summary["path"]
  if not endpoints.is_url(path):
    return benchmarks.scores(context, config)
  return benchmarks.write_scores(
    context,
    lambda: endpoints.connect(path, config.endpoint),
    examples_per_shard=config.examples_per_shard,
  )
