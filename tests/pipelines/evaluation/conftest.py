"""A tiny model, small files of four tasks, and the page of an evaluation on them."""

import json
import pathlib
from typing import Any

import pytest

from configs import evaluation as config_page
from selfimprove_jax.pipelines import evaluation
from selfimprove_jax.runs import runner
from selfimprove_jax.runtime.config import parse, to_json
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.runtime.progress import Progress
from tests.evaluation import tiny_model


def _records() -> dict[str, list[dict[str, Any]]]:
  numbers = range(7)
  arc = [
    {"query": f"Question: what is {n} and {n}?", "choices": [f"{n}", f"{2 * n}"], "gold": n % 2}
    for n in numbers
  ]
  trivia = [
    {"context": f"Question: what is {n}?\nAnswer:", "answer": f"{n}", "aliases": [f"number {n}"]}
    for n in numbers
  ]
  sums = [{"question": f"What is {n} and 1?", "answer": f"Add.\n#### {n + 1}"} for n in range(8)]
  texts = [{"text": f"What is the answer to {n}? " * (1 + 40 * n)} for n in range(3)]
  mine = [{"q": f"{n}?", "options": ["yes", "no", "yes"], "right": n % 3} for n in numbers]
  return {
    "arc_easy.jsonl.gz": arc,
    "triviaqa.jsonl.gz": trivia,
    "gsm8k.jsonl.gz": sums,
    "openwebtext.jsonl.gz": texts,
    "mine.jsonl": mine,
  }


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> pathlib.Path:
  import gzip

  folder = tmp_path_factory.mktemp("data")
  for name, records in _records().items():
    text = "".join(json.dumps(record) + "\n" for record in records)
    content = text.encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
  (folder / "mine.yaml").write_text(
    "task: mine\nfile: mine.jsonl\nprompt: 'Is it {{ q }}'\nchoices: options\ngold: right\n"
    "metrics: [acc]\n"
  )
  return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  return tiny_model.save(tmp_path_factory.mktemp("checkpoint"), adds_bos=False)


@pytest.fixture(scope="session")
def values(checkpoint, data_dir) -> dict[str, Any]:
  """The page as JSON values."""
  page = config_page.get_config().copy_and_resolve_references()
  page.checkpoint = str(checkpoint)
  page.data_dir = str(data_dir)
  page.tasks = f"arc_easy,triviaqa,gsm8k,openwebtext,{data_dir}/mine.yaml"
  page.examples_per_shard = 3
  page.engine.max_length = 512
  page.engine.num_slots = 4
  return json.loads(json.dumps(page.to_dict()))


@pytest.fixture(scope="session")
def config(values) -> evaluation.Config:
  return parse(evaluation.Config, values)


@pytest.fixture(scope="session")
def run(one_device_mesh):
  """Runs a config in a folder, on one device: a mesh of several is slower to compile."""

  def run(config: evaluation.Config, folder: pathlib.Path, only=None) -> None:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(MeshConfig, "make", lambda self, devices=None: one_device_mesh)
      quiet = Progress(quiet=True)
      runner.run(
        evaluation.stages(config), folder, only=only, progress=quiet, config=to_json(config)
      )

  return run


@pytest.fixture(scope="session")
def finished(config, run, tmp_path_factory) -> pathlib.Path:
  """The folder of a finished run; nobody may write in it."""
  folder = tmp_path_factory.mktemp("run")
  run(config, folder)
  return folder
