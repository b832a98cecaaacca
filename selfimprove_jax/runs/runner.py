"""Runs the stages of a run: one after another in this process, or several at a time in others.

On accelerators a stage uses all devices, so stages run in order in this process. On a CPU a small
model leaves most of a thread pool idle: stages that do not need each other run in processes of one
thread each, whose results do not depend on the number of cores.
"""

import functools
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
from pydantic import Field

from selfimprove_jax.runs import artifacts, processes, storage
from selfimprove_jax.runs.stage import TIMINGS, Stage, is_complete, run_stage
from selfimprove_jax.runtime import allocator, distributed, partitioning
from selfimprove_jax.runtime.config import choices, section, to_json
from selfimprove_jax.runtime.progress import Progress

CONFIG = "config.json"
# What a run's folder holds besides artifacts.
_NO_ARTIFACTS = frozenset({CONFIG, TIMINGS, "logs", "report"})


@section
class RuntimeConfig:
  """How a run is carried out; does not change what it produces.

  Attributes:
    parallel_stages: how many stages may run at the same time; only on CPUs.
  """

  parallel_stages: Annotated[int, Field(ge=1)] = 1


class StageError(RuntimeError):
  """A stage failed in a process of its own."""


def run(
  stages: Sequence[Stage],
  run_folder: storage.Path,
  *,
  only: Sequence[str] | None = None,
  verify: bool = False,
  retry_failed: bool = False,
  parallel: int = 1,
  progress: Progress,
  config: Any = None,
) -> None:
  """Completes the artifact of every stage.

  Args:
    stages: in an order in which each stands after those that it reads.
    only: names of stages, or first parts of names; None for all.
    verify: compare complete artifacts with their checksums, not only with their sizes.
    retry_failed: make the failed records of chosen stages again; what was made from them, too.
    parallel: see `RuntimeConfig`.
    config: JSON value; recorded in the run folder as `config.json`.

  Raises:
    ValueError: `only` names an unknown stage, or a mesh does not fit the devices.
    artifacts.ConfigMismatchError: the folder holds artifacts of other configs.
    StageError: a stage failed in a process of its own. In this process its own error is raised.
  """
  chosen = select(stages, only)
  with distributed.main_first("config"):
    if distributed.is_main():
      _check_configs(stages, run_folder)
      if verify:
        for stage in stages:
          _verify(stage.name, run_folder / stage.name)
      if retry_failed:
        _reopen_failed(stages, chosen, run_folder)
  unfinished = distributed.from_main(
    lambda: [stage.name for stage in chosen if not is_complete(run_folder / stage.name)]
  )
  todo = [stage for stage in chosen if stage.name in unfinished]
  if distributed.is_main():
    for stage in chosen:
      if stage not in todo:
        artifacts.tidy(run_folder / stage.name)
        print(f"{stage.name}: complete", flush=True)
  for stage in todo:
    if stage.uses_devices:
      partitioning.check_meshes(stage.config, jax.device_count(), path=f"stage {stage.name}")
  if distributed.is_main() and config is not None:
    with storage.lock(run_folder):
      storage.remove_temporaries(run_folder)
      artifacts.write_json(run_folder / CONFIG, config)
  if parallel > 1 and jax.default_backend() == "cpu" and jax.process_count() == 1:
    _run_processes(todo, run_folder, parallel)
  else:
    for stage in todo:
      run_stage(stage, run_folder, progress)


def select(stages: Sequence[Stage], only: Sequence[str] | None) -> list[Stage]:
  """Returns the stages that `only` names: `arms` stands for all whose name begins with `arms/`.

  Raises:
    ValueError: a name is unknown.
  """
  if only is None:
    return list(stages)
  chosen = []
  for name in only:
    matches = [s for s in stages if s.name == name or s.name.startswith(name + "/")]
    if not matches:
      names = [stage.name for stage in stages]
      raise ValueError(f"--stages={name}: there is no such stage{choices(name, names)}")
    chosen += [match.name for match in matches]
  return [stage for stage in stages if stage.name in chosen]


def delete(run_folder: storage.Path) -> None:
  """Deletes a run; does nothing if the folder is empty or missing.

  Raises:
    ValueError: the folder holds no run, or something else besides; nothing is deleted.
  """
  if not run_folder.exists() or not any(run_folder.iterdir()):
    return
  if not isinstance(read_config(run_folder), dict) or "pipeline" not in read_config(run_folder):
    raise ValueError(f"{run_folder} holds no run: its {CONFIG} names no pipeline")
  stages = list(_artifacts_below(run_folder, skipped=_NO_ARTIFACTS))
  with storage.lock(run_folder):
    for folder in stages:
      with storage.lock(folder):  # a command that is at work there ends its stage first
        artifacts.clear(folder)
    artifacts.clear(run_folder)


def _artifacts_below(
  folder: storage.Path, skipped: frozenset[str] = frozenset()
) -> Iterator[storage.Path]:
  for path in folder.iterdir():
    if path.name in skipped or path.name == storage.LOCK or storage.is_temporary(path):
      continue
    if path.is_dir() and artifacts.is_artifact(path):
      yield path
    elif path.is_dir():
      yield from _artifacts_below(path)
    else:
      raise ValueError(
        f"{path} is no part of a run, so the run is not deleted: move the file away, or use "
        f"another --workdir"
      )


def _check_configs(stages: Sequence[Stage], run_folder: storage.Path) -> None:
  """Refuses stage folders of another config, or clears them if the run has produced nothing yet.

  Raises:
    artifacts.ConfigMismatchError: lists every difference.
  """
  differing = {stage.name: lines for stage in stages if (lines := _differences(stage, run_folder))}

  def refuse_if_complete() -> None:
    if any(artifacts.has_manifest(run_folder / stage.name) for stage in stages):
      lines = [f"{stage}: {line}" for stage, found in differing.items() for line in found]
      raise artifacts.ConfigMismatchError(
        f"{run_folder} was made with another config; use another --workdir, or delete the folders "
        f"of these stages and of all that read them.\nDifferences (there -> now):\n  "
        + "\n  ".join(lines)
      )

  for name in differing:
    refuse_if_complete()
    with storage.lock(run_folder / name):
      refuse_if_complete()  # while we waited, another command may have completed a stage
      artifacts.clear(run_folder / name)
    print(f"{name}: begun again, since it was begun with another config and nothing is complete")


def _differences(stage: Stage, run_folder: storage.Path) -> list[str]:
  there = artifacts.read_config(run_folder / stage.name)
  return [] if there is None else artifacts.differences(there, to_json(stage.config))


def _verify(name: str, folder: storage.Path) -> None:
  if not artifacts.has_manifest(folder):
    return
  with storage.lock(folder):
    if reason := artifacts.damage(folder):
      print(f"{name}: {reason}. The stage will be made again", flush=True)
    for shard in artifacts.repair(folder):
      print(f"{name}: {shard} is damaged and will be made again", flush=True)


def _reopen_failed(
  stages: Sequence[Stage], chosen: Sequence[Stage], run_folder: storage.Path
) -> None:
  """Removes failed records, and what was made from their stages; keeps all other records."""
  failed = {
    stage.name: number
    for stage in chosen
    if stage.failures is not None and (number := stage.failures.count(run_folder / stage.name))
  }
  changed = set(failed)
  for stage in stages:
    if changed.intersection(stage.inputs.values()):
      changed.add(stage.name)
  # From the last to the first: a command that is killed here must not leave a complete artifact of
  # a stage that reads a reopened one.
  for stage in reversed(stages):
    folder = run_folder / stage.name
    if stage.name not in changed or not folder.exists():
      continue
    with storage.lock(folder):
      if stage.failures is None:
        artifacts.clear(folder)
      else:
        reads_changed = bool(changed.intersection(stage.inputs.values()))
        artifacts.unlist(folder, forget_inputs=reads_changed)
        stage.failures.remove(folder)
    number = failed.get(stage.name)
    reason = "reads a stage with failures" if number is None else f"{number} failures"
    print(f"{stage.name}: {reason}; it is opened again", flush=True)
  if not failed:
    print("--retry_failed: nothing has failed", flush=True)


def _run_processes(todo: Sequence[Stage], run_folder: storage.Path, parallel: int) -> None:
  names = frozenset(stage.name for stage in todo)
  tasks = [
    processes.Task(
      name=stage.name,
      make=functools.partial(_worker, stage, run_folder),
      after=names.intersection(stage.inputs.values()),
    )
    for stage in todo
  ]
  ends = processes.run(tasks, slots=range(parallel), stop_on_failure=True)
  if failed := [end for end in ends if end.returncode and not end.stopped]:
    name, code = failed[0].task, failed[0].returncode
    log = log_path(run_folder, name)
    traceback = f", with the traceback in {log}" if log.exists() else ""  # none after a SIGKILL
    raise StageError(
      f"stage {name} ended with exit code {code}; its error is above{traceback}. Complete "
      f"artifacts are kept: run the same command to continue"
    )


def _worker(stage: Stage, run_folder: storage.Path, slot: int) -> list[processes.Process]:
  del slot
  # The folder is on the command line so that `ps` tells which run a worker belongs to.
  argv = [sys.executable, "-m", "selfimprove_jax.runs.worker", str(run_folder), str(os.getpid())]
  environment = _worker_environment()
  return [processes.Process(argv=argv, environment=environment, stdin=pickle.dumps(stage))]


def log_path(run_folder: storage.Path, name: str) -> storage.Path:
  """Returns where a stage that failed in a process of its own leaves the traceback."""
  return run_folder / "logs" / f"{name.replace('/', '-')}.log"


def _worker_environment() -> dict[str, str]:
  """Returns variables for one thread per process and an allocator that keeps freed memory."""
  flags = os.environ.get("XLA_FLAGS", "")
  one_thread = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
  return {
    "XLA_FLAGS": f"{flags} {one_thread}".strip(),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"),
    **allocator.environment(),
  }


def read_config(run_folder: storage.Path) -> Any:
  """Returns the config that a run was last started with.

  Raises:
    ValueError: the folder holds no run.
    artifacts.ArtifactError: the config is damaged.
  """
  if not (run_folder / CONFIG).exists():
    raise ValueError(f"{run_folder} holds no run: it has no {CONFIG}")
  try:
    return artifacts.read_json(run_folder / CONFIG)
  except artifacts.ArtifactError as error:
    raise artifacts.ArtifactError(f"{error}. The run's command writes it again") from None
