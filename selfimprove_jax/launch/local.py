"""Runs work units as processes of this machine, several at a time, with retries.

SIGINT or SIGTERM to the launcher sends SIGTERM to the units, which save and exit; the same command
then skips complete units and continues with the others.

submitit's LocalExecutor gives no groups of devices that no two units share, no killing of whole
process groups, no retries in the same folder, and no locks that outlive a killed launcher.
"""

import functools
import os
import pathlib
import socket
from collections.abc import Sequence

from selfimprove_jax.launch import records
from selfimprove_jax.launch.experiment import WorkUnit, shell
from selfimprove_jax.launch.resource import Resource
from selfimprove_jax.runs import processes
from selfimprove_jax.runs.processes import Process, Task


def device_groups(
  resource: Resource, *, devices: Sequence[str] | None, max_parallel: int | None
) -> list[tuple[str, ...]]:
  """Returns a group of device ids for each unit that may run at a time; empty groups on CPUs.

  Args:
    devices: ids of the GPUs to use, as nvidia-smi prints them; None uses those in
      CUDA_VISIBLE_DEVICES, or all.
    max_parallel: most units at a time; None is 1 on CPU and TPU, and all that fit on GPUs.
  """
  if resource.hosts > 1:
    raise ValueError(
      f"a unit takes {resource.hosts} hosts, and --backend=local has one: use slurm or xmanager"
    )
  if max_parallel is not None and max_parallel < 1:
    raise ValueError(f"--max_parallel={max_parallel} must be 1 or more")
  if not resource.is_gpu:
    if resource.is_tpu and (max_parallel or 1) > 1:
      raise ValueError("--max_parallel must be 1 on a TPU: one process holds all chips of a host")
    return [()] * (max_parallel or 1)
  found = _gpus() if devices is None else list(devices)
  need = resource.total_devices
  if need > len(found):
    raise ValueError(f"a unit takes {need} GPUs, and this machine offers {len(found)}: {found}")
  groups = [tuple(found[i : i + need]) for i in range(0, len(found) - need + 1, need)]
  return groups[:max_parallel]


def _gpus() -> list[str]:
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  if visible is not None:
    return [name for name in visible.split(",") if name]
  names = (path.name.removeprefix("nvidia") for path in pathlib.Path("/dev").glob("nvidia*"))
  return sorted((name for name in names if name.isdecimal()), key=int)


def commands(unit: WorkUnit, group: Sequence[str]) -> list[tuple[list[str], dict[str, str]]]:
  """Returns arguments and added environment of each process of a unit on one group of devices."""
  resource, made = unit.resource, []
  with socket.socket() as server:  # finds a free port
    server.bind(("127.0.0.1", 0))
    port = server.getsockname()[1]
  shared = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={resource.processes}"]
  for process in range(resource.processes):
    flags = [*shared, f"--process_id={process}"] if resource.processes > 1 else []
    environment = {**unit.environment, **cpu_environment(unit)}
    if resource.is_gpu:
      own = group[process * resource.devices :][: resource.devices]
      environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    made.append(([*unit.argv, *flags], environment))
  return made


def cpu_environment(unit: WorkUnit) -> dict[str, str]:
  """Returns variables that make JAX see the unit's number of CPU devices; none on accelerators."""
  if unit.resource.kind != "cpu":
    return {}
  environment = {"JAX_PLATFORMS": "cpu"}
  if unit.resource.devices > 1:
    given = unit.environment.get("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    flag = f"--xla_force_host_platform_device_count={unit.resource.devices}"
    environment["XLA_FLAGS"] = f"{given} {flag}".strip()
  return environment


def describe(units: Sequence[WorkUnit], groups: Sequence[Sequence[str]]) -> str:
  """Formats the shell commands of every unit, on the first group of devices."""
  lines = []
  for unit in units:
    lines.append(f"# {unit.number} {unit.name}")
    made = [shell(argv, environment) for argv, environment in commands(unit, groups[0])]
    lines += made if len(made) == 1 else [*(f"{line} &" for line in made), "wait"]
  return "\n".join(lines)


def run(
  units: Sequence[WorkUnit],
  folder: pathlib.Path,
  *,
  groups: Sequence[tuple[str, ...]],
  retries: int,
  grace_s: float,
) -> bool:
  """Runs every unit that is not complete; returns whether all are complete at the end.

  Args:
    folder: holds the records; see `records.make_folder`.
    groups: device ids; one unit runs on each group at a time.
    retries: how often a failing unit is repeated, with the same command and folder.

  Raises:
    processes.Stopped: SIGINT or SIGTERM came, and the units have ended.
  """
  if retries < 0:
    raise ValueError(f"--retries={retries} must be 0 or more")
  todo = {unit.name: unit for unit in units if not records.is_complete(folder, unit)}
  for unit in units:
    if unit.name not in todo:
      print(f"{unit.name}: complete already", flush=True)

  def attempt(unit: WorkUnit, group: Sequence[str]) -> list[Process]:
    made = []
    for index, (argv, environment) in enumerate(commands(unit, group)):
      log = records.log_path(folder, unit, index)
      with log.open("a") as file:
        file.write(f"+ {shell(argv, environment)}\n")
      made.append(Process(argv=argv, environment=environment, log=log))
    return made

  def print_start(task: Task, number: int) -> None:
    print(f"{task.name}: attempt {number} of {retries + 1}", flush=True)

  with records.lock(folder, todo.values()) as locks:
    processes.run(
      [
        Task(
          name=name,
          make=functools.partial(attempt, unit),
          retries=retries,
          pass_fds=(locks[name],),  # the lock lasts until the unit's last process has ended
        )
        for name, unit in todo.items()
      ],
      slots=groups,
      grace_seconds=grace_s,
      on_start=print_start,
      on_end=lambda end: records.append(folder, todo[end.task], end),
    )
  return all(records.is_complete(folder, unit) for unit in units)
