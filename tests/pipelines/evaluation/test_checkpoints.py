"""The same scores from every kind of checkpoint: a Hugging Face folder, ours, an endpoint."""

import dataclasses
import re
import subprocess
import sys

import pytest

from selfimprove_jax.models.checkpoints import open_checkpoint, params_checkpoint
from selfimprove_jax.pipelines.common.endpoints import EndpointConfig
from selfimprove_jax.runs.stage import Run

pytestmark = pytest.mark.slow


def _logprobs(folder, task):
  records = Run(folder, None).artifact(f"scores/{task}").records()
  return [logprob for record in records for logprob in record["logprobs"]]


def _texts(folder):
  return [r["generation"] for r in Run(folder, None).artifact("scores/triviaqa").records()]


@pytest.fixture
def address(checkpoint, subprocess_options):
  """The address of our server of the checkpoint."""
  flags = (f"--checkpoint={checkpoint}", "--port=0", "--num_slots=2", "--max_length=512")
  process = subprocess.Popen(
    [sys.executable, "-m", "selfimprove_jax.serving", *flags, "--model_name=tiny"],
    stdout=subprocess.PIPE,
    **subprocess_options,
  )
  try:
    ready = process.stdout.readline()
    match = re.match(r"ready: (\S+) serves tiny", ready)
    assert match, ready
    yield match[1]
  finally:
    process.terminate()
    process.wait()
    process.stdout.close()


def test_an_endpoint_gives_the_scores_of_its_checkpoint(address, config, run, finished, tmp_path):
  endpoint = EndpointConfig(model="tiny", cache=str(tmp_path / "calls.sqlite"))
  changed = dataclasses.replace(
    config, checkpoint=address, endpoint=endpoint, tasks="arc_easy,triviaqa"
  )
  run(changed, tmp_path / "run")
  assert _logprobs(tmp_path / "run", "arc_easy") == pytest.approx(
    _logprobs(finished, "arc_easy"), abs=1e-3
  )
  assert _texts(tmp_path / "run") == _texts(finished)
  with pytest.raises(ValueError, match="openwebtext:1: whole documents need a model on"):
    run(dataclasses.replace(changed, tasks="openwebtext"), tmp_path / "documents")


def test_a_checkpoint_of_ours_gives_the_same_scores(
  checkpoint, config, run, finished, tmp_path, one_device_mesh
):
  opened = open_checkpoint(checkpoint)
  model = opened.compute_config({"dtype": "float32", "param_dtype": "float32"})
  params_checkpoint.save_params(
    tmp_path / "ours",
    opened.load_params(one_device_mesh, model),
    model,
    tokenizer=checkpoint,
    max_positions=512,
  )
  run(
    dataclasses.replace(config, checkpoint=str(tmp_path / "ours"), tasks="arc_easy"),
    tmp_path / "run",
  )
  assert _logprobs(tmp_path / "run", "arc_easy") == pytest.approx(
    _logprobs(finished, "arc_easy"), abs=1e-4
  )
