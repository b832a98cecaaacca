"""A stage: a function from artefacts to one artefact; and what is known of it before it runs."""

import contextlib
import dataclasses
import importlib
import inspect
import json
import tempfile
import time
import uuid
from collections.abc import Callable
from typing import Any

from selfimprove_jax import artifacts, distributed, storage
from selfimprove_jax.progress import Progress

TIMINGS = "timings.jsonl"


@dataclasses.dataclass(frozen=True)
class Context:
  """What a stage's function is given beside its config.

  Attributes:
    name: the stage's.
    writer: of its artefact.
    inputs: role -> complete artefact.
    progress: where long work is shown.
  """

  name: str
  writer: artifacts.Writer
  inputs: dict[str, artifacts.Artifact]
  progress: Progress

  @property
  def folder(self) -> storage.Path:
    return self.writer.folder


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a stage will cost, as far as it is known before; None where it is not.

  Attributes:
    tokens: tokens trained on, sampled or written.
    flops: model FLOPs (`LlamaConfig.train_flops_per_token` states the convention).
    state_bytes: parameters, gradients and optimizer state on the devices together.
  """

  tokens: int | None = None
  flops: float | int | None = None
  state_bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
  """One artefact to be.

  Attributes:
    name: its folder under the run's.
    function: "module:function" under `selfimprove_jax.pipelines`, taking a `Context` and `config`
      as keyword arguments and returning the summary of the artefact. A name, so that a plan can be
      made, and a light stage run, without importing what heavy ones need.
    config: all that determines its output beside its inputs; JSON-able.
    inputs: role -> name of the stage that makes it.
    uses_devices: whether it runs on the accelerators.
  """

  name: str
  function: str
  config: dict[str, Any]
  inputs: dict[str, str] = dataclasses.field(default_factory=dict)
  plan: Plan = Plan()
  uses_devices: bool = False

  def load(self) -> Callable[..., dict[str, Any]]:
    """The function.

    Raises:
      TypeError: a key of the config is missing or unknown.
    """
    module, name = self.function.split(":")
    function = getattr(importlib.import_module(f"selfimprove_jax.pipelines.{module}"), name)
    try:
      inspect.signature(function).bind(None, **self.config)
    except TypeError as error:
      raise TypeError(
        f"config of stage {self.name!r} does not fit {self.function}: {error}"
      ) from None
    return function


def is_complete(stage: Stage, run_folder: storage.Path) -> bool:
  try:
    artifacts.open_artifact(run_folder / stage.name)
  except artifacts.ArtifactError:
    return False
  return True


def verify(stage: Stage, run_folder: storage.Path) -> None:
  """Makes a complete artefact unfinished again if a shard's bytes are not the manifest's."""
  folder = run_folder / stage.name
  if (folder / "manifest.json").exists():
    record = json.loads((folder / "config.json").read_bytes())
    for name in artifacts.Writer(folder, **record).repair():
      print(f"{stage.name}: {name} is damaged and will be made again", flush=True)


def check_config(stage: Stage, run_folder: storage.Path) -> None:
  """Refuses a stage folder that was begun with another config, before anything runs."""
  path = run_folder / stage.name / "config.json"
  if path.exists():
    there = json.loads(path.read_bytes())["config"]
    lines = artifacts.differences(there, json.loads(json.dumps(stage.config)))
    if lines:
      raise artifacts.ConfigMismatchError(
        f"stage {stage.name} in {run_folder} was made with another config (there -> now):\n  "
        + "\n  ".join(lines)
      )


def run_stage(stage: Stage, run_folder: storage.Path, progress: Progress) -> None:
  """Makes the stage's artefact complete: all of it, what is missing of it, or nothing.

  Shards that are not as long as the manifest says are made again; the same config and inputs give
  the same bytes, so what was built on them stays valid. In a job of several processes the main one
  writes; the others take part in what devices do, and wait while there is nothing of it.

  Raises:
    artifacts.ArtifactError: an input is unfinished or damaged.
    artifacts.ConfigMismatchError: the folder holds another config, or was made from other inputs.
  """
  function = stage.load()
  if stage.uses_devices:
    # Before there is a lock, a folder or a config: a follower must find what the main process
    # found, not what it has made since.
    distributed.barrier(f"{stage.name} begins")
    follows = not distributed.is_main()
    with contextlib.nullcontext() if follows else storage.lock(run_folder / stage.name):
      if not distributed.from_main(lambda: is_complete(stage, run_folder)):
        _make(stage, function, run_folder, progress)
  elif distributed.is_main():
    with storage.lock(run_folder / stage.name):
      if not is_complete(stage, run_folder):
        _make(stage, function, run_folder, progress)
  if distributed.is_main():
    artifacts.tidy(run_folder / stage.name)
  distributed.barrier(f"{stage.name} is complete")


def _make(stage, function, run_folder, progress):
  inputs = {role: artifacts.open_artifact(run_folder / name) for role, name in stage.inputs.items()}
  with contextlib.ExitStack() as stack:
    arguments = dict(
      config=stage.config, inputs={role: artifact.digest for role, artifact in inputs.items()}
    )
    folder = run_folder / stage.name
    with distributed.main_first(stage.name) if stage.uses_devices else contextlib.nullcontext():
      if distributed.is_main():
        writer = artifacts.Writer(folder, **arguments)
        for name in writer.repair():
          print(f"{stage.name}: {name} is damaged and is made again", flush=True)
      else:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="follower-"))
        writer = artifacts.Follower(folder, scratch=scratch)
    if stage.uses_devices:
      distributed.barrier(f"{stage.name} is open")
    began = time.monotonic()
    try:
      summary = function(Context(stage.name, writer, inputs, progress), **stage.config)
      writer.finish(summary)
    finally:
      if distributed.is_main():
        record_seconds(run_folder, stage.name, time.monotonic() - began)


def record_seconds(run_folder: storage.Path, name: str, seconds: float) -> None:
  """Notes time spent; kept apart from the artefacts, which know nothing of time."""
  line = json.dumps({"stage": name, "seconds": seconds}) + "\n"
  storage.append_line(
    run_folder / TIMINGS, line, key=f"{name.replace('/', '-')}-{uuid.uuid4().hex}"
  )


def seconds_spent(run_folder: storage.Path) -> dict[str, float]:
  """Stage -> seconds, over every run that worked on it."""
  spent: dict[str, float] = {}
  for line in storage.read_lines(run_folder / TIMINGS):
    record = json.loads(line)
    spent[record["stage"]] = spent.get(record["stage"], 0.0) + record["seconds"]
  return spent
