"""The Slurm backend, against stand-ins of its programs on PATH that behave as it does."""

import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import pytest

from experiments.launcher import experiment as experiment_lib
from experiments.launcher import resource, slurm
from experiments.launcher.experiment import Experiment

_FAIL_ONCE = (
  "import pathlib, sys\n"
  "flags = dict(flag.split('=', 1) for flag in sys.argv[1:])\n"
  "folder = pathlib.Path(flags['--workdir'])\n"
  "folder.mkdir(parents=True, exist_ok=True)\n"
  "tries = len(list(folder.glob('try*')))\n"
  "(folder / f'try{tries}').touch()\n"
  "sys.exit(5 if tries == 0 else 0)\n"
)


@pytest.fixture
def slurm_path(tmp_path):
  """PATH with an sbatch that checks the script, an srun that keeps its arguments, and scontrol."""
  folder = tmp_path / "bin"
  folder.mkdir()
  programs = {
    "sbatch": f'bash -n "$1" && cp "$1" {tmp_path}/submitted && echo Submitted batch job 41',
    "srun": f'printf "%s\\n" "$@" >{tmp_path}/srun_arguments\nshift\nexec "$@"',
    "scontrol": f'echo "$@" >{tmp_path}/scontrol_arguments',
  }
  for name, body in programs.items():
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(stat.S_IRWXU)
  return f"{folder}:{os.environ['PATH']}"


def _environment(path, task):
  job = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "41"}
  return os.environ | job | {"PATH": path}


def _options(text):
  lines = (line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line)
  return dict(line.partition("=")[::2] for line in lines)


def test_a_sweep_is_one_array_whose_tasks_run_exactly_the_units(
  launch, launch_file, slurm_path, tmp_path, run_folder
):
  path = launch_file(
    _FAIL_ONCE, arms={"a": {"title": "it's $HOME"}, "b": {}}, environment={"A_NAME": "$1 'x'"}
  )
  flags = ("--backend=slurm", "--sbatch=partition=gpu", "--max_parallel=2", "--grace_s=90")
  process = launch(path, *flags, env={"PATH": slurm_path})
  assert process.returncode == 0, process.stderr
  assert "Submitted batch job 41" in process.stdout
  script = tmp_path / "submitted"
  options = _options(script.read_text())
  assert options["array"] == "1,2,3,4%2"
  assert options["signal"] == "B:TERM@90"
  assert options["partition"] == "gpu"
  assert "requeue" in options
  ran = subprocess.run(["bash", script], env=_environment(slurm_path, 2), timeout=60)
  assert ran.returncode == 0
  assert (tmp_path / "srun_arguments").read_text().splitlines() == [
    *("--kill-on-bad-exit=1", sys.executable, str(tmp_path / "unit.py")),
    *("--config=configs/sbp_quick.py:smoke", "--config.title=it's $HOME", "--config.seed=1"),
    f"--workdir={run_folder}/a-seed1",
  ]
  records = (run_folder / "launch" / "a-seed1.jsonl").read_text().splitlines()
  assert [json.loads(line)["outcome"] for line in records] == ["failed", "complete"]
  process = launch(path, *flags, env={"PATH": slurm_path})
  assert _options(script.read_text())["array"] == "1,3,4%2"


def test_told_to_end_a_task_lets_its_unit_save_and_is_queued_again(
  launch, launch_file, slurm_path, tmp_path, run_folder
):
  path = launch_file(
    "import pathlib, signal, sys, time\n"
    "folder = pathlib.Path(sys.argv[-1].partition('=')[2])\n"
    "folder.mkdir(parents=True)\n"
    "def save(*_):\n"
    "  time.sleep(0.3)\n"
    "  (folder / 'saved').touch()\n"
    "  sys.exit(143)\n"
    "signal.signal(signal.SIGTERM, save)\n"
    "(folder / 'ready').touch()\n"
    "time.sleep(60)\n"
  )
  launch(path, "--backend=slurm", env={"PATH": slurm_path})
  unit = run_folder / "a-seed0"
  with subprocess.Popen(
    ["bash", tmp_path / "submitted"], env=_environment(slurm_path, 1)
  ) as process:
    deadline = time.monotonic() + 30
    while not (unit / "ready").exists():
      assert time.monotonic() < deadline
      time.sleep(0.02)
    again = subprocess.run(
      ["bash", tmp_path / "submitted"],
      env=_environment(slurm_path, 1),
      capture_output=True,
      text=True,
    )
    assert again.returncode == 1
    assert "unit a-seed0 still runs elsewhere" in again.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
  assert (unit / "saved").exists()
  assert (tmp_path / "scontrol_arguments").read_text() == "requeue 41_1\n"
  [record] = (run_folder / "launch" / "a-seed0.jsonl").read_text().splitlines()
  assert json.loads(record)["outcome"] == "stopped"


def _script(made, **changes):
  experiment = Experiment(name="x", config="c.py", arms={"a": {}}, resource=made)
  units = experiment_lib.work_units(experiment, root="runs", python="python")
  options = dict(retries=1, grace_s=120.0, max_parallel=None, options=[]) | changes
  return slurm.script("x", units, pathlib.Path("runs/x/launch"), **options)


def test_on_gpus_there_is_a_process_for_each_on_every_node():
  made = resource.gpu("h100", devices=8, hosts=4, cpus=96, memory_gib=900, hours=36.5)
  options = _options(_script(made))
  asked = {"nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "12"}
  assert asked.items() <= options.items()
  assert options["mem"] == "900G"
  assert options["time"] == str(36 * 60 + 30)


def test_what_slurm_cannot_serve_is_refused(launch, launch_file, tmp_path):
  with pytest.raises(ValueError, match="v5p is not in Slurm clusters"):
    _script(resource.tpu("v5p:4x4x4"))
  with pytest.raises(ValueError, match="is not NAME=VALUE"):
    _script(resource.cpu(), options=["partition"])
  process = launch(launch_file(""), "--backend=slurm", env={"PATH": str(tmp_path)})
  assert process.returncode == 1
  assert "there is no sbatch here" in process.stderr
