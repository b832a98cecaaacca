"""Runs an experiment: a config, a sweep and a resource, turned into work units.

  python experiments/launch.py --experiment=experiments/sbp_share/sweep.py --dry_run
  python experiments/launch.py --experiment=experiments/sbp_share/sweep.py --backend=local
  python experiments/launch.py --experiment=... --backend=slurm --root=/shared/runs
  python experiments/launch.py --experiment=... --backend=xmanager --executor=kubernetes \
    --root=gs://bucket/runs --image=REGISTRY/IMAGE:TAG

Every unit is one `python -m selfimprove_jax.main` in ROOT/<experiment>/<unit>. Run again after any
interruption, the same command passes over what is complete and goes on with the rest.
"""

import pathlib
import sys

from absl import app, flags

# Python looks for modules beside a program, and this one's are named from the folder above.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments.launcher import experiment as experiment_lib
from experiments.launcher import local, records, slurm, xm

_EXPERIMENT = flags.DEFINE_string("experiment", None, "File that defines get_experiment().")
_BACKEND = flags.DEFINE_enum(
  "backend", "local", ["local", "slurm", "xmanager"], "What runs the units."
)
_ROOT = flags.DEFINE_string("root", "runs", "Folder of all experiments.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and every command, run nothing.")
_RETRIES = flags.DEFINE_integer("retries", 1, "How often a failing unit is started again.")
_MAX_PARALLEL = flags.DEFINE_integer("max_parallel", None, "Most units at a time.")
_DEVICES = flags.DEFINE_list("devices", None, "local: ids of the GPUs to use; by default all.")
_GRACE_S = flags.DEFINE_float("grace_s", 120.0, "Seconds that a unit has to save in, once told to.")
_ONLY = flags.DEFINE_list("only", None, "Only these units or arms.")
_PYTHON = flags.DEFINE_string("python", None, "Interpreter of the units; by default this one.")
_EXECUTOR = flags.DEFINE_enum(
  "executor", "local", ["local", "vertex", "kubernetes"], "xmanager: where its work units run."
)
_IMAGE = flags.DEFINE_string("image", None, "xmanager: container image with the package, pushed.")
_SBATCH = flags.DEFINE_list("sbatch", [], "slurm: more options, such as partition=gpu,account=x.")


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  if not _EXPERIMENT.value:
    raise app.UsageError("--experiment is missing: experiments/sbp_share/sweep.py, for example")
  try:
    is_complete = _launch()
  except (ValueError, ImportError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
  sys.exit(0 if is_complete else 1)


def _launch():
  experiment = experiment_lib.load_experiment(_EXPERIMENT.value)
  is_remote = _BACKEND.value == "xmanager" and _EXECUTOR.value != "local"
  python = _PYTHON.value or ("python" if is_remote else sys.executable)
  units = experiment_lib.work_units(experiment, root=_ROOT.value, python=python)
  experiment_lib.check_overrides(experiment)
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


def _select(units):
  if _ONLY.value is None:
    return units
  known = {unit.name for unit in units} | {unit.arm for unit in units}
  if unknown := [name for name in _ONLY.value if name not in known]:
    raise ValueError(f"--only={','.join(unknown)}: there are {[unit.name for unit in units]}")
  return [unit for unit in units if {unit.name, unit.arm} & set(_ONLY.value)]


def _slurm(experiment, units):
  if not _DRY_RUN.value:
    folder = records.make_folder(_ROOT.value, experiment.name)
    units = [unit for unit in units if not records.is_complete(folder, unit)]
    if not units:
      print("every unit is complete already")
      return True
  else:
    folder = pathlib.Path(_ROOT.value) / experiment.name / "launch"
  script = slurm.script(
    experiment.name,
    units,
    folder,
    retries=_RETRIES.value,
    grace_s=_GRACE_S.value,
    max_parallel=_MAX_PARALLEL.value,
    options=_SBATCH.value,
  )
  print(script if _DRY_RUN.value else slurm.submit(script, folder))
  return True


def _remote(experiment, units):
  xm.check_remote(experiment.name, units, executor=_EXECUTOR.value, image=_IMAGE.value)
  options = dict(
    executor=_EXECUTOR.value,
    image=_IMAGE.value,
    retries=_RETRIES.value,
    grace_s=_GRACE_S.value,
  )
  if _DRY_RUN.value:
    print(xm.describe(experiment.name, units, **options))
  else:
    xm.run_remotely(experiment.name, units, **options)
  return True


def _own_command():
  """This program with this command's flags, for one unit on the local backend."""
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
