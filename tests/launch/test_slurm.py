"""The Slurm backend, against stand-ins of its programs on PATH that behave as Slurm's do."""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from selfimprove_jax.launch import resource, slurm

pytest.importorskip("submitit")

_FAIL_ONCE = (
  "import os, pathlib, sys\n"
  "flags = dict(flag.split('=', 1) for flag in sys.argv[1:])\n"
  "folder = pathlib.Path(flags['--workdir'])\n"
  "folder.mkdir(parents=True, exist_ok=True)\n"
  "tries = len(list(folder.glob('try*')))\n"
  "(folder / f'try{tries}').write_text(os.environ['A_NAME'])\n"
  "sys.exit(5 if tries == 0 else 0)\n"
)


@pytest.fixture
def slurm_path(tmp_path):
  """PATH with an sbatch that checks the script, an srun that keeps its arguments, and scontrol."""
  folder = tmp_path / "bin"
  folder.mkdir()
  programs = {
    "sbatch": f'bash -n "$1" && cp "$1" {tmp_path}/submitted && echo Submitted batch job 41',
    "srun": f'printf "%s\\n" "$@" >{tmp_path}/srun_arguments\n'
    'while [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"',
    "scontrol": f'echo "$@" >{tmp_path}/scontrol_arguments',
  }
  for name, body in programs.items():
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(stat.S_IRWXU)
  return f"{folder}:{os.environ['PATH']}"


def _environment(path, task=None):
  """The variables of an array's task, or of a job without an array."""
  job = {"SLURM_JOB_ID": "41"}
  if task is not None:
    job = {"SLURM_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "41"}
  return os.environ | job | {"PATH": path}


def _options(text):
  lines = (line.removeprefix("#SBATCH --") for line in text.splitlines() if "#SBATCH" in line)
  return dict(line.partition("=")[::2] for line in lines)


def test_a_sweep_is_one_array_whose_jobs_run_the_units_with_retries(
  launch, launch_file, slurm_path, tmp_path, run_folder, page
):
  path = launch_file(
    _FAIL_ONCE, arms={"a": {"title": "it's $HOME"}, "b": {}}, environment={"A_NAME": "$1 'x'"}
  )
  flags = ("--backend=slurm", "--sbatch=partition=gpu", "--max_parallel=2", "--grace_s=90")
  process = launch(path, *flags, env={"PATH": slurm_path})
  assert process.returncode == 0, process.stderr
  assert "a-seed1: submitted as Slurm job 41_1" in process.stdout
  script = tmp_path / "submitted"
  options = _options(script.read_text())
  assert options["array"] == "0-3%2"
  assert options["signal"] == "B:TERM@90"
  assert options["partition"] == "gpu"
  assert "requeue" in options
  assert not {"time", "mem", "wckey", "gpus-per-node"} & options.keys()
  ran = subprocess.run(
    ["bash", script], env=_environment(slurm_path, 1), timeout=60, capture_output=True, text=True
  )
  assert ran.returncode == 0, ran.stderr
  assert (tmp_path / "srun_arguments").read_text().splitlines() == [
    *("--kill-on-bad-exit=1", sys.executable, str(tmp_path / "unit.py")),
    *(f"--config={page}", "--config.title=it's $HOME", "--config.seed=1"),
    f"--workdir={run_folder}/a-seed1",
  ]
  assert (run_folder / "a-seed1" / "try1").read_text() == "$1 'x'"
  records = (run_folder / "launch" / "a-seed1.jsonl").read_text().splitlines()
  assert [json.loads(line)["outcome"] for line in records] == ["failed", "complete"]
  process = launch(path, *flags, env={"PATH": slurm_path})
  assert _options(script.read_text())["array"] == "0-2%2"
  assert "a-seed1" not in process.stdout


def test_a_stopped_job_lets_its_unit_save_and_is_queued_again(
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
  assert launch(path, "--backend=slurm", env={"PATH": slurm_path}).returncode == 0
  unit = run_folder / "a-seed0"
  command, environment = ["bash", tmp_path / "submitted"], _environment(slurm_path, 0)
  with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
    deadline = time.monotonic() + 30
    while not (unit / "ready").exists():
      assert time.monotonic() < deadline
      time.sleep(0.02)
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 1
    assert "unit a-seed0 still runs" in again.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
  assert (unit / "saved").exists()
  assert (tmp_path / "scontrol_arguments").read_text() == "requeue 41_0\n"
  [record] = (run_folder / "launch" / "a-seed0.jsonl").read_text().splitlines()
  assert json.loads(record)["outcome"] == "stopped"


def test_one_unit_is_a_job_without_an_array_and_fails_with_its_code(
  launch, launch_file, slurm_path, tmp_path, run_folder
):
  path = launch_file("import sys\nsys.exit(7)\n", arms={"a": {}}, seeds=(0,))
  process = launch(path, "--backend=slurm", "--retries=0", env={"PATH": slurm_path})
  assert "a-seed0: submitted as Slurm job 41\n" in process.stdout
  assert "array" not in _options((tmp_path / "submitted").read_text())
  ran = subprocess.run(
    ["bash", tmp_path / "submitted"], env=_environment(slurm_path), capture_output=True, text=True
  )
  assert ran.returncode == 7
  assert not (tmp_path / "scontrol_arguments").exists()
  [record] = (run_folder / "launch" / "a-seed0.jsonl").read_text().splitlines()
  assert json.loads(record)["returncode"] == 7


def _parameters(made, **changes):
  options = dict(retries=1, grace_s=120.0, max_parallel=None, options=[]) | changes
  return slurm.parameters("x", made, **options)


def test_on_gpus_there_is_a_process_for_each_on_every_node(launch, launch_file):
  made = resource.gpu("h100", devices=8, hosts=4, cpus=96, memory_gib=900, hours=36.5)
  wanted = {"nodes": 4, "ntasks_per_node": 8, "gpus_per_node": 8, "cpus_per_task": 12}
  wanted |= {"mem": "900G", "time": 36 * 60 + 30}
  assert wanted.items() <= _parameters(made).items()
  path = launch_file("", arms={"a": {}}, seeds=(0,), resource="gpu('h100', devices=2, cpus=8)")
  printed = launch(path, "--backend=slurm", "--dry_run").stdout.splitlines()
  assert "# gpus_per_node=2" in printed
  assert printed[-1].startswith("srun --kill-on-bad-exit=1 --cpus-per-task=4 ")


def test_units_that_slurm_cannot_run_are_refused(launch, launch_file, slurm_path, tmp_path):
  with pytest.raises(ValueError, match="v5p is not in Slurm clusters"):
    _parameters(resource.tpu("v5p:4x4x4"))
  with pytest.raises(ValueError, match="is not NAME=VALUE"):
    _parameters(resource.cpu(), options=["partition"])
  process = launch(launch_file(""), "--backend=slurm", env={"PATH": str(tmp_path)})
  assert process.returncode == 1
  assert "there is no sbatch here" in process.stderr
  (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\necho no such partition >&2\nexit 1\n")
  process = launch(launch_file(""), "--backend=slurm", env={"PATH": slurm_path})
  assert process.returncode == 1
  assert "sbatch refused the job: no such partition" in process.stderr
  assert "Traceback" not in process.stderr


def test_without_submitit_the_backend_says_what_to_install(launch, launch_file, tmp_path):
  (tmp_path / "submitit.py").write_text("raise ImportError('no such package here')\n")
  process = launch(launch_file(""), "--backend=slurm", env={"PYTHONPATH": str(tmp_path)})
  assert process.returncode == 1
  assert "pip install 'selfimprove_jax[slurm]'" in process.stderr
