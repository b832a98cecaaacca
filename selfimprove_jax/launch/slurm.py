"""Submits work units to Slurm through `submitit` (extra `slurm`): one job array for a sweep.

On GPUs a unit has one process per GPU, as JAX expects under Slurm. Slurm sends SIGTERM before the
time limit; the unit saves, and its job is queued again and continues.
"""

import functools
import math
import pathlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from selfimprove_jax.launch import local, records
from selfimprove_jax.launch.experiment import WorkUnit, shell
from selfimprove_jax.launch.resource import Resource
from selfimprove_jax.runs import processes
from selfimprove_jax.runs.processes import Process, Task


def run_unit(unit: WorkUnit, folder: pathlib.Path, *, retries: int, grace_s: float) -> None:
  """Runs one unit within its Slurm allocation; submitit calls this on the allocation's first node.

  Exits with the unit's code if all attempts fail. If stopped, queues the job again.
  """
  import submitit

  argv, environment = _command(unit)
  process = Process(argv=argv, environment=environment, log=records.log_path(folder, unit))
  with records.lock(folder, [unit]):
    try:
      [end] = processes.run(
        [Task(name=unit.name, make=lambda slot: [process], retries=retries)],
        slots=["allocation"],
        grace_seconds=grace_s,
        on_end=lambda end: records.append(folder, unit, end),
      )
    except processes.Stopped:
      if not records.is_complete(folder, unit):
        # submitit would queue it again only after SIGUSR2, which kills a unit that does not handle
        # it; main.py saves on SIGTERM.
        subprocess.run(["scontrol", "requeue", submitit.JobEnvironment().job_id], check=True)
      raise
  if end.returncode:
    sys.exit(end.returncode)


def _command(unit: WorkUnit) -> tuple[list[str], dict[str, str]]:
  """Returns arguments and added environment of srun, which starts all processes of a unit."""
  srun = ["srun", "--kill-on-bad-exit=1"]  # a lost process would keep the others waiting forever
  if unit.resource.cpus:  # srun has not inherited this from sbatch since Slurm 22.05
    srun.append(f"--cpus-per-task={_cpus_per_task(unit.resource)}")
  return [*srun, *unit.argv], {**unit.environment, **local.cpu_environment(unit)}


def _tasks_per_host(resource: Resource) -> int:
  per_host = resource.processes // resource.hosts
  return per_host * resource.devices if resource.is_gpu else per_host


def _cpus_per_task(resource: Resource) -> int | None:
  return max(1, resource.cpus // _tasks_per_host(resource)) if resource.cpus else None


def parameters(
  name: str,
  resource: Resource,
  *,
  retries: int,
  grace_s: float,
  max_parallel: int | None,
  options: Sequence[str],
) -> dict[str, Any]:
  """Returns the parameters of `submitit.SlurmExecutor` for a sweep.

  Args:
    grace_s: seconds between SIGTERM and the time limit.
    max_parallel: most units at a time; None sets no limit.
    options: further options of sbatch, such as `partition=gpu`.
  """
  if retries < 0 or grace_s < 0:
    raise ValueError(f"--retries={retries} and --grace_s={grace_s} must be 0 or more")
  if resource.is_tpu:
    raise ValueError(f"{resource.kind} is not in Slurm clusters: use --backend=xmanager")
  more: dict[str, Any] = {
    "chdir": pathlib.Path.cwd(),
    "requeue": True,
    # B: only the batch process gets the signal; it forwards it through srun and waits.
    "signal": f"B:TERM@{math.ceil(grace_s)}",
  }
  for option in options:
    key, equals, value = option.partition("=")
    if not key.replace("-", "").isalnum() or not equals or any(map(str.isspace, value)):
      raise ValueError(f"--sbatch={option!r} is not NAME=VALUE, as in partition=gpu")
    more[key] = value
  return {
    "job_name": name,
    "array_parallelism": max_parallel or sys.maxsize,
    "nodes": resource.hosts,
    "ntasks_per_node": _tasks_per_host(resource),
    "gpus_per_node": _tasks_per_host(resource) if resource.is_gpu else None,
    "cpus_per_task": _cpus_per_task(resource),
    "mem": f"{resource.memory_gib}G" if resource.memory_gib else None,
    "time": math.ceil(resource.hours * 60) if resource.hours else None,
    "wckey": None,
    "stderr_to_stdout": True,
    "use_srun": False,  # else every process of a unit would retry by itself
    "additional_parameters": more,
  }


def describe(units: Sequence[WorkUnit], parameters: dict[str, Any]) -> str:
  """Formats submitit's parameters and the command of every unit."""
  given = dict(parameters)
  given |= given.pop("additional_parameters")
  lines = [f"# {name}={value}" for name, value in given.items() if value is not None]
  for unit in units:
    lines += [f"# {unit.number} {unit.name}", shell(*_command(unit))]
  return "\n".join(lines)


def submit(
  units: Sequence[WorkUnit],
  folder: pathlib.Path,
  parameters: dict[str, Any],
  *,
  retries: int,
  grace_s: float,
) -> list[str]:
  """Submits the units as one array and returns their job ids; does not wait for them.

  Every node must see `folder`, which holds the records, and the current folder.
  """
  try:
    import submitit
  except ImportError as error:
    raise ImportError(
      f"--backend=slurm needs the package: pip install 'selfimprove_jax[slurm]' ({error})"
    ) from error
  if not shutil.which("sbatch") or not shutil.which("srun"):
    raise ValueError("there is no sbatch here: run this on the cluster's login node")
  folder = folder.resolve()
  # exec, so that Python takes the place of the batch shell, to which Slurm sends the signal.
  python = f"exec {shlex.quote(sys.executable)}"
  executor = submitit.SlurmExecutor(folder / "submitit", python=python)
  executor.update_parameters(**parameters)
  jobs = [
    functools.partial(run_unit, unit, folder, retries=retries, grace_s=grace_s) for unit in units
  ]
  try:
    submitted = executor.submit_array(jobs)
  except submitit.core.utils.FailedJobError as error:
    raise ValueError(f"sbatch refused the job: {error}") from error
  return [job.job_id for job in submitted]
