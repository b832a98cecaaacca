"""Runs the stages of a pipeline: one after another here, or several at a time as processes.

On accelerators one stage has all devices, so stages run in order in this process. On a CPU a small
model leaves most of a thread pool idle, and stages that do not need each other run as processes of
one thread each instead; their results then do not depend on the number of cores either.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from selfimprove_jax import allocator, artifacts, distributed, storage
from selfimprove_jax.pipelines import stages as stages_lib
from selfimprove_jax.pipelines.stages import Stage
from selfimprove_jax.progress import Progress

CONFIG = "config.json"


class StageError(RuntimeError):
  """A stage failed; the message is its own."""


def check(config: dict[str, Any]) -> None:
  """Finds misspelt and missing keys in every section, before anything runs.

  Raises:
    ValueError: there is one, which is named; or there is no such pipeline.
  """
  from selfimprove_jax.pipelines import (
    budget_forcing_config,
    continued_pretraining_config,
    sbp_config,
  )

  checks = {
    "sbp": sbp_config.check,
    "continued_pretraining": continued_pretraining_config.check,
    "budget_forcing": budget_forcing_config.check,
  }
  if config.get("pipeline") not in checks:
    raise ValueError(f"pipeline={config.get('pipeline')!r} is unknown; there are {sorted(checks)}")
  checks[config["pipeline"]](config)


def build(config: dict[str, Any]) -> list[Stage]:
  """The stages of the pipeline that a checked config names."""
  from selfimprove_jax.pipelines import budget_forcing, continued_pretraining, sbp

  builds = {
    "sbp": sbp.build,
    "continued_pretraining": continued_pretraining.build,
    "budget_forcing": budget_forcing.build,
  }
  return builds[config["pipeline"]](config)


def report(config: dict[str, Any], run_folder: storage.Path, *, command: str) -> None:
  """Writes the report of a finished run, and prints its table and path."""
  from selfimprove_jax.pipelines import (
    budget_forcing_report,
    continued_pretraining_report,
    sbp_report,
  )

  reports = {
    "sbp": sbp_report.make_and_print,
    "continued_pretraining": continued_pretraining_report.make_and_print,
    "budget_forcing": budget_forcing_report.make_and_print,
  }
  reports[config["pipeline"]](config, run_folder, command=command)


def run(
  config: dict[str, Any],
  run_folder: storage.Path,
  *,
  only: Sequence[str] | None,
  verify: bool,
  progress: Progress,
) -> None:
  """Makes every stage's artefact complete, or those of `only` (names, or beginnings of names).

  Args:
    verify: compare complete artefacts with their checksums, not their sizes alone.

  Raises:
    ValueError: the config has a missing or unknown key, or `only` an unknown stage.
    artifacts.ConfigMismatchError: the folder belongs to another config.
    StageError: a stage failed.
  """
  check(config)
  stages = build(config)
  chosen = select(stages, only)
  with distributed.main_first("config"):
    if distributed.is_main():
      artifacts.check_same_config(run_folder / CONFIG, config)
      for stage in stages:
        stages_lib.check_config(stage, run_folder)
        if verify:
          stages_lib.verify(stage, run_folder)
  unfinished = distributed.from_main(
    lambda: [stage.name for stage in chosen if not stages_lib.is_complete(stage, run_folder)]
  )
  todo = [stage for stage in chosen if stage.name in unfinished]
  if distributed.is_main():
    for stage in chosen:
      if stage not in todo:
        artifacts.tidy(run_folder / stage.name)
        print(f"{stage.name}: complete", flush=True)
  parallel = config["runtime"]["parallel_stages"]
  if parallel > 1 and _has_only_this_cpu():
    _run_processes(todo, chosen, run_folder, parallel)
  else:
    for stage in todo:
      stages_lib.run_stage(stage, run_folder, progress)


def _has_only_this_cpu() -> bool:
  """Accelerators, and the processes of a job, are not shared between stages: these run in order."""
  import jax

  return jax.default_backend() == "cpu" and jax.process_count() == 1


def select(stages: Sequence[Stage], only: Sequence[str] | None) -> list[Stage]:
  """The stages that `only` names: `arms` stands for every stage whose name begins with `arms/`."""
  if only is None:
    return list(stages)
  chosen = []
  for name in only:
    matches = [s for s in stages if s.name == name or s.name.startswith(name + "/")]
    if not matches:
      raise ValueError(f"there is no stage {name!r}; there are {[s.name for s in stages]}")
    chosen += matches
  return [stage for stage in stages if stage in chosen]


def _run_processes(todo, chosen, run_folder, parallel):
  waiting = list(todo)
  running: dict[str, subprocess.Popen] = {}
  relays: dict[str, threading.Thread] = {}
  chosen_names = {stage.name for stage in chosen}
  failure = None
  with _forwarding_sigterm(running) as terminated:
    while waiting or running:
      unfinished = {stage.name for stage in waiting} | running.keys()
      for stage in list(waiting):
        blocked = unfinished & set(stage.inputs.values()) & chosen_names
        if failure or terminated or blocked or len(running) >= parallel:
          continue
        waiting.remove(stage)
        running[stage.name], relays[stage.name] = _start(stage, run_folder)
      if failure or terminated:
        waiting = []
      for name, process in list(running.items()):
        if process.poll() is not None:
          del running[name]
          relays[name].join()
          if process.returncode and failure is None:
            failure = (name, process.returncode)
            for other in running.values():
              other.terminate()
      time.sleep(0.05)
  if terminated:
    raise SystemExit(143)
  if failure:
    name, code = failure
    raise StageError(
      f"stage {name} ended with exit code {code}; what it said is above, and whole in "
      f"{log_path(run_folder, name)}. What is complete is kept: the same command goes on from there"
    )


def log_path(run_folder: storage.Path, name: str) -> storage.Path:
  return run_folder / "logs" / f"{name.replace('/', '-')}.log"


def _start(stage: Stage, run_folder: storage.Path) -> tuple[subprocess.Popen, threading.Thread]:
  worker = [sys.executable, "-m", "selfimprove_jax.pipelines.worker"]
  process = subprocess.Popen(
    [*worker, str(run_folder), stage.name, str(os.getpid())],
    env=_worker_environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  relay = threading.Thread(target=_relay, args=(process.stdout,), daemon=True)
  relay.start()
  return process, relay


def _relay(lines):
  for line in lines:
    print(line, end="", flush=True)


def _worker_environment() -> dict[str, str]:
  """One thread each, and an allocator that returns less memory to the system between steps."""
  environment = dict(os.environ)
  flags = environment.get("XLA_FLAGS", "")
  environment["XLA_FLAGS"] = (
    f"{flags} --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1".strip()
  )
  for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    environment[name] = "1"
  environment |= allocator.environment()
  environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  return environment


@contextlib.contextmanager
def _forwarding_sigterm(running: dict[str, subprocess.Popen]) -> Iterator[list[int]]:
  """Within, SIGTERM goes to the stages, which save and leave, and is noted in the list given."""
  terminated: list[int] = []

  def forward(number, _):
    terminated.append(number)
    for process in list(running.values()):
      process.terminate()

  before = signal.signal(signal.SIGTERM, forward)
  try:
    yield terminated
  finally:
    signal.signal(signal.SIGTERM, before)
    for process in running.values():
      process.kill()


def read_config(run_folder: storage.Path) -> dict[str, Any]:
  return json.loads((run_folder / CONFIG).read_bytes())
