"""Real processes train as one job on CPU, with gloo; some are killed, stopped or stuck."""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest

from selfimprove_jax.runtime import partitioning
from selfimprove_jax.training import checkpoint
from selfimprove_jax.training.metrics_log import read_metrics

pytestmark = pytest.mark.slow

NUM_STEPS = 12


def _losses(job):
  assert job.end() == [0] * len(job.processes), job.log()
  return [r["train/loss"] for r in read_metrics(job.folder / "metrics.jsonl") if "train/loss" in r]


@pytest.fixture
def start(start_job):
  return lambda *args, **options: start_job(*args, **({"num_steps": NUM_STEPS} | options))


def test_the_number_of_processes_changes_neither_the_data_nor_the_losses(tmp_path, start):
  alone = _losses(start(tmp_path / "1x4", num_devices=4))
  assert len(alone) == NUM_STEPS
  for num_processes in (2, 4):
    together = _losses(
      start(
        tmp_path / f"{num_processes}", num_processes=num_processes, num_devices=4 // num_processes
      )
    )
    np.testing.assert_allclose(together, alone, rtol=1e-5)
  # With `tensor` over both processes each gets every row, and half of every matrix.
  tensor = start(tmp_path / "tensor", num_processes=2, mesh=dict(data=1, fsdp=1, tensor=2))
  np.testing.assert_allclose(_losses(tensor), alone, rtol=1e-5)


def test_a_run_resumes_with_another_number_of_processes_and_another_mesh(
  tmp_path, start, make_setup
):
  whole = _losses(start(tmp_path / "whole"))
  first = start(tmp_path / "a", num_processes=2, num_devices=2)
  first.wait_until(lambda: (tmp_path / "a" / "checkpoints" / "3").exists())
  first.kill()
  # Two processes saved it; this one restores it on meshes of its eight devices.
  for index, (fsdp, tensor) in enumerate([(8, 1), (4, 2), (2, 4)]):
    mesh = partitioning.make_mesh(data=1, fsdp=fsdp, tensor=tensor)
    folder = shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / f"copy-{index}")
    with checkpoint.Checkpoints(folder, keep=None) as saved:
      state = saved.restore_last(make_setup().abstract(mesh))  # compares every checksum
      assert int(state.step) == saved.steps()[-1] >= 3
  for index, options in enumerate(
    [
      dict(num_processes=4, mesh=dict(data=1, fsdp=2, tensor=2)),
      dict(num_devices=8, mesh=dict(data=2, fsdp=4, tensor=1)),
    ]
  ):
    folder = shutil.copytree(tmp_path / "a", tmp_path / f"b-{index}")
    np.testing.assert_allclose(_losses(start(folder, **options)), whole, rtol=1e-5)


def test_two_processes_that_save_in_a_bucket_are_killed_and_resume_there(
  tmp_path, start, bucket, emulator
):
  options = dict(num_processes=2, num_devices=2)
  whole = start(tmp_path / "whole", **options)
  _losses(whole)
  options |= dict(run_folder=str(bucket), environment=emulator)
  first = start(tmp_path / "first", **options)
  first.wait_until(lambda: (bucket / "checkpoints" / "6").exists())  # 3 is complete, 6 may be
  first.kill()
  assert (then := start(tmp_path / "then", **options)).end() == [0, 0], then.log()
  assert read_metrics(bucket / "metrics.jsonl") == read_metrics(whole.folder / "metrics.jsonl")
  assert json.loads((bucket / "result.json").read_text()) == whole.result()


def test_sigterm_to_one_process_saves_on_all(tmp_path, start):
  whole = start(tmp_path / "whole", num_processes=2)
  job = start(tmp_path / "stopped", num_processes=2, num_steps=400, checkpoint_every=1000)
  job.wait_until(lambda: job.num_steps() > 5)
  job.processes[1].terminate()
  assert job.end() == [128 + signal.SIGTERM] * 2, job.log()
  (saved,) = [int(path.name) for path in (job.folder / "checkpoints").iterdir()]
  assert saved >= 5
  expected = read_metrics(whole.folder / "metrics.jsonl") if _losses(whole) else []
  found = read_metrics(job.folder / "metrics.jsonl")
  shared = min(saved, NUM_STEPS)
  assert [r for r in found if r["step"] <= shared][1:5] == expected[1:5]


def test_the_others_end_when_one_is_killed_and_the_job_resumes_bit_by_bit(tmp_path, start):
  whole = start(tmp_path / "whole", num_processes=2, num_steps=40)
  job = start(tmp_path / "killed", num_processes=2, num_steps=40, heartbeat_seconds=10)
  job.wait_until(lambda: job.num_steps() > 8)
  job.processes[1].kill()
  codes = job.end(timeout=60)
  assert codes[1] == -signal.SIGKILL
  assert codes[0] not in (0, None)
  again = start(tmp_path / "killed", num_processes=2, num_steps=40)
  _losses(again), _losses(whole)
  assert again.result() == whole.result()
  for name in ("metrics.jsonl", "result.json"):
    assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_stuck_process_ends_the_job_with_a_message(tmp_path, start):
  job = start(tmp_path / "stuck", num_processes=2, hang_seconds=12, stuck=(1, 6))
  began = time.monotonic()
  codes = job.end(timeout=90)
  assert 0 not in codes
  assert time.monotonic() - began < 60
  assert "made no progress for 12 s" in job.log()
  assert "--hang_seconds" in job.log()


def test_a_process_that_stops_answering_ends_the_job_with_a_message(tmp_path, start):
  job = start(tmp_path / "silent", num_processes=2, num_steps=4000, heartbeat_seconds=10)
  job.wait_until(lambda: job.num_steps() > 5)
  os.kill(job.processes[1].pid, signal.SIGSTOP)
  job.processes[0].join(60)
  assert job.processes[0].exitcode not in (0, None)
  assert "heartbeat" in job.log()


def test_twenty_kills_at_random_moments_change_no_bit_of_the_result(tmp_path, start_job):
  options = dict(num_steps=300, checkpoint_every=10)
  whole = start_job(tmp_path / "whole", **options)
  assert whole.end() == [0], whole.log()
  moments = random.Random(0)
  folder, kills = tmp_path / "killed", 0
  while True:
    job = start_job(folder, **options)
    if kills < 20:
      # Some die in the restore, some in a step, a save or an evaluation.
      at, started = job.num_steps() + moments.randrange(0, 20), time.monotonic()
      pause = moments.random() * 0.03
      while job.num_steps() < at and job.processes[0].is_alive():
        if at == job.num_steps() and time.monotonic() - started > 1.0:
          break
        time.sleep(0.001)
      time.sleep(pause)
      if job.processes[0].is_alive():
        job.kill()
        kills += 1
        continue
    assert job.end() == [0], job.log()
    break
  assert kills == 20
  assert job.result() == whole.result()
  assert (folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
  assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 300
