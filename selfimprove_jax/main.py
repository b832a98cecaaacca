"""Runs a pipeline from a config; see README.md.

python -m selfimprove_jax.main --config=configs/sbp_quick.py --workdir=runs/sbp_quick
python -m selfimprove_jax.main --config=... --workdir=... --dry_run
python -m selfimprove_jax.main show --workdir=runs/sbp_quick
"""

import re
import runpy
import shlex
import sys
from collections.abc import Collection, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from selfimprove_jax.runs import storage
from selfimprove_jax.runtime import compilation_cache

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Page of the run: a Python file with get_config.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run, or gs://bucket/folder. The same command continues an interrupted run.",
)
_STAGES = flags.DEFINE_list(
  "stages", None, "Run only these stages: names, or first parts of names such as `arms`."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check the config, print the plan, run nothing.")
_DEVICE = flags.DEFINE_string(
  "device", None, "With --dry_run: kind of device to estimate times for, such as h100."
)
_NUM_DEVICES = flags.DEFINE_integer(
  "num_devices",
  None,
  "With --dry_run: number of devices; by default one --device, or else those of this machine.",
  lower_bound=1,
)
_VERIFY = flags.DEFINE_bool(
  "verify",
  False,
  "First compare all complete artifacts with their checksums; rebuild damaged ones.",
)
_RETRY_FAILED = flags.DEFINE_bool(
  "retry_failed",
  False,
  "First reopen the stages (of --stages) with failed calls to a language model. Only these calls "
  "are made again, as other samples; whatever was made from such a stage, trained models too, is "
  "made again. Not for a command that is restarted by itself: each start retries anew.",
)
_OVERWRITE = flags.DEFINE_bool(
  "overwrite",
  False,
  "First delete the run in --workdir, also one of another config. Not for a command that is "
  "restarted by itself: each start begins anew.",
)
_COMPILATION_CACHE = flags.DEFINE_string(
  "compilation_cache",
  compilation_cache.DEFAULT_FOLDER,
  "Folder (or gs://) of compiled programs, kept for later runs; empty for none.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "host:port of process 0, with --num_processes and --process_id, for a job of several processes. "
  "On Cloud TPU, Slurm, Kubernetes and Open MPI JAX finds all three.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process in the job, from 0.")
_CONNECT_SECONDS = flags.DEFINE_integer(
  "connect_seconds", 300, "How long the processes of a job wait for each other at the start."
)
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
  "heartbeat_seconds", 100, "Abort the job if a process misses heartbeats for this long."
)
_HANG_SECONDS = flags.DEFINE_integer(
  "hang_seconds",
  1800,
  "Abort a job of several processes whose devices make no progress for this long. Must be longer "
  "than the longest step with its compilation.",
)


def main(argv: list[str]) -> None:
  if argv[1:] not in ([], ["show"]):
    raise app.UsageError(f"unknown arguments {argv[1:]}; the only one is `show`")
  shows = argv[1:] == ["show"]
  if not _WORKDIR.value and (shows or not _DRY_RUN.value):
    raise app.UsageError("--workdir is missing: the folder of the run")
  if _CONFIG.value is None and not shows:
    raise app.UsageError("--config is missing: for example --config=configs/sbp_quick.py")
  if _OVERWRITE.value and (shows or _DRY_RUN.value):
    raise app.UsageError("--overwrite deletes the run, so it goes with neither show nor --dry_run")
  if _RETRY_FAILED.value and (shows or _DRY_RUN.value or _OVERWRITE.value):
    raise app.UsageError("--retry_failed continues a run: not with show, --dry_run or --overwrite")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # orbax logs every file
  run_folder = storage.path(_WORKDIR.value) if _WORKDIR.value else None
  try:
    if shows:
      _show(run_folder)
    elif _DRY_RUN.value:
      _print_plan(run_folder)
    else:
      _run(run_folder)
  except (ValueError, TypeError, RuntimeError, OSError, ArithmeticError, ImportError) as error:
    logging.debug("failed", exc_info=True)  # the traceback, with --verbosity=1
    sys.exit(f"{type(error).__name__}: {error}")


def _run(run_folder: storage.Path) -> None:
  compilation_cache.keep_in(_COMPILATION_CACHE.value)
  from selfimprove_jax import report
  from selfimprove_jax.runs import runner, stage
  from selfimprove_jax.runtime import distributed, preemption
  from selfimprove_jax.runtime.config import to_json
  from selfimprove_jax.runtime.progress import Progress

  pipeline, config = _load(_CONFIG.value.to_dict(), _overrides())
  stages = pipeline.stages(config)
  runner.select(stages, _STAGES.value)
  distributed.initialize(
    coordinator=_COORDINATOR.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
    connect_seconds=_CONNECT_SECONDS.value,
    heartbeat_seconds=_HEARTBEAT_SECONDS.value,
    hang_seconds=_HANG_SECONDS.value,
  )
  preemption.install()
  if _OVERWRITE.value:
    with distributed.main_first("overwrite"):
      if distributed.is_main():
        runner.delete(run_folder)
  try:
    runner.run(
      stages,
      run_folder,
      only=_STAGES.value,
      verify=_VERIFY.value,
      retry_failed=_RETRY_FAILED.value,
      parallel=config.runtime.parallel_stages,
      progress=Progress(quiet=not distributed.is_main()),
      config=to_json(config),
    )
  except preemption.Preempted as stop:
    print(stop.message)
    raise
  if _STAGES.value is None and distributed.is_main():
    command = shlex.join(["python", "-m", "selfimprove_jax.main", *sys.argv[1:]])
    made = pipeline.report(stage.Run(run_folder, config, command))
    page = report.write(made, run_folder / "report")
    print(report.to_terminal(made), page, sep="\n")


def _print_plan(run_folder: storage.Path | None) -> None:
  from selfimprove_jax.runs import plan, runner
  from selfimprove_jax.runtime import partitioning

  pipeline, config = _load(_CONFIG.value.to_dict(), _overrides())
  stages = runner.select(pipeline.stages(config), _STAGES.value)
  device, num_devices = _DEVICE.value, _NUM_DEVICES.value
  if num_devices is None:
    if device is None:
      import jax

      num_devices = jax.device_count()
    else:
      num_devices = 1
  try:
    partitioning.check_meshes(config, num_devices)
  except ValueError as error:
    raise ValueError(
      f"{error}. Pass --num_devices (and --device, for times) to plan for other devices"
    ) from None
  print(plan.describe(stages, run_folder, device=device, num_devices=num_devices))
  if hasattr(pipeline, "preview"):
    print(pipeline.preview(config))


def _show(run_folder: storage.Path) -> None:
  """Prints the report of what a run has made so far, with examples."""
  from selfimprove_jax import report
  from selfimprove_jax.runs import runner, stage

  pipeline, config = _load(runner.read_config(run_folder))
  made = pipeline.report(stage.Run(run_folder, config))
  print(report.to_terminal(made, examples=True))


def _overrides() -> list[str]:
  """Returns the paths of the knobs that the command line sets."""
  return list(config_flags.get_override_values(flags.FLAGS["config"]))


def _load(values: dict[str, Any], overrides: Collection[str] = ()) -> tuple[Any, Any]:
  """Returns the pipeline that a page names, and the page as the pipeline's `Config`."""
  from selfimprove_jax.pipelines import registry
  from selfimprove_jax.runtime.config import parse

  pipeline = registry.load(values.get("pipeline"))
  return pipeline, parse(pipeline.Config, values, overrides=overrides)


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the flags, which executes the page; every error a user can make becomes one line."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    sys.exit(_without_traceback(str(error)))
  except (AttributeError, KeyError, TypeError) as error:  # an override of an unknown knob
    sys.exit(_unknown_override(argv) or f"--config: {error}")


def _without_traceback(message: str) -> str:
  """Keeps only the error's own text if the page refused something by ValueError."""
  # ml_collections gives the traceback of get_config as text.
  pattern = r"flag (--config=\S+): .*^Traceback .*^ValueError: (.*)"
  found = re.match(pattern, message, re.DOTALL | re.MULTILINE)
  return f"{found[1]}: {found[2].strip()}" if found else message


def _unknown_override(argv: Sequence[str]) -> str | None:
  """Describes the first `--config.path=value` whose path the page does not have."""
  from selfimprove_jax.runtime.config import choices

  pages = [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]
  if not pages:
    return None
  file, *variant = pages[-1].split(":", 1)
  page = runpy.run_path(file)["get_config"](*variant)
  for argument in argv:
    if not argument.startswith("--config."):
      continue
    path, here = argument.removeprefix("--config.").split("=")[0], page
    for i, key in enumerate(path.split(".")):
      owner = ".".join(path.split(".")[:i])
      if not isinstance(here, ConfigDict):
        return f"{argument}: {owner} is a value, not a section"
      if key not in here:
        return f"{argument}: {owner or 'the page'} has no {key!r}{choices(key, here.keys())}"
      here = here[key]
  return None


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
