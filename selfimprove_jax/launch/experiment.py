"""Turns an experiment (a config, a sweep and a resource) into work units."""

import dataclasses
import functools
import itertools
import pathlib
import re
import runpy
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from selfimprove_jax.launch.resource import Resource, count, cpu

Override = bool | int | float | str | tuple | list | None
_MAIN = ("-m", "selfimprove_jax.main")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """Sweeps arms and seeds over one config; `get_experiment()` of a launch file returns it.

  Attributes:
    name: folder of its runs under `--root`.
    config: config file with its variant, as for `main.py`: `configs/sbp_quick.py:smoke`.
    arms: name of an arm -> its changes to the config, by dotted key.
    seeds: every arm runs once with each.
    seed_keys: config keys that the seed is written to.
    arguments: further flags of every unit, such as `--stages=documents`.
    command: runs in place of `python -m selfimprove_jax.main`, with the same flags.
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
  """Describes one run of the sweep.

  Attributes:
    number: position in the sweep, from 1.
    name: `ARM-seedN`; its folder under the experiment's.
  """

  number: int
  name: str
  arm: str
  argv: tuple[str, ...]
  environment: Mapping[str, str]
  resource: Resource


def load_experiment(path: str | pathlib.Path) -> Experiment:
  """Calls `get_experiment()` of a Python file.

  Raises:
    ValueError: there is no such file, or it returns no `Experiment`.
  """
  if not pathlib.Path(path).is_file():
    raise ValueError(f"--experiment={path}: there is no such file")
  names = runpy.run_path(str(path))
  if "get_experiment" not in names:
    raise ValueError(f"--experiment={path} defines no get_experiment()")
  experiment = names["get_experiment"]()
  if not isinstance(experiment, Experiment):
    raise ValueError(f"get_experiment() of {path} returned {experiment!r}, not an Experiment")
  return experiment


def work_units(experiment: Experiment, *, root: str, python: str) -> list[WorkUnit]:
  """Returns every arm with every seed, each in `ROOT/<experiment>/<unit>`; reads no config.

  Args:
    root: folder of all experiments, or an object store's address.
    python: interpreter of the units, unless the experiment has its own command.

  Raises:
    ValueError: the sweep is empty, two units share a name, or a name cannot be a folder's.
  """
  if not experiment.arms or not experiment.seeds:
    raise ValueError(
      f"the sweep of experiment {experiment.name!r} is empty: it has {len(experiment.arms)} arms "
      f"and {len(experiment.seeds)} seeds"
    )
  command = (python, *_MAIN) if experiment.command is None else experiment.command
  units: dict[str, WorkUnit] = {}
  for arm, seed in itertools.product(experiment.arms, experiment.seeds):
    name = f"{arm}-seed{seed}"
    for part in (experiment.name, name):
      if not _NAME.fullmatch(part):
        raise ValueError(f"{part!r} cannot be a folder's name: use letters, digits and _ . -")
    if name in units:
      raise ValueError(f"two work units are named {name!r}: seeds are {list(experiment.seeds)}")
    units[name] = WorkUnit(
      number=len(units) + 1,
      name=name,
      arm=arm,
      argv=(
        *command,
        f"--config={experiment.config}",
        *_override_flags(_overrides(experiment, arm, seed)),
        f"--workdir={root.rstrip('/')}/{experiment.name}/{name}",
        *experiment.arguments,
      ),
      environment=dict(experiment.environment),
      resource=experiment.resource,
    )
  return list(units.values())


def _overrides(experiment: Experiment, arm: str, seed: int) -> dict[str, Override]:
  return {**experiment.arms[arm], **dict.fromkeys(experiment.seed_keys, seed)}


def _override_flags(overrides: Mapping[str, Override]) -> list[str]:
  """Returns `--config.KEY=VALUE` flags as `main.py` reads them."""
  return [
    f"--config.{key}={value if isinstance(value, str) else repr(value)}"
    for key, value in overrides.items()
  ]


def check_overrides(
  experiment: Experiment, validate: Callable[[dict[str, Any], list[str]], None]
) -> None:
  """Loads the config with each arm's overrides by the flag parser that `main.py` uses.

  Args:
    validate: gets a config with overrides and their keys; raises ValueError if it is invalid.

  Raises:
    ValueError: there is no such config or variant; or an arm, which the message names, overrides a
      missing key, gives a value of another type, or makes the config invalid.
  """
  _load_config(experiment.config, {}, "cannot read the config")
  for arm, changes in experiment.arms.items():
    if both := sorted(set(changes) & set(experiment.seed_keys)):
      raise ValueError(f"arm {arm!r} sets {both[0]!r}, to which the seeds are written")
    overrides = _overrides(experiment, arm, experiment.seeds[0])
    for key, value in overrides.items():
      fault = f"arm {arm!r}: override {key}={value!r} does not fit"
      values = _load_config(experiment.config, {key: value}, fault)
      found = functools.reduce(lambda node, name: node[name], key.split("."), values)
      # The flag parser casts: 7 for a string becomes "7", and 2.5 for an integer 2.
      if isinstance(found, str) != isinstance(value, str) or found != value:
        raise ValueError(f"{fault} {experiment.config}: it is read as {found!r}")
    values = _load_config(experiment.config, overrides, f"arm {arm!r} does not fit")
    try:
      validate(values, list(overrides))
    except ValueError as error:
      raise ValueError(f"arm {arm!r} does not fit {experiment.config}: {error}") from None


def _load_config(config: str, overrides: Mapping[str, Override], message: str) -> dict[str, Any]:
  arguments = ["launch", f"--config={config}", *_override_flags(overrides)]
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
    while isinstance(fault, Exception) and fault.args:  # ml_collections nests errors as arguments
      fault = fault.args[0]
    lines = str(fault).strip().splitlines()  # a whole traceback may be the message: use its end
    raise ValueError(f"{message} {config}: {lines[-1] if lines else fault!r}") from error


def shell(argv: Sequence[str], environment: Mapping[str, str]) -> str:
  """Formats a command that can be pasted into a shell, with the variables that it adds."""
  variables = [f"{name}={value}" for name, value in environment.items()]
  return shlex.join([*(["env", *variables] if variables else []), *argv])


def describe(experiment: Experiment, units: Sequence[WorkUnit]) -> str:
  """Formats the head of the plan: the sweep, the resource of one unit, and totals."""
  resource = experiment.resource
  devices = len(units) * resource.total_devices
  total = f"{count(len(units), 'work unit')}, {devices} devices in all"
  if resource.hours:
    total += f", at most {devices * resource.hours:g} device-hours"
  return (
    f"experiment {experiment.name}: {experiment.config}, {count(len(experiment.arms), 'arm')} x "
    f"{count(len(experiment.seeds), 'seed')}\neach on {resource.describe()}\n{total}"
  )
