"""The plan: the command of every unit of a sweep, and what is refused before anything starts."""

import os
import shlex
import subprocess
import sys

import pytest

from selfimprove_jax.launch import experiment as experiment_lib
from selfimprove_jax.launch import local, resource
from selfimprove_jax.launch.experiment import Experiment

_EXAMPLE = "experiments/sbp_share/sweep.py"


def test_the_example_sweeps_three_arms_over_two_seeds_with_these_commands():
  experiment = experiment_lib.load_experiment(_EXAMPLE)
  experiment_lib.check_overrides(experiment, lambda *_: None)
  units = experiment_lib.work_units(experiment, root="runs", python="python")
  assert [unit.number for unit in units] == [1, 2, 3, 4, 5, 6]
  assert [unit.name for unit in units] == [
    f"synthetic{share}-seed{seed}" for share in (125, 250, 375) for seed in (0, 1)
  ]
  assert units[3].argv == (
    *("python", "-m", "selfimprove_jax.main", "--config=configs/sbp_quick.py"),
    *("--config.arms.sbp.mixture.sbp=0.25", "--config.arms.sbp.mixture.unique=0.75"),
    "--config.arms.unconditional.mixture.unconditional=0.25",
    "--config.arms.unconditional.mixture.unique=0.75",
    *("--config.seed=1", "--workdir=runs/sbp_share/synthetic250-seed1"),
  )


def test_dry_run_prints_commands_that_a_shell_runs_and_writes_nothing(
  launch, launch_file, run_folder, tmp_path, page
):
  path = launch_file(
    "import os, sys; print(os.environ['A_NAME'], sys.argv[1:])",
    arms={"a": {"title": "it's $HOME"}},
    seeds=(3,),
    environment={"A_NAME": "two words"},
  )
  process = launch(path, "--dry_run")
  assert process.returncode == 0, process.stderr
  assert "1 work unit, 1 devices in all" in process.stdout
  assert not (tmp_path / "runs").exists()
  line = process.stdout.splitlines()[-1]
  ran = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
  flags = [f"--config={page}", "--config.title=it's $HOME", "--config.seed=3"]
  assert ran.stdout.strip() == f"two words {[*flags, f'--workdir={run_folder}/a-seed3']}"


def test_each_process_has_its_number_its_devices_and_one_coordinator(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_given=1")
  experiment = Experiment(
    name="x", config="c.py", arms={"a": {}}, resource=resource.cpu(devices=4, processes=2)
  )
  [unit] = experiment_lib.work_units(experiment, root="runs", python="python")
  first, second = local.commands(unit, ())
  assert first[0][: len(unit.argv)] == second[0][: len(unit.argv)] == list(unit.argv)
  (address, *counts), (same_address, *other_counts) = (
    argv[len(unit.argv) :] for argv, _ in (first, second)
  )
  assert address == same_address
  assert address.startswith("--coordinator=127.0.0.1:")
  assert counts == ["--num_processes=2", "--process_id=0"]
  assert other_counts == ["--num_processes=2", "--process_id=1"]
  for _, environment in (first, second):
    assert environment == {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_given=1 --xla_force_host_platform_device_count=4",
    }


def test_gpus_are_dealt_to_units_in_groups_and_none_is_given_twice(monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
  pair = resource.gpu("h100", devices=2)
  groups = local.device_groups(pair, devices=None, max_parallel=None)
  assert groups == [("0", "1"), ("2", "3")]
  assert local.device_groups(pair, devices=["7", "5"], max_parallel=3) == [("7", "5")]
  experiment = Experiment(name="x", config="c.py", arms={"a": {}}, resource=pair)
  [unit] = experiment_lib.work_units(experiment, root="runs", python="python")
  [(_, environment)] = local.commands(unit, groups[1])
  assert environment == {"CUDA_VISIBLE_DEVICES": "2,3"}
  with pytest.raises(ValueError, match="takes 8 GPUs, and this machine offers 5"):
    local.device_groups(resource.gpu("h100", devices=8), devices=None, max_parallel=None)


@pytest.mark.parametrize(
  ("name", "hosts", "devices"),
  [
    ("v5p:8x8x8", 128, 4),
    ("v5p:2x2x1", 1, 4),
    ("v4:4x4x8", 32, 4),
    ("v6e:16x16", 64, 4),
    ("v6e:2x4", 1, 8),
    ("v5e:1x1", 1, 1),
  ],
)
def test_a_tpu_slice_gives_its_hosts_and_the_chips_of_each(name, hosts, devices):
  made = resource.tpu(name)
  assert (made.hosts, made.processes, made.devices) == (hosts, hosts, devices)


@pytest.mark.parametrize(
  "name",
  ["v5p:8x8", "v5p:8x4x4", "v5p:3x4x4", "v5p:16x16x32", "v6e:4x2", "v6e:4x4x4", "v9:2x2", "8x8"],
)
def test_an_unknown_topology_is_refused_with_the_known_ones(name):
  with pytest.raises(ValueError, match=r"is unknown.*(2x2|v5p)"):
    resource.tpu(name)


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"arms": {}}, "the sweep of experiment 'sweep' is empty: it has 0 arms and 2 seeds"),
    ({"seeds": ()}, "is empty"),
    ({"seeds": (1, 1)}, "two work units are named 'a-seed1'"),
    ({"arms": {"a/b": {}}}, "'a/b-seed0' cannot be a folder's name"),
    ({"arms": {"a": {"sed": 1}}}, "arm 'a': override sed=1 does not fit"),
    ({"arms": {"a": {"total_tokens": 2.5}}}, "override total_tokens=2.5 does not fit"),
    ({"arms": {"a": {"title": 7}}}, "override title=7 does not fit"),
    ({"arms": {"a": {"seed": 7}}}, "arm 'a' sets 'seed', to which the seeds are written"),
    ({"config": "configs/none.py"}, "configs/none.py"),
    ({"config": "{page}:none"}, "variant 'none' is unknown"),
    ({"resource": "tpu('v5p:9x9x9')"}, "topology '9x9x9' of 'v5p:9x9x9' is unknown"),
    (
      {"resource": "cpu(hosts=2, processes=2)"},
      "a unit takes 2 hosts, and --backend=local has one",
    ),
    ({"resource": "cpu(devices=0)"}, "devices=0 of a resource must be an integer of at least 1"),
  ],
)
def test_a_faulty_launch_file_is_refused_in_a_line_before_anything_runs(
  changes, told, launch, launch_file, tmp_path
):
  if "config" in changes:
    changes = {"config": changes["config"].format(page=tmp_path / "page.py")}
  process = launch(launch_file("raise SystemExit", **changes))
  assert process.returncode == 1
  assert told in process.stderr
  assert "Traceback" not in process.stderr
  assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    (["--backend=borg"], "local|slurm|xmanager"),
    (["--only=a-seed0,nobody"], "--only=nobody: there are ['a-seed0'"),
    (["--experiment=none.py"], "none.py: there is no such file"),
    (["--max_parallel=0"], "--max_parallel=0 must be 1 or more"),
    (["--root=gs://bucket/runs"], "needs a folder of a file system"),
    (["--root=/proc/none"], "--root=/proc/none: cannot write in"),
    (["--retries=-1"], "--retries=-1 must be 0 or more"),
  ],
)
def test_faulty_flags_are_refused_in_a_line(arguments, told, launch, launch_file):
  process = launch(launch_file("raise SystemExit"), *arguments)
  assert process.returncode == 1
  assert told in process.stdout + process.stderr
  assert "Traceback" not in process.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_root_without_permission_to_write_is_refused(launch, launch_file, tmp_path):
  (tmp_path / "runs").mkdir(mode=0o500)
  process = launch(launch_file("raise SystemExit"))
  assert process.returncode == 1
  assert "cannot write in" in process.stderr


def test_an_arm_whose_whole_config_is_refused_is_named(page):
  def validate(values, overrides):
    if values["total_tokens"] > 100:
      raise ValueError(f"total_tokens={values['total_tokens']}: at most 100 ({overrides})")

  arms = {"good": {"total_tokens": 100}, "bad": {"total_tokens": 101}}
  experiment = Experiment(name="x", config=page, arms=arms)
  message = (
    r"arm 'bad' does not fit .*: total_tokens=101: at most 100 \(\['total_tokens', 'seed'\]\)"
  )
  with pytest.raises(ValueError, match=message):
    experiment_lib.check_overrides(experiment, validate)


@pytest.mark.slow
def test_a_value_that_the_pipeline_refuses_is_refused_before_anything_runs(launch, launch_file):
  arms = {"a": {"training.batch_rows": 0}}
  path = launch_file("", command=None, config="configs/sbp_quick.py:smoke", arms=arms)
  process = launch(path, "--dry_run")
  assert process.returncode == 1
  assert "arm 'a' does not fit configs/sbp_quick.py:smoke: training.batch_rows=0" in process.stderr
  assert "Traceback" not in process.stderr


def test_python_of_the_units_can_be_another_than_the_launchers():
  experiment = experiment_lib.load_experiment(_EXAMPLE)
  [unit, *_] = experiment_lib.work_units(experiment, root="runs", python="/else/python")
  assert unit.argv[:3] == ("/else/python", "-m", "selfimprove_jax.main")
  assert shlex.split(experiment_lib.shell(unit.argv, {})) == list(unit.argv)
  assert sys.executable not in unit.argv
