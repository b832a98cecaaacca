"""One sbatch script for a sweep: a job array with one task for each unit.

On GPUs there is one process for each, which is what JAX expects when it finds itself under Slurm.
Two minutes before the time limit, or when the job is preempted, Slurm sends SIGTERM; the unit
saves, and the task is queued again and goes on.
"""

import json
import math
import pathlib
import shlex
import subprocess
from collections.abc import Sequence

from experiments.launcher import local, records
from experiments.launcher.experiment import WorkUnit

_BODY = """\
exec 9>{lock}
if ! flock --nonblock 9; then
  echo "unit $unit still runs elsewhere" >&2
  exit 1
fi
stopped=0
step=
outcome=stopped
code=143
terminate() {{
  stopped=1
  [ -z "$step" ] || kill -TERM "$step"
}}
trap terminate TERM
for ((attempt = 1; attempt <= {attempts} && stopped == 0; attempt++)); do
  began=$SECONDS
  srun --kill-on-bad-exit=1 "${{command[@]}}" >>"$log" 2>&1 9>&- &
  step=$!
  # A trapped signal ends `wait` before the step has ended.
  while wait "$step"; code=$?; kill -0 "$step" 2>/dev/null; do :; done
  step=
  outcome=failed
  [ "$stopped" = 0 ] || outcome=stopped
  [ "$code" != 0 ] || outcome=complete
  printf '{{"argv": %s, "outcome": "%s", "returncode": %d, "seconds": %d, "log": %s}}\\n' \\
    "$argv_json" "$outcome" "$code" "$((SECONDS - began))" "$log_json" >>"$record"
  [ "$outcome" = failed ] || break
done
if [ "$outcome" = stopped ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def script(
  name: str,
  units: Sequence[WorkUnit],
  folder: pathlib.Path,
  *,
  retries: int,
  grace_s: float,
  max_parallel: int | None,
  options: Sequence[str],
) -> str:
  """The sbatch script of a sweep.

  Args:
    folder: of the records; every node must see it, and the folder this is run in.
    retries: how often a failing unit is started again in its task.
    grace_s: seconds between SIGTERM and the end.
    max_parallel: most tasks of the array at a time; None sets no limit.
    options: further ones of sbatch, `partition=gpu`.

  Raises:
    ValueError: the units want TPUs, an option is not NAME=VALUE, or a number is out of range.
  """
  if retries < 0 or grace_s < 0:
    raise ValueError(f"--retries={retries} and --grace_s={grace_s} must be 0 or more")
  resource = units[0].resource
  if resource.is_tpu:
    raise ValueError(f"{resource.kind} is not in Slurm clusters: use --backend=xmanager")
  folder = folder.resolve()
  per_host = resource.processes // resource.hosts
  tasks = per_host * resource.devices if resource.is_gpu else per_host
  numbers = ",".join(str(unit.number) for unit in units)
  header = {
    "job-name": name,
    "array": numbers + (f"%{max_parallel}" if max_parallel else ""),
    "chdir": pathlib.Path.cwd(),
    "output": folder / "slurm-%A_%a.log",
    "open-mode": "append",
    "signal": f"B:TERM@{math.ceil(grace_s)}",
    "nodes": resource.hosts,
    "ntasks-per-node": tasks,
  }
  if resource.is_gpu:
    header["gpus-per-node"] = tasks
  if resource.cpus:
    header["cpus-per-task"] = max(1, resource.cpus // tasks)
  if resource.memory_gib:
    header["mem"] = f"{resource.memory_gib}G"
  if resource.hours:
    header["time"] = math.ceil(resource.hours * 60)
  for option in options:
    key, equals, value = option.partition("=")
    if not key.replace("-", "").isalnum() or not equals or any(map(str.isspace, value)):
      raise ValueError(f"--sbatch={option!r} is not NAME=VALUE, as in partition=gpu")
    header[key] = value
  lines = ["#!/bin/bash", *(f"#SBATCH --{key}={value}" for key, value in header.items())]
  lines += ["#SBATCH --requeue", "", "export PYTHONUNBUFFERED=1", 'case "$SLURM_ARRAY_TASK_ID" in']
  for unit in units:
    lines += _case(unit, folder)
  lines += ['*) echo "there is no unit $SLURM_ARRAY_TASK_ID" >&2; exit 1 ;;', "esac"]
  lock = f'{shlex.quote(str(folder))}/"$unit".lock'
  return "\n".join(lines) + "\n" + _BODY.format(lock=lock, attempts=retries + 1)


def _case(unit, folder):
  log = records.log_path(folder, unit)
  environment = dict(unit.environment)
  if unit.resource.kind == "cpu":
    environment |= local.cpu_environment(unit)
  return [
    f"{unit.number})",
    f"  unit={unit.name}",
    f"  command=({shlex.join(unit.argv)})",
    f"  argv_json={shlex.quote(json.dumps(unit.argv))}",
    f"  log={shlex.quote(str(log))}",
    f"  log_json={shlex.quote(json.dumps(log.name))}",
    f"  record={shlex.quote(str(records.record_path(folder, unit)))}",
    *(f"  export {key}={shlex.quote(value)}" for key, value in environment.items()),
    "  ;;",
  ]


def submit(text: str, folder: pathlib.Path) -> str:
  """Hands the script, which is kept in `folder`, to sbatch; gives what that printed.

  Raises:
    ValueError: there is no sbatch here, or it refused the script.
  """
  path = folder / "sweep.sbatch"
  path.write_text(text)
  try:
    process = subprocess.run(["sbatch", str(path)], capture_output=True, text=True)
  except FileNotFoundError:
    raise ValueError(
      f"there is no sbatch here: run this on the cluster's login node, or hand it {path} there"
    ) from None
  if process.returncode:
    raise ValueError(f"sbatch refused {path}: {process.stderr.strip()}")
  return process.stdout.strip()
