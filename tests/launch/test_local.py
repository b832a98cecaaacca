"""The local backend: failing units, several processes, signals, and continuing after them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

# Each script finds its folder in its own flags, as main.py does.
_HEAD = (
  "import os, pathlib, signal, sys, time\n"
  "flags = dict(flag.split('=', 1) for flag in sys.argv[1:])\n"
  "folder = pathlib.Path(flags['--workdir'])\n"
  "folder.mkdir(parents=True, exist_ok=True)\n"
)
_TRIES = _HEAD + (
  "tries = len(list(folder.glob('try*')))\n"
  "(folder / f'try{tries}').write_text(' '.join(sys.argv[1:]))\n"
)
_SAVES_ON_SIGTERM = _TRIES + (
  "if 'HOLD' in os.environ:\n"
  "  def save(*_):\n"
  "    (folder / 'saved').touch()\n"
  "    sys.exit(143)\n"
  "  signal.signal(signal.SIGTERM, save)\n"
  "  (folder / 'ready').touch()\n"
  "  time.sleep(60)\n"
)


def _wait_for(*paths):
  deadline = time.monotonic() + 30
  while not all(path.exists() for path in paths):
    assert time.monotonic() < deadline, f"none of {paths} appeared"
    time.sleep(0.02)


def _report(process):
  """Unit -> its line of the table at the end."""
  lines = process.stdout.splitlines()
  return {line.split(":")[0]: line for line in lines if line[:2] in ("a-", "b-", "c-")}


def test_a_failing_unit_is_repeated_with_the_same_command_and_folder(
  launch, launch_file, run_folder
):
  path = launch_file(_TRIES + "sys.exit(3 if tries == 0 and folder.name == 'b-seed1' else 0)\n")
  process = launch(path, "--max_parallel=3")
  assert process.returncode == 0, process.stdout + process.stderr
  report = _report(process)
  assert report["b-seed1"].startswith("b-seed1: complete, 2 attempts")
  assert all(": complete, 1 attempt," in report[name] for name in report if name != "b-seed1")
  assert len(report) == 6
  folder = run_folder / "b-seed1"
  assert (folder / "try0").read_text() == (folder / "try1").read_text()
  assert "b-seed1: failed with exit code 3" in process.stdout


def test_a_unit_that_always_fails_is_reported_with_its_last_lines(launch, launch_file, run_folder):
  path = launch_file(
    _TRIES
    + "print(f'the disk of {folder.name} is full')\nsys.exit(7 * (folder.name == 'a-seed0'))\n"
  )
  process = launch(path, "--max_parallel=2", "--retries=2")
  assert process.returncode == 1
  report = _report(process)
  assert report["a-seed0"].startswith("a-seed0: FAILED, 3 attempts, exit code 7;")
  assert str(run_folder / "launch" / "a-seed0.log") in report["a-seed0"]
  assert "    the disk of a-seed0 is full" in process.stdout
  assert sum(": complete" in line for line in report.values()) == 5
  again = launch(path, "--retries=0")
  assert again.returncode == 1
  assert again.stdout.count("complete already") == 5
  assert len(list((run_folder / "a-seed0").glob("try*"))) == 4


def test_complete_units_are_skipped_unless_their_flags_changed(launch, launch_file, run_folder):
  launch(launch_file(_TRIES, seeds=(0,)), "--max_parallel=3")
  process = launch(launch_file(_TRIES, seeds=(0,), arguments=("--more=1",)), "--only=a,b-seed0")
  assert process.returncode == 0, process.stderr
  assert "complete already" not in process.stdout
  process = launch(launch_file(_TRIES, seeds=(0,), arguments=("--more=1",)))
  assert process.stdout.count("complete already") == 2
  tries = {name: len(list((run_folder / name).glob("try*"))) for name in ("a-seed0", "c-seed0")}
  assert tries == {"a-seed0": 2, "c-seed0": 2}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_units_save_on_a_signal_and_the_same_command_continues(
  signum, launch, launch_argv, launch_file, run_folder
):
  path = launch_file(_SAVES_ON_SIGTERM, seeds=(0,))
  argv = launch_argv(path, "--max_parallel=2")
  options = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | {"HOLD": "1"}}
  with subprocess.Popen(argv, **options) as launcher:
    _wait_for(run_folder / "a-seed0" / "ready", run_folder / "b-seed0" / "ready")
    launcher.send_signal(signum)
    output, _ = launcher.communicate(timeout=30)
  assert launcher.returncode == 128 + signum
  assert (run_folder / "a-seed0" / "saved").exists()
  assert (run_folder / "b-seed0" / "saved").exists()
  assert "a-seed0: stopped after" in output
  assert "c-seed0: not run" in output
  process = launch(path)
  assert process.returncode == 0, process.stdout
  assert len(list((run_folder / "a-seed0").glob("try*"))) == 2


def test_a_unit_that_ignores_sigterm_is_killed_with_all_that_it_started(
  launch_argv, launch_file, run_folder
):
  script = _HEAD + (
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = os.fork()\n"
    "(folder / str(child)).touch()\n"
    "time.sleep(60)\n"
  )
  argv = launch_argv(launch_file(script, arms={"a": {}}, seeds=(0,)), "--grace_s=0.2")
  with subprocess.Popen(argv, stdout=subprocess.DEVNULL) as launcher:
    unit = run_folder / "a-seed0"
    deadline = time.monotonic() + 30
    while not unit.exists() or len(list(unit.iterdir())) < 2:
      assert time.monotonic() < deadline
      time.sleep(0.02)
    [child] = [int(path.name) for path in unit.iterdir() if path.name != "0"]
    launcher.terminate()
    assert launcher.wait(timeout=30) == 143
  deadline = time.monotonic() + 5
  while os.path.exists(f"/proc/{child}") and "Z" not in _state(child):
    assert time.monotonic() < deadline, "what the unit started still runs"
    time.sleep(0.02)


def _state(pid):
  with open(f"/proc/{pid}/stat") as file:
    return file.read().rpartition(")")[2].split()[0]


def test_a_unit_that_outlived_a_killed_launcher_is_not_started_twice(
  launch, launch_argv, launch_file, run_folder
):
  path = launch_file(_SAVES_ON_SIGTERM, arms={"a": {}})
  options = {"stdout": subprocess.DEVNULL, "env": os.environ | {"HOLD": "1"}}
  with subprocess.Popen(launch_argv(path), **options) as launcher:
    _wait_for(run_folder / "a-seed0" / "ready")
    launcher.kill()
  process = launch(path)
  assert process.returncode == 1
  assert "unit a-seed0 still runs" in process.stderr
  [left] = _processes_with(str(run_folder / "a-seed0"))
  os.kill(left, signal.SIGTERM)
  _wait_for(run_folder / "a-seed0" / "saved")
  deadline = time.monotonic() + 10
  while (process := launch(path)).returncode:
    assert time.monotonic() < deadline, process.stderr
  assert "a-seed0: complete" in process.stdout


def _processes_with(text):
  found = []
  for name in filter(str.isdecimal, os.listdir("/proc")):
    try:
      with open(f"/proc/{name}/cmdline") as file:
        if text in file.read():
          found.append(int(name))
    except OSError:
      continue
  return found


def test_processes_of_a_unit_meet_at_one_address_and_have_logs_each(
  launch, launch_file, run_folder
):
  script = _HEAD + (
    "name = flags['--process_id']\n"
    "(folder / name).write_text(flags['--coordinator'] + os.environ['XLA_FLAGS'])\n"
    "print('process', name, 'of', flags['--num_processes'])\n"
  )
  path = launch_file(script, arms={"a": {}}, seeds=(0,), resource="cpu(devices=3, processes=2)")
  process = launch(path, env={"XLA_FLAGS": ""})
  assert process.returncode == 0, process.stdout
  first, second = ((run_folder / "a-seed0" / name).read_text() for name in "01")
  assert first == second
  assert first.endswith("--xla_force_host_platform_device_count=3")
  logs = run_folder / "launch"
  assert "process 0 of 2" in (logs / "a-seed0.log").read_text()
  assert "process 1 of 2" in (logs / "a-seed0.1.log").read_text()


def test_a_failing_process_ends_its_unit_and_is_the_one_reported(launch, launch_file, run_folder):
  script = _HEAD + (
    "if flags['--process_id'] == '1':\n  sys.exit('rank one has no memory')\n"
    "time.sleep(20)\n(folder / 'waited to the end').touch()\n"
  )
  path = launch_file(script, arms={"a": {}}, seeds=(0,), resource="cpu(processes=2)")
  process = launch(path, "--retries=0")
  assert process.returncode == 1
  assert "a-seed0: FAILED, 1 attempt, exit code 1;" in process.stdout
  assert "    rank one has no memory" in process.stdout
  assert not (run_folder / "a-seed0" / "waited to the end").exists()


def test_a_command_that_does_not_exist_is_a_failed_unit(launch, launch_file):
  process = launch(launch_file("", arms={"a": {}}, seeds=(0,), command=("not-there",)))
  assert process.returncode == 1
  assert "a-seed0: FAILED, 2 attempts, exit code 127" in process.stdout
  assert "not-there cannot be started: No such file" in process.stdout


def test_a_record_torn_by_a_crash_is_skipped(launch, launch_file, run_folder):
  path = launch_file(_TRIES, arms={"a": {}}, seeds=(0,))
  assert launch(path).returncode == 0
  record = run_folder / "launch" / "a-seed0.jsonl"
  record.write_text(record.read_text() + '{"argv": ["pyth')
  assert "complete already" in launch(path).stdout


@pytest.mark.slow
def test_a_real_unit_makes_its_documents_with_its_override_and_seed(
  launch, launch_file, run_folder, subprocess_options
):
  path = launch_file(
    "",
    config="configs/sbp_quick.py:smoke",
    arms={"a": {"corpus.split.max_passage_chars": 150}},
    seeds=(5,),
    arguments=("--stages=documents",),
    command=None,
  )
  process = launch(path, env=subprocess_options["env"])
  assert process.returncode == 0, process.stdout + process.stderr
  unit = run_folder / "a-seed5"
  config = json.loads((unit / "config.json").read_text())
  assert config["seed"] == 5
  assert config["corpus"]["split"]["max_passage_chars"] == 150
  assert (unit / "documents" / "manifest.json").exists()
  assert sys.executable in (run_folder / "launch" / "a-seed5.log").read_text()
