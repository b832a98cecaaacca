"""Runs an experiment: a config, a sweep and a resource, turned into work units.

  python tools/launch.py --experiment=experiments/sbp_share/sweep.py --dry_run
  python tools/launch.py --experiment=experiments/sbp_share/sweep.py --backend=local
  python tools/launch.py --experiment=... --backend=slurm --root=/shared/runs
  python tools/launch.py --experiment=... --backend=xmanager --executor=kubernetes \
    --root=gs://bucket/runs --image=REGISTRY/IMAGE:TAG

Every unit is one `python -m selfimprove_jax.main` in ROOT/<experiment>/<unit>. After any
interruption, the same command skips what is complete and continues with the rest.
"""

import pathlib
import sys
from typing import Any

from absl import app, flags

# Python looks for modules next to a program; ours are in the folder above.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from selfimprove_jax.launch import experiment as experiment_lib
from selfimprove_jax.launch import local, records, slurm, xm
from selfimprove_jax.launch.experiment import Experiment, WorkUnit

_EXPERIMENT = flags.DEFINE_string("experiment", None, "File that defines get_experiment().")
_BACKEND = flags.DEFINE_enum(
  "backend", "local", ["local", "slurm", "xmanager"], "Where the units run."
)
_ROOT = flags.DEFINE_string("root", "runs", "Folder of all experiments.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and every command; run nothing.")
_RETRIES = flags.DEFINE_integer("retries", 1, "How often to repeat a failing unit.")
_MAX_PARALLEL = flags.DEFINE_integer("max_parallel", None, "Most units at a time.")
_DEVICES = flags.DEFINE_list("devices", None, "local: ids of the GPUs to use; default: all.")
_GRACE_S = flags.DEFINE_float("grace_s", 120.0, "Seconds a unit has to save after SIGTERM.")
_ONLY = flags.DEFINE_list("only", None, "Run only these units or arms.")
_PYTHON = flags.DEFINE_string("python", None, "Interpreter of the units; default: this one.")
_EXECUTOR = flags.DEFINE_enum(
  "executor", "local", ["local", "vertex", "kubernetes"], "xmanager: executor of its work units."
)
_IMAGE = flags.DEFINE_string("image", None, "xmanager: pushed container image with the package.")
_SBATCH = flags.DEFINE_list("sbatch", [], "slurm: more options, such as partition=gpu,account=x.")


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  if not _EXPERIMENT.value:
    raise app.UsageError("--experiment is missing, such as experiments/sbp_share/sweep.py")
  try:
    is_complete = _launch()
  except (ValueError, ImportError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
  sys.exit(0 if is_complete else 1)


def _launch() -> bool:
  """Runs or submits the units; returns whether none has failed."""
  experiment = experiment_lib.load_experiment(_EXPERIMENT.value)
  is_remote = _BACKEND.value == "xmanager" and _EXECUTOR.value != "local"
  python = _PYTHON.value or ("python" if is_remote else sys.executable)
  units = experiment_lib.work_units(experiment, root=_ROOT.value, python=python)
  runs_main = experiment.command is None
  experiment_lib.check_overrides(experiment, _validate if runs_main else lambda *_: None)
  chosen = _select(units)
  print(experiment_lib.describe(experiment, chosen), flush=True)
  if is_remote:
    return _remote(experiment, chosen)
  if _BACKEND.value == "slurm":
    return _slurm(experiment, chosen)
  groups = local.device_groups(
    experiment.resource, devices=_DEVICES.value, max_parallel=_MAX_PARALLEL.value
  )
  if _DRY_RUN.value:
    print(local.describe(chosen, groups))
    return True
  folder = records.make_folder(_ROOT.value, experiment.name)
  try:
    if _BACKEND.value == "xmanager":
      return xm.run_here(experiment.name, chosen, folder, groups=groups, command=_own_command())
    return local.run(chosen, folder, groups=groups, retries=_RETRIES.value, grace_s=_GRACE_S.value)
  finally:
    print(records.report(folder, chosen), flush=True)


def _validate(values: dict[str, Any], overrides: list[str]) -> None:
  """Raises ValueError for a config that its pipeline refuses."""
  from selfimprove_jax.pipelines import registry
  from selfimprove_jax.runtime import config

  config.parse(registry.load(values.get("pipeline")).Config, values, overrides=overrides)


def _select(units: list[WorkUnit]) -> list[WorkUnit]:
  if _ONLY.value is None:
    return units
  known = {unit.name for unit in units} | {unit.arm for unit in units}
  if unknown := [name for name in _ONLY.value if name not in known]:
    raise ValueError(f"--only={','.join(unknown)}: there are {[unit.name for unit in units]}")
  return [unit for unit in units if {unit.name, unit.arm} & set(_ONLY.value)]


def _slurm(experiment: Experiment, units: list[WorkUnit]) -> bool:
  limits = {"retries": _RETRIES.value, "grace_s": _GRACE_S.value}
  options = {"max_parallel": _MAX_PARALLEL.value, "options": _SBATCH.value}
  parameters = slurm.parameters(experiment.name, experiment.resource, **limits, **options)
  if _DRY_RUN.value:
    print(slurm.describe(units, parameters))
    return True
  folder = records.make_folder(_ROOT.value, experiment.name)
  todo = [unit for unit in units if not records.is_complete(folder, unit)]
  if not todo:
    print("every unit is complete already")
    return True
  for unit, job in zip(todo, slurm.submit(todo, folder, parameters, **limits), strict=True):
    print(f"{unit.name}: submitted as Slurm job {job}")
  return True


def _remote(experiment: Experiment, units: list[WorkUnit]) -> bool:
  remote = xm.Remote(
    experiment=experiment.name,
    executor=_EXECUTOR.value,
    image=_IMAGE.value,
    retries=_RETRIES.value,
    grace_s=_GRACE_S.value,
  )
  remote.check(units)
  if _DRY_RUN.value:
    print(remote.describe(units))
  else:
    remote.submit(units)
  return True


def _own_command() -> list[str]:
  """Returns this program with this command's flags, on the local backend."""
  passed = ["experiment", "root", "retries", "grace_s", "python"]
  values = {name: flags.FLAGS[name].value for name in passed}
  return [
    sys.executable,
    str(pathlib.Path(__file__).resolve()),
    *(f"--{name}={value}" for name, value in values.items() if value is not None),
    "--backend=local",
  ]


if __name__ == "__main__":
  app.run(main)
