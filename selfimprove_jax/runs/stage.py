"""Stages: a stage reads artifacts and writes one; a run is a folder of such artifacts."""

import contextlib
import dataclasses
import json
import pathlib
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from selfimprove_jax.runs import artifacts, storage
from selfimprove_jax.runs.shards import ShardLoop
from selfimprove_jax.runtime import distributed
from selfimprove_jax.runtime.config import to_json
from selfimprove_jax.runtime.progress import Progress

TIMINGS = "timings.jsonl"


@dataclasses.dataclass(frozen=True)
class Context:
  """Gives a stage's function its inputs and the artifact to write.

  Attributes:
    name: the name of the stage.
    writer: writes the stage's artifact.
    inputs: role -> complete artifact.
    progress: shows bars of long work.
    on_all_processes: every process of a pod job runs the function, not the main process alone.
  """

  name: str
  writer: artifacts.Writer
  inputs: Mapping[str, artifacts.Artifact]
  progress: Progress
  on_all_processes: bool = True

  @property
  def folder(self) -> storage.Path:
    return self.writer.folder

  def shards(self, num_shards: int, **options: Any) -> ShardLoop:
    """Returns the loop that writes the artifact shard by shard; see `ShardLoop` for the options."""
    return ShardLoop(
      self.writer, num_shards, label=self.name, alone=not self.on_all_processes, **options
    )


@dataclasses.dataclass(frozen=True)
class Plan:
  """Estimates the cost of a stage before it runs; None stands for an unknown number.

  Attributes:
    tokens: tokens trained on, sampled or written.
    flops: model FLOPs (`LlamaConfig.train_flops_per_token` states the convention).
    state_bytes: parameters, gradients and optimizer state, each counted once. The axes `fsdp` and
      `tensor` of the stage's mesh shard them.
    is_bound: tokens and FLOPs are the most that the stage may take.
  """

  tokens: int | None = None
  flops: float | int | None = None
  state_bytes: float | None = None
  is_bound: bool = False


@dataclasses.dataclass(frozen=True)
class Failures:
  """Finds and removes the failed records of a stage, so that `--retry_failed` makes them again.

  Attributes:
    count: folder -> number of failed records, whether the artifact is complete or not.
    remove: turns the files of an unlisted artifact into those of an unfinished one, which the
      stage's function completes by the records that are missing.
  """

  count: Callable[[storage.Path], int]
  remove: Callable[[storage.Path], None]


@dataclasses.dataclass(frozen=True)
class Stage:
  """Describes one step of a pipeline, which produces one artifact.

  Attributes:
    name: the artifact's folder below the run's; may contain slashes.
    function: writes the artifact's shards and returns its summary, which is JSON-able. It must be a
      function of a module, since a parallel stage runs in a process that imports it.
    config: a config section with everything but the inputs that determines the output.
    inputs: role -> name of the stage that makes it.
    plan: what the stage costs.
    uses_devices: every process of a pod job runs the stage, not the main process alone.
    failures: for a stage whose records may fail; both functions must be those of a module.
  """

  name: str
  function: Callable[[Context, Any], dict[str, Any]]
  config: Any
  inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
  plan: Plan = Plan()
  uses_devices: bool = False
  failures: Failures | None = None


@dataclasses.dataclass(frozen=True)
class Run:
  """A run folder and the config that it was made from; a pipeline's `report` reads it.

  Attributes:
    config: the pipeline's `Config`.
    command: the command line, to be repeated in the report.
  """

  folder: storage.Path
  config: Any
  command: str = ""

  def artifact(self, name: str) -> artifacts.Artifact:
    """Opens a stage's artifact.

    Raises:
      artifacts.ArtifactError: it is missing, unfinished or damaged.
    """
    return artifacts.open_artifact(self.folder / name)

  def has(self, name: str) -> bool:
    """Tells whether a stage's artifact is complete."""
    return is_complete(self.folder / name)

  def seconds(self) -> dict[str, float]:
    """Returns stage -> wall-clock seconds, summed over all commands that worked on it."""
    spent: dict[str, float] = {}
    for line in storage.read_lines(self.folder / TIMINGS, errors="replace"):
      # A line that is damaged costs its seconds.
      with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
        record = json.loads(line)
        spent[record["stage"]] = spent.get(record["stage"], 0.0) + float(record["seconds"])
    return spent


def is_complete(folder: storage.Path) -> bool:
  try:
    artifacts.open_artifact(folder)
  except artifacts.ArtifactError:
    return False
  return True


def run_stage(stage: Stage, run_folder: storage.Path, progress: Progress) -> None:
  """Completes the stage's artifact: makes what is missing of it.

  Shards whose size is not the manifest's are made again, and so is the artifact if the manifest is
  damaged; the same config and inputs give the same bytes, so artifacts made from them stay valid.
  In a pod job the main process writes; the others take part if the stage uses devices, and
  otherwise wait.

  Raises:
    artifacts.ArtifactError: an input is unfinished or damaged.
    artifacts.ConfigMismatchError: the folder was begun with another config or other inputs.
  """
  folder = run_folder / stage.name
  if stage.uses_devices:
    # All processes look at the folder before the main one changes it, so that all of them agree on
    # whether there is anything to do.
    distributed.barrier(f"{stage.name} begins")
    with storage.lock(folder) if distributed.is_main() else contextlib.nullcontext():
      if not distributed.from_main(lambda: is_complete(folder)):
        _make(stage, run_folder, progress)
  elif distributed.is_main():
    with storage.lock(folder):
      if not is_complete(folder):
        _make(stage, run_folder, progress)
  if distributed.is_main():
    artifacts.tidy(folder)
  distributed.barrier(f"{stage.name} is complete")


def _make(stage: Stage, run_folder: storage.Path, progress: Progress) -> None:
  inputs = {role: artifacts.open_artifact(run_folder / name) for role, name in stage.inputs.items()}
  digests = {role: artifact.digest for role, artifact in inputs.items()}
  with contextlib.ExitStack() as stack:
    scratch = None
    if not distributed.is_main():
      made = stack.enter_context(tempfile.TemporaryDirectory(prefix="selfimprove-"))
      scratch = pathlib.Path(made)
    with distributed.main_first(stage.name) if stage.uses_devices else contextlib.nullcontext():
      writer = artifacts.Writer(
        run_folder / stage.name, config=to_json(stage.config), inputs=digests, scratch=scratch
      )
      for line in writer.repaired:
        print(f"{stage.name}: {line}", flush=True)
    if stage.uses_devices:
      distributed.barrier(f"{stage.name} is open")  # until then nobody writes
    asks = distributed.from_main if stage.uses_devices else lambda make: make()
    if asks(lambda: is_complete(run_folder / stage.name)):
      return  # only its config was damaged
    began = time.monotonic()
    try:
      context = Context(stage.name, writer, inputs, progress, on_all_processes=stage.uses_devices)
      writer.finish(stage.function(context, stage.config))
    finally:
      if distributed.is_main():
        _record_seconds(run_folder, stage.name, time.monotonic() - began)


def _record_seconds(run_folder: storage.Path, name: str, seconds: float) -> None:
  # Apart from the artifacts, whose bytes must not depend on time.
  line = json.dumps({"stage": name, "seconds": seconds}) + "\n"
  key = f"{name.replace('/', '-')}-{uuid.uuid4().hex}"
  storage.append_line(run_folder / TIMINGS, line, key=key)
