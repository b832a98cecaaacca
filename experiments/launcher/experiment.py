"""An experiment is a config, a sweep and a resource; it is turned into work units."""

import dataclasses
import functools
import importlib.util
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from experiments.launcher.resource import Resource, count, cpu

Override = bool | int | float | str | tuple | list | None
_MAIN = ("-m", "selfimprove_jax.main")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What `get_experiment()` of a launch file gives.

  Attributes:
    name: folder of its runs under `--root`.
    config: config file with its variant, as for `main.py`: `configs/sbp_quick.py:smoke`.
    arms: name of an arm -> what it changes in the config, by dotted key.
    seeds: every arm runs once with each.
    seed_keys: config keys that a seed is written to.
    resource: what one unit runs on.
    arguments: further flags of every unit, such as `--stages=documents`.
    environment: variables set for every unit.
    command: what is run instead of `python -m selfimprove_jax.main`, with the same flags.
  """

  name: str
  config: str
  arms: Mapping[str, Mapping[str, Override]]
  seeds: Sequence[int] = (0,)
  seed_keys: Sequence[str] = ("seed",)
  resource: Resource = dataclasses.field(default_factory=cpu)
  arguments: Sequence[str] = ()
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
  command: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkUnit:
  """One run of the sweep.

  Attributes:
    number: from 1, in the order of the sweep.
    name: `ARM-seedN`; its folder under the experiment's.
    command: what is run, without flags.
    flags: config, overrides, folder and further flags.
  """

  number: int
  name: str
  arm: str
  command: tuple[str, ...]
  flags: tuple[str, ...]
  environment: Mapping[str, str]
  resource: Resource

  @property
  def argv(self) -> list[str]:
    return [*self.command, *self.flags]

  def process_argv(self, process: int, coordinator: str) -> list[str]:
    """Of one of the unit's processes, which find each other at `coordinator` (HOST:PORT)."""
    if self.resource.processes == 1:
      return self.argv
    return [
      *self.argv,
      f"--coordinator={coordinator}",
      f"--num_processes={self.resource.processes}",
      f"--process_id={process}",
    ]


def load_experiment(path: str | pathlib.Path) -> Experiment:
  """What `get_experiment()` of a Python file gives.

  Raises:
    ValueError: there is no such file, or it gives no `Experiment`.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise ValueError(f"--experiment={path}: there is no such file")
  spec = importlib.util.spec_from_file_location(f"launch_file_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"--experiment={path} is not a Python file")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_experiment"):
    raise ValueError(f"--experiment={path} defines no get_experiment()")
  experiment = module.get_experiment()
  if not isinstance(experiment, Experiment):
    raise ValueError(f"get_experiment() of {path} gave {experiment!r}, which is no Experiment")
  return experiment


def work_units(experiment: Experiment, *, root: str, python: str) -> list[WorkUnit]:
  """Every arm with every seed, each in `ROOT/<experiment>/<unit>`; configs are not looked at.

  Args:
    root: folder of all experiments; an object store's address for backends that run elsewhere.
    python: interpreter of the units, where the experiment names no other command.

  Raises:
    ValueError: the sweep is empty, two units share a name, or a name cannot be a folder's.
  """
  if not experiment.arms or not experiment.seeds:
    raise ValueError(
      f"the sweep of experiment {experiment.name!r} is empty: it has {len(experiment.arms)} arms "
      f"and {len(experiment.seeds)} seeds"
    )
  command = tuple((python, *_MAIN) if experiment.command is None else experiment.command)
  units: dict[str, WorkUnit] = {}
  for arm, changes in experiment.arms.items():
    for seed in experiment.seeds:
      name = f"{arm}-seed{seed}"
      for part in (experiment.name, name):
        if not _NAME.fullmatch(part):
          raise ValueError(f"{part!r} cannot be a folder's name: letters, digits and _ . - can")
      if name in units:
        raise ValueError(f"two work units are named {name!r}: seeds are {list(experiment.seeds)}")
      overrides = {**changes, **dict.fromkeys(experiment.seed_keys, seed)}
      units[name] = WorkUnit(
        number=len(units) + 1,
        name=name,
        arm=arm,
        command=command,
        flags=(
          f"--config={experiment.config}",
          *override_flags(overrides),
          f"--workdir={root.rstrip('/')}/{experiment.name}/{name}",
          *experiment.arguments,
        ),
        environment=dict(experiment.environment),
        resource=experiment.resource,
      )
  return list(units.values())


def override_flags(overrides: Mapping[str, Override]) -> list[str]:
  """`--config.KEY=VALUE` of each, as `main.py` reads it."""

  def text(value):
    return value if isinstance(value, str) else repr(value)

  return [f"--config.{key}={text(value)}" for key, value in overrides.items()]


def check_overrides(experiment: Experiment) -> None:
  """Loads the config as each arm changes it, with the reader of flags that `main.py` uses.

  Raises:
    ValueError: there is no such config or variant; or an override, which is named with its arm,
      has a key that the config lacks or a value of another type than the config's.
  """
  _load_config(experiment.config, {}, "the config cannot be read")
  for arm, changes in experiment.arms.items():
    for key in experiment.seed_keys:
      if key in changes:
        raise ValueError(f"arm {arm!r} sets {key!r}, to which the seeds are written")
    seeded = {**changes, **dict.fromkeys(experiment.seed_keys, experiment.seeds[0])}
    for key, value in seeded.items():
      told = f"arm {arm!r}: override {key}={value!r} does not fit"
      config = _load_config(experiment.config, {key: value}, told)
      found = functools.reduce(lambda node, name: node[name], key.split("."), config)
      if isinstance(found, str) != isinstance(value, str) or found != value:
        raise ValueError(f"{told} {experiment.config}: it is read as {found!r}")


def _load_config(config: str, overrides: Mapping[str, Override], told: str) -> Any:
  arguments = ["launch", f"--config={config}", *override_flags(overrides)]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(
    "config", None, "", flag_values=values, lock_config=True, sys_argv=arguments
  )
  try:
    values(arguments)
    if values["config"].value is None:
      raise ValueError("the config is missing")
    return values["config"].value.to_dict()
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    fault: object = error
    while isinstance(fault, Exception) and fault.args:  # the config library wraps one in another
      fault = fault.args[0]
    raise ValueError(f"{told} {config}: {fault}") from error


def shell(argv: Sequence[str], environment: Mapping[str, str]) -> str:
  """A command that can be pasted into a shell, with what it adds to the environment."""
  variables = [f"{name}={value}" for name, value in environment.items()]
  return shlex.join([*(["env", *variables] if variables else []), *argv])


def describe(experiment: Experiment, units: Sequence[WorkUnit]) -> str:
  """The plan's head: what is swept, what one unit runs on, and totals."""
  resource = experiment.resource
  total = f"{count(len(units), 'work unit')}, {len(units) * resource.total_devices} devices in all"
  if resource.hours:
    total += f", at most {len(units) * resource.total_devices * resource.hours:g} device-hours"
  return (
    f"experiment {experiment.name}: {experiment.config}, {count(len(experiment.arms), 'arm')} x "
    f"{count(len(experiment.seeds), 'seed')}\neach on {resource.describe()}\n{total}"
  )
