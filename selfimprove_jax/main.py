"""Runs a pipeline from a config; see README.md.

python -m selfimprove_jax.main --config=configs/sbp_quick.py --workdir=runs/sbp_quick
python -m selfimprove_jax.main --config=... --workdir=... --dry_run
python -m selfimprove_jax.main show --workdir=runs/sbp_quick
"""

import shlex
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from selfimprove_jax import compilation_cache, storage

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run, or gs://bucket/folder; run again, it goes on there."
)
_STAGES = flags.DEFINE_list(
  "stages", None, "Only these stages: full names, or a first part such as `arms`."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and run nothing.")
_DEVICE = flags.DEFINE_string("device", None, "With --dry_run: device kind to give times for.")
_NUM_DEVICES = flags.DEFINE_integer("num_devices", 1, "With --dry_run: how many of them.")
_VERIFY = flags.DEFINE_bool(
  "verify", False, "Compare every complete artefact with its checksums first; rebuild damaged ones."
)
_COMPILATION_CACHE = flags.DEFINE_string(
  "compilation_cache",
  compilation_cache.DEFAULT_FOLDER,
  "Folder (or gs://) where what XLA compiled is kept for later runs; empty for none.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator",
  None,
  "host:port of process 0, with --num_processes and --process_id, for a job of several processes. "
  "Cloud TPU, Slurm, Kubernetes and Open MPI are asked by themselves.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_CONNECT_SECONDS = flags.DEFINE_integer(
  "connect_seconds", 300, "How long the processes of a job wait for one another at the start."
)
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
  "heartbeat_seconds", 100, "A process of a job that is silent for so long ends it."
)
_HANG_SECONDS = flags.DEFINE_integer(
  "hang_seconds",
  1800,
  "A job of several processes whose devices get nothing done for so long ends, with a message. "
  "More than the longest step and its compilation take.",
)


def main(argv: list[str]) -> None:
  if argv[1:] not in ([], ["show"]):
    raise app.UsageError(f"unknown arguments {argv[1:]}; there is `show`")
  if not _WORKDIR.value and not _DRY_RUN.value:
    raise app.UsageError("--workdir is missing: the folder that the run is kept in")
  try:
    if argv[1:] == ["show"]:
      from selfimprove_jax.pipelines import show

      show.show(storage.path(_WORKDIR.value))
      return
    if _CONFIG.value is None:
      raise app.UsageError("--config is missing: for example --config=configs/sbp_quick.py")
    _run(_CONFIG.value.to_dict())
  except (ValueError, TypeError, RuntimeError, OSError, ArithmeticError, ImportError) as error:
    logging.debug("failed", exc_info=True)  # the whole traceback, with --verbosity=1
    sys.exit(f"{type(error).__name__}: {error}")


def _run(config):
  from selfimprove_jax.pipelines import plan, runner

  if _DRY_RUN.value:
    runner.check(config)
    folder = storage.path(_WORKDIR.value) if _WORKDIR.value else None
    stages = runner.build(config)
    print(plan.describe(stages, folder, device=_DEVICE.value, num_devices=_NUM_DEVICES.value))
    return
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file
  compilation_cache.keep_in(_COMPILATION_CACHE.value)
  from selfimprove_jax import distributed
  from selfimprove_jax.progress import Progress

  distributed.initialize(
    coordinator=_COORDINATOR.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
    connect_seconds=_CONNECT_SECONDS.value,
    heartbeat_seconds=_HEARTBEAT_SECONDS.value,
    hang_seconds=_HANG_SECONDS.value,
  )
  from selfimprove_jax.training import preemption

  preemption.install()
  progress = Progress(quiet=not distributed.is_main())
  run_folder = storage.path(_WORKDIR.value)
  try:
    runner.run(config, run_folder, only=_STAGES.value, verify=_VERIFY.value, progress=progress)
  except preemption.Preempted as stop:
    print(stop.message)
    raise
  if _STAGES.value is None and distributed.is_main():
    command = shlex.join(["python", "-m", "selfimprove_jax.main", *sys.argv[1:]])
    runner.report(config, run_folder, command=command)


def _parse_flags(argv):
  """Flags by absl; and one line for what it tells by a traceback, such as a misspelt override."""
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError) as error:
    fault = error
    while isinstance(fault, Exception):  # the config library wraps one in another
      fault = fault.args[0]
    sys.exit(f"--config does not know {fault}")


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
