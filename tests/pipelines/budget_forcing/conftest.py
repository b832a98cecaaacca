"""A smoke run of budget forcing on a tiny chat model with random weights."""

import gzip
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import pytest
import tokenizers

from configs import budget_forcing as config_page
from selfimprove_jax.models.checkpoints import hf_export
from selfimprove_jax.models.llama import Llama, LlamaConfig, init_params
from selfimprove_jax.pipelines import budget_forcing
from selfimprove_jax.runs import runner
from selfimprove_jax.runtime.config import parse
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.runtime.progress import Progress

_CHAT = (
  "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
  "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The page's smoke run has one setting of each method; the tests count and compare several.
_SMOKE = dict(
  config_page._SIZES["smoke"],
  num_questions=4,
  response=dict(max_answer_tokens=4, questions_per_shard=2),
  engine=dict(num_slots=4, max_length=256),
  arms=dict(maxima=(4, 8), ignored=(1,), samples=2, tries=2, steps=(1,)),
)
QUESTIONS = [
  ("How many legs have two cats?", "Four and four.\n#### 8"),
  ("What is 600 and 600? <|im_end|>", "#### 1,200"),
  ("What is 3 less than 1?", "#### -2"),
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> pathlib.Path:
  """A Hugging Face folder."""
  folder = tmp_path_factory.mktemp("checkpoint")
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=280,
    special_tokens=["<|im_start|>", "<|im_end|>"],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  backend.train_from_iterator(["Wait, what is the answer?"] * 9, trainer)
  (folder / "tokenizer").mkdir()
  backend.save(str(folder / "tokenizer" / "tokenizer.json"))
  described = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": _CHAT}
  (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(described))
  config = LlamaConfig(
    vocab_size=280,
    num_layers=1,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=False,
    rope_theta=10_000.0,
    dtype="float32",
  )
  params = nn.unbox(init_params(Llama(config), jax.random.key(0)))
  # Larger weights make the next token depend on the text, as it does in a trained model.
  params = jax.tree.map(lambda x: x * 20 if x.ndim > 1 else x, params)
  hf_export.save_pretrained(
    folder / "model",
    params,
    config,
    tokenizer=folder / "tokenizer",
    generation={"bos_token_id": 0, "eos_token_id": 1},
    max_positions=512,
    dtype="float32",
  )
  return folder / "model"


@pytest.fixture(scope="session")
def smoke_page() -> dict[str, Any]:
  """The page of the smoke run with several settings of each method, as JSON values."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(config_page._SIZES, "smoke", _SMOKE)
    values = config_page.get_config("smoke").copy_and_resolve_references().to_dict()
  return json.loads(json.dumps(values))


@pytest.fixture(scope="session")
def values(smoke_page, checkpoint, tmp_path_factory) -> dict[str, Any]:
  """The page of the smoke run as JSON values, on this checkpoint and these questions."""
  path = tmp_path_factory.mktemp("questions") / "questions.jsonl.gz"
  with gzip.open(path, "wt") as file:
    for question, answer in QUESTIONS:
      file.write(json.dumps({"question": question, "answer": answer}) + "\n")
  return smoke_page | {
    "checkpoint": smoke_page["checkpoint"] | {"path": str(checkpoint)},
    "questions": smoke_page["questions"] | {"path": str(path)},
  }


@pytest.fixture(scope="session")
def config(values) -> budget_forcing.Config:
  """The smoke run's config."""
  return parse(budget_forcing.Config, values)


@pytest.fixture(scope="session")
def run(one_device_mesh):
  """Runs a config in a folder, on one device: a mesh of several is slower to compile."""

  def run(config: budget_forcing.Config, folder: pathlib.Path, only=None) -> None:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(MeshConfig, "make", lambda self, devices=None: one_device_mesh)
      runner.run(budget_forcing.stages(config), folder, only=only, progress=Progress(quiet=True))

  return run


@pytest.fixture(scope="session")
def finished(config, run, tmp_path_factory) -> pathlib.Path:
  """The folder of the finished smoke run; nobody may write in it."""
  folder = tmp_path_factory.mktemp("run")
  run(config, folder)
  return folder
