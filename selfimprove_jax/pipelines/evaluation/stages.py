"""Stages of an evaluation: the examples of a task, their scores, its metrics."""

import gzip
import itertools
import json
import math
import os
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

import selfimprove_jax.pipelines.evaluation.endpoints as endpoints
import selfimprove_jax.pipelines.evaluation.grading as grading
from selfimprove_jax.evaluation import scoring
from selfimprove_jax.evaluation.tasks import builtin, hub, metrics, registry
from selfimprove_jax.evaluation.tasks.items import Example
from selfimprove_jax.evaluation.tasks.task import Row, Task
from selfimprove_jax.language_models import LanguageModel
from selfimprove_jax.language_models.local import ComputeConfig
from selfimprove_jax.pipelines.common.checkpoints import load_model
from selfimprove_jax.pipelines.evaluation.endpoints import EndpointConfig
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import LocalMeshConfig
from selfimprove_jax.sampling.engine import EngineConfig


@section
class ExamplesConfig:
  """Configures the stage `examples`.

  Attributes:
    task: a name in `builtin.TASKS`, or the path of a YAML file.
    version, definition: of the task, which make results comparable.
    data_dir: folder of the tasks' files, and of data sets that `save_to_disk` wrote.
    hub: reads data sets of the Hugging Face hub instead of files.
    max_examples: takes the first ones of the file; None takes all.
  """

  task: str
  version: int
  definition: str
  data_dir: str
  hub: bool
  max_examples: Annotated[int, Field(ge=2)] | None


def read_examples(config: ExamplesConfig) -> Iterator[Example]:
  """Yields the examples of a task.

  Raises:
    ValueError: a file is missing, or a record is not what the task takes; names its line.
  """
  task = builtin.get(config.task)
  if (task.version, task.definition) != (config.version, config.definition):
    raise ValueError(f"the file {config.task} has changed since the run began")
  shots = _read(task, config, task.shots_file) if task.num_shots else ()
  made = task.examples(_read(task, config, task.file), shots)
  yield from itertools.islice(made, config.max_examples)


def _read(task: Task, config: ExamplesConfig, name: str) -> Iterator[Row]:
  if config.hub and task.definition == "":
    if task.hub is None:
      raise ValueError(f"task {task.name} is not on the hub; give its file {task.file} by data_dir")
    is_shots = name == task.shots_file and task.hub.shots_split
    split = task.hub.shots_split if is_shots else task.hub.split
    yield from hub.read(task.hub, split, folder=config.data_dir)
    return
  path = os.path.join(config.data_dir, name)
  if not os.path.exists(path):
    raise ValueError(
      f"task {task.name}: there is no file {path}; it has JSON lines with the fields "
      f"{', '.join(task.fields)}"
    )
  with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
    for number, line in enumerate(lines, 1):
      try:
        record = json.loads(line)
      except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
      if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: {line[:80]!r}; a line must be a JSON object")
      yield record


def examples(context: Context, config: ExamplesConfig) -> dict[str, Any]:
  """Makes the prompts of a task from its files; raises like `read_examples`."""
  made = list(read_examples(config))
  if len(made) < 2:
    raise ValueError(
      f"task {config.task} has {len(made)} examples in {config.data_dir}; a standard error needs "
      f"at least 2"
    )
  grading.check(made)
  context.writer.write_jsonl("examples.jsonl", (example.to_json() for example in made))
  return {"examples": len(made), "groups": len({example.group for example in made})}


@section
class ScoresConfig:
  """Configures the stage `scores`.

  Attributes:
    endpoint: for a checkpoint that is the address of an endpoint.
    examples_per_shard: examples per file, which is the unit of resumption.
  """

  mesh: LocalMeshConfig
  compute: ComputeConfig
  engine: EngineConfig
  endpoint: EndpointConfig
  examples_per_shard: Annotated[int, Field(ge=1)]


def scores(context: Context, config: ScoresConfig) -> dict[str, Any]:
  """Runs the examples of a task on the checkpoint; processes of a pod job take different shards."""
  asked = [Example.from_json(value) for value in context.inputs["examples"].records()]
  size = config.examples_per_shard
  with context.progress.track(len(asked), label=context.name, unit="examples") as bar:
    shards = context.shards(
      math.ceil(len(asked) / size),
      count=lambda record: {"truncated": record["truncated"]},
      on_made_elsewhere=lambda counts: bar.update(counts["records"]),
    )
    model = None  # a finished artifact loads no model
    for index in shards:
      model = model or _load(context.inputs["checkpoint"], config)
      some = asked[index * size : (index + 1) * size]
      shards.write_jsonl(index, grading.graded(scoring.run(model, some)))
      bar.update(len(some))
      shards.check_preemption()
  return {"examples": shards.totals["records"], "truncated": shards.totals["truncated"]}


def _load(checkpoint: Artifact, config: ScoresConfig) -> LanguageModel:
  if endpoints.is_url(checkpoint.summary["path"]):
    return endpoints.connect(checkpoint.summary["path"], config.endpoint)
  return load_model(checkpoint, config.mesh, config.compute, config.engine)


@section
class MetricsConfig:
  """Configures the stage `measure`."""

  task: str


def measure(context: Context, config: MetricsConfig) -> dict[str, Any]:
  """Computes the metrics of a task by `seqio.Evaluator`."""
  asked = [Example.from_json(value) for value in context.inputs["examples"].records()]
  records = {record["id"]: record for record in context.inputs["scores"].records()}
  task = builtin.get(config.task)
  found = registry.evaluate(task, asked, lambda some: [records[e.id] for e in some])
  return {
    "metrics": {name: estimate.to_dict() for name, estimate in found.items()},
    "chance": {name: metrics.chance(name, list(records.values())) for name in found},
    "equal_choices": sum(record.get("equal_choices", 0) > 0 for record in records.values()),
  }
