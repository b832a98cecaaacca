"""tools/convert_checkpoint.py."""

import dataclasses
import json
import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch

from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.models.checkpoints import open_checkpoint
from selfimprove_jax.runs import artifacts

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@dataclasses.dataclass(frozen=True)
class Finished:
  returncode: int
  stdout: str
  stderr: str


@pytest.fixture
def convert(monkeypatch, capfd):
  """Runs the tool's `main` in this process, which has imported its libraries already."""

  def run(*arguments):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    try:
      runpy.run_path(str(TOOL), run_name="__main__")
    except SystemExit as end:
      return Finished(end.code, *capfd.readouterr())

  return run


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
  """A Qwen2 in bfloat16 and several files, with tokenizer and generation config."""
  import transformers

  config = transformers.Qwen2Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=99,
  )
  model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(torch.randn_like(parameter))
  model.generation_config.temperature = 0.5
  model.generation_config.do_sample = True
  folder = tmp_path_factory.mktemp("qwen2")
  model.save_pretrained(folder, max_shard_size="10KB")
  tokenizers.train_bpe(["some words"], vocab_size=262).save(folder)
  return folder


def _tensors(folder):
  files = sorted(folder.glob("*.safetensors"))
  return {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}


def test_hugging_face_to_orbax_and_back_gives_the_same_bits(convert, hf_folder, tmp_path):
  there = convert(f"--from={hf_folder}", f"--to={tmp_path / 'orbax'}")
  assert there.returncode == 0, there.stderr
  assert (
    "(orbax): 15 tensors of 19,744 parameters" in there.stdout and "in bfloat16" in there.stdout
  )
  assert open_checkpoint(tmp_path / "orbax").kind == "orbax"
  assert re.search(r"^reading  39,488/39,488 bytes  100%.*\nwriting .*orbax$", there.stderr, re.M)
  back = convert(
    f"--from={tmp_path / 'orbax'}", f"--to={tmp_path / 'hf'}", "--max_shard_gb=0.00001"
  )
  assert back.returncode == 0, back.stderr
  assert "(hf): 27 tensors" in back.stdout
  assert re.search(r"^reading .*orbax$", back.stderr, re.M)
  assert re.search(r"^writing  39,488/39,488 bytes  100%", back.stderr, re.M)
  before, after = _tensors(hf_folder), _tensors(tmp_path / "hf")
  assert before.keys() == after.keys() and len(before) == 27
  for name, value in before.items():
    assert value.dtype == after[name].dtype == "bfloat16"
    np.testing.assert_array_equal(value.view(np.uint16), after[name].view(np.uint16))
  for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
    read = [json.loads((folder / name).read_text()) for folder in (hf_folder, tmp_path / "hf")]
    assert read[0] == read[1]
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert (config["max_position_embeddings"], config["architectures"]) == (99, ["Qwen2ForCausalLM"])
  assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1


@pytest.mark.slow
def test_a_trained_stage_becomes_a_folder_that_transformers_generates_from(
  convert, smoke, subprocess_options, tmp_path
):
  import transformers

  command = [sys.executable, TOOL, f"--from={smoke.folder / 'seed'}", f"--to={tmp_path / 'seed'}"]
  found = subprocess.run(command, capture_output=True, **subprocess_options)
  assert found.returncode == 0, found.stderr
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "seed")
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "seed")
  assert type(model).__name__ == "Qwen3ForCausalLM"
  assert model.generation_config.eos_token_id == tokenizer.eos_token_id
  ids = torch.tensor([tokenizer.encode("Once upon")])
  out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
  assert out.shape[1] > ids.shape[1]

  found = convert(f"--from={smoke.folder / 'seed'}", f"--to={tmp_path / 'x'}", "--step=99999")
  assert found.returncode == 1 and "has no checkpoint of step 99999; it has [" in found.stderr
  found = convert(f"--from={smoke.folder / 'tokens'}", f"--to={tmp_path / 'x'}")
  assert found.returncode == 1 and "trained no model" in found.stderr


@pytest.mark.parametrize(
  ("arguments", "status", "message"),
  [
    (["--from=absent", "--to={tmp}/x"], 2, "--from=absent does not exist"),
    (["--from={hf}", "--to={tmp}/x", "--step=3"], 1, "step=3 is for a trained stage of a run"),
    (["--from={tmp}", "--to={tmp}/x"], 1, "holds no model"),
    (["--from={hf}", "--to={hf}"], 1, "exists already"),
  ],
)
def test_what_can_not_be_converted_is_said(
  arguments, status, message, convert, hf_folder, tmp_path
):
  found = convert(*(argument.format(hf=hf_folder, tmp=tmp_path) for argument in arguments))
  assert found.returncode == status, found.stderr
  assert message in found.stderr and "Traceback" not in found.stderr


def test_a_stage_that_trained_nothing_is_refused(convert, tmp_path):
  artifacts.Writer(tmp_path / "stage", config={}, inputs={}).finish({"vocab_size": 9})
  found = convert(f"--from={tmp_path / 'stage'}", f"--to={tmp_path / 'x'}")
  assert (found.returncode, found.stdout) == (1, "")
  assert "trained no model" in found.stderr


def test_another_tokenizer_dtype_and_context_can_be_written(convert, hf_folder, tmp_path):
  tokenizers.train_bpe(["other words"], vocab_size=265).save(tmp_path / "other")
  options = [f"--tokenizer={tmp_path / 'other'}", "--max_positions=33", "--dtype=float32"]
  found = convert(f"--from={hf_folder}", f"--to={tmp_path / 'hf'}", "--format=hf", *options)
  assert found.returncode == 0, found.stderr
  checkpoint = open_checkpoint(tmp_path / "hf")
  assert (checkpoint.max_positions, checkpoint.dtype) == (33, "float32")
  assert tokenizers.load_tokenizer(tmp_path / "hf").vocab_size == 265
