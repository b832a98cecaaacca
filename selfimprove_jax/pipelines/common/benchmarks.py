"""Stages that score models on benchmarks: the examples of a task, their scores, its metrics.

  examples/TASK -> scores/MODEL/TASK -> metrics/MODEL/TASK
                -> dynamics/MODEL

MODEL is the stage that trained a model. The pipeline `evaluation` has one model, whose stages are
scores/TASK and metrics/TASK.
"""

import dataclasses
import gzip
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

import selfimprove_jax.pipelines.common.grading as grading
from selfimprove_jax.data import decontamination as decontamination_lib
from selfimprove_jax.data.decontamination import DecontaminationConfig
from selfimprove_jax.evaluation import scoring
from selfimprove_jax.evaluation.tasks import builtin, hub, metrics, registry
from selfimprove_jax.evaluation.tasks.items import Example
from selfimprove_jax.evaluation.tasks.task import Row, Task
from selfimprove_jax.language_models import LanguageModel
from selfimprove_jax.language_models.local import ComputeConfig
from selfimprove_jax.models.checkpoints import saved_steps
from selfimprove_jax.pipelines.common import checkpoints
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Context, Stage
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import LocalMeshConfig
from selfimprove_jax.sampling.engine import EngineConfig

_Count = Annotated[int, Field(ge=1)]


@section
class BenchmarksConfig:
  """Names the benchmarks on which a training pipeline scores its models; without tasks, none.

  Attributes:
    tasks: as in the pipeline `evaluation`: names in `evaluation.tasks.builtin.TASKS` and paths of
      YAML files, separated by commas.
    data_dir: folder of the tasks' files. Training text is checked against them, unless the section
      `decontamination` names another folder or its `action` is "off".
    hub: reads the tasks from the Hugging Face hub instead. Training text is not checked then.
    max_examples: takes the first examples of each task; None takes all.
    examples_per_shard: examples per file, which is the unit of resumption.
    num_slots: requests that the engine computes at once.
    max_length: maximum tokens of prompt and completion together; None takes the `seq_len` that the
      models are trained on. A longer prompt loses its beginning.
    mesh: over the devices of one process; each process of a pod job scores its own shards.
    at_checkpoints: also scores the checkpoints that training left on disk: `training.keep` says how
      many stay, `training.num_checkpoints` how far apart they are.
  """

  tasks: str = ""
  data_dir: str | None = None
  hub: bool = False
  max_examples: Annotated[int, Field(ge=2)] | None = None
  examples_per_shard: _Count = 100
  num_slots: _Count = 16
  max_length: Annotated[int, Field(ge=2)] | None = None
  mesh: LocalMeshConfig = LocalMeshConfig()
  compute: ComputeConfig = ComputeConfig()
  at_checkpoints: bool = False

  def __post_init__(self) -> None:
    if self.named_tasks and self.data_dir is None and not self.hub:
      raise ValueError(
        f"data_dir must name the folder with the files of tasks={self.tasks!r}; or set hub=True to "
        f"read them from the Hugging Face hub"
      )

  @property
  def named_tasks(self) -> dict[str, tuple[str, Task]]:
    """The tasks by name, each with what `tasks` calls it."""
    return builtin.named(self.tasks)

  def check_length(self, seq_len: int) -> None:
    """Raises ValueError if `max_length` exceeds what the models are trained on."""
    if self.max_length is not None and self.max_length > seq_len:
      raise ValueError(
        f"benchmarks.max_length={self.max_length} must be at most seq_len={seq_len}, the context "
        f"that the models are trained on; None takes all of it"
      )


def decontamination(
  config: DecontaminationConfig, benchmarks: BenchmarksConfig
) -> DecontaminationConfig | None:
  """Returns what training text is checked against: by default the benchmarks to be scored.

  Returns:
    None if nothing is checked: `action` is "off", or no folder is known.
  """
  if config.action == "off":
    return None
  if config.data_dir is not None:
    return config
  if not benchmarks.named_tasks or benchmarks.data_dir is None or benchmarks.hub:
    return None
  files = dict.fromkeys(task.file for _, task in benchmarks.named_tasks.values())
  tasks = config.tasks or tuple(map(decontamination_lib.task_of, files))
  return dataclasses.replace(config, data_dir=benchmarks.data_dir, tasks=tasks)


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


def examples_config(
  path: str, task: Task, *, data_dir: str, hub: bool, max_examples: int | None
) -> ExamplesConfig:
  """Returns the config of the stage that makes the examples of a task.

  Args:
    path: what the page calls the task.
  """
  return ExamplesConfig(
    task=path,
    version=task.version,
    definition=task.definition,
    data_dir=data_dir,
    hub=hub,
    max_examples=max_examples,
  )


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
    examples_per_shard: examples per file, which is the unit of resumption.
  """

  mesh: LocalMeshConfig
  compute: ComputeConfig
  engine: EngineConfig
  examples_per_shard: _Count


def scores(context: Context, config: ScoresConfig) -> dict[str, Any]:
  """Runs the examples of a task on the model of the input `checkpoint`.

  It may be a stage that trained a model, or the stage `checkpoint`, which names one.
  """
  return write_scores(
    context, lambda: _load(context, config), examples_per_shard=config.examples_per_shard
  )


def _load(context: Context, config: ScoresConfig, *, step: int | None = None) -> LanguageModel:
  return checkpoints.load_model(
    context.inputs["checkpoint"], config.mesh, config.compute, config.engine, step=step
  )


def write_scores(
  context: Context, load: Callable[[], LanguageModel], *, examples_per_shard: int
) -> dict[str, Any]:
  """Writes a record of each example; processes of a pod job take different shards.

  Args:
    load: returns the model; not called if the artifact is complete.
  """
  asked = _read_asked(context.inputs["examples"])
  with context.progress.track(len(asked), label=context.name, unit="examples") as bar:
    shards = context.shards(
      math.ceil(len(asked) / examples_per_shard),
      count=lambda record: {"truncated": record["truncated"]},
      on_made_elsewhere=lambda counts: bar.update(counts["records"]),
    )
    model = None
    for index in shards:
      model = model or load()
      some = asked[index * examples_per_shard : (index + 1) * examples_per_shard]
      shards.write_jsonl(index, grading.graded(scoring.run(model, some)))
      bar.update(len(some))
      shards.check_preemption()
  return {"examples": shards.totals["records"], "truncated": shards.totals["truncated"]}


def _read_asked(examples: Artifact) -> list[Example]:
  return [Example.from_json(value) for value in examples.records()]


@section
class MetricsConfig:
  """Configures the stage `measure`."""

  task: str


def measure(context: Context, config: MetricsConfig) -> dict[str, Any]:
  """Computes the metrics of a task by `seqio.Evaluator`."""
  records = list(context.inputs["scores"].records())
  found = _measure(config.task, _read_asked(context.inputs["examples"]), records)
  return {
    "metrics": found,
    "chance": {name: metrics.chance(name, records) for name in found},
    "equal_choices": sum(record.get("equal_choices", 0) > 0 for record in records),
  }


def _measure(
  task: str, asked: Sequence[Example], records: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
  by_id = {record["id"]: record for record in records}
  found = registry.evaluate(builtin.get(task), asked, lambda some: [by_id[e.id] for e in some])
  return {name: estimate.to_dict() for name, estimate in found.items()}


@section
class DynamicsConfig(ScoresConfig):
  """Configures the stage `dynamics`.

  Attributes:
    tasks: what the page calls the tasks; the examples of each are an input of the task's name.
    examples_per_shard: examples that are scored at once.
  """

  tasks: tuple[str, ...]


def dynamics(context: Context, config: DynamicsConfig) -> dict[str, Any]:
  """Measures the checkpoints that a finished training left on disk, without its result.

  A record holds the metrics of a step on a task; `scores` has the examples of the result. Nothing
  is written to a finished stage, so its steps are the same whenever this is resumed.
  """
  trained, tasks = context.inputs["checkpoint"], [builtin.get(path) for path in config.tasks]
  asked = {task.name: _read_asked(context.inputs[task.name]) for task in tasks}
  steps = [s for s in saved_steps(trained.folder) if s != trained.summary["step"]]
  work = [(step, path) for step in steps for path in config.tasks]
  total = len(steps) * sum(map(len, asked.values()))
  with context.progress.track(total, label=context.name, unit="examples") as bar:
    shards = context.shards(
      len(work),
      count=lambda record: {"examples": record["examples"]},
      on_made_elsewhere=lambda counts: bar.update(counts.get("examples", 0)),
    )
    for index in shards:
      step, path = work[index]
      name = builtin.get(path).name
      model, records = _load(context, config, step=step), []
      for some in _chunks(asked[name], config.examples_per_shard):
        records += grading.graded(scoring.run(model, some))
        bar.update(len(some))
        shards.check_preemption()
      found = _measure(path, asked[name], records)
      record = {"step": step, "task": name, "examples": len(records), "metrics": found}
      shards.write_jsonl(index, [record])
  return {"steps": steps}


def _chunks(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
  for begin in range(0, len(examples), size):
    yield examples[begin : begin + size]


def examples_stages(config: BenchmarksConfig) -> list[Stage]:
  """Returns the stages that make the examples of each task, which all models share."""
  options = {"hub": config.hub, "max_examples": config.max_examples}
  return [
    Stage(
      f"examples/{name}",
      examples,
      examples_config(path, task, data_dir=config.data_dir or "", **options),
    )
    for name, (path, task) in config.named_tasks.items()
  ]


def model_stages(
  config: BenchmarksConfig, model: str, *, seq_len: int, with_dynamics: bool = True
) -> list[Stage]:
  """Returns the stages that score a model on each task.

  Args:
    model: the stage that trained it, or recorded a checkpoint.
    seq_len: row length that it was trained on.
    with_dynamics: `at_checkpoints` applies to the model.
  """
  tasks = config.named_tasks
  setup = {
    "mesh": config.mesh,
    "compute": config.compute,
    "engine": EngineConfig(num_slots=config.num_slots, max_length=config.max_length or seq_len),
    "examples_per_shard": config.examples_per_shard,
  }
  made = []
  for name, (path, _) in tasks.items():
    made += task_stages(name, path, scores, ScoresConfig(**setup), model=model, suffix=f"/{model}")
  if config.at_checkpoints and with_dynamics and tasks:
    measured = DynamicsConfig(**setup, tasks=tuple(path for path, _ in tasks.values()))
    inputs = {"checkpoint": model, **{name: f"examples/{name}" for name in tasks}}
    made.append(Stage(f"dynamics/{model}", dynamics, measured, inputs, uses_devices=True))
  return made


def task_stages(
  name: str,
  path: str,
  function: Callable[[Context, Any], dict[str, Any]],
  config: ScoresConfig,
  *,
  model: str,
  suffix: str = "",
) -> list[Stage]:
  """Returns the stages that score a model on a task and measure it.

  Args:
    name, path: the task's name, and what the page calls it.
    function, config: of the stage `scores`.
    model: the stage that trained or recorded the model.
    suffix: follows `scores` and `metrics` in the names of the stages.
  """
  asked, scored = f"examples/{name}", f"scores{suffix}/{name}"
  inputs = {"checkpoint": model, "examples": asked}
  measured = {"examples": asked, "scores": scored}
  return [
    Stage(scored, function, config, inputs, uses_devices=True),
    Stage(f"metrics{suffix}/{name}", measure, MetricsConfig(task=path), measured),
  ]
