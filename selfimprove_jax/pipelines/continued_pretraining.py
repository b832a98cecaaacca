"""Continued pretraining on new text with replay, as a list of stages (EntiGraph; arXiv 2409.07431).

  initial -> tokenizer -> new_text/documents, new_text/rows -> tuned -> export
                          replay/documents,   replay/rows

New text is what the model shall learn: in the paper, texts synthesized about a small corpus. Replay
is text like that of its first pretraining, mixed in so that it forgets less. Of both some documents
are held out, and scored before and after.

The model to begin with is `config["initial"]`: a Hugging Face checkpoint with its own tokenizer
(kind "checkpoint"), or, where none is at hand, one pretrained first on the replay text (kind
"pretrain": then the tokenizer is trained on that too, and both come after its rows).
"""

from typing import Any

from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.stages import Plan, Stage

CORPORA = ("new_text", "replay")
KINDS = ("checkpoint", "pretrain")

_FUNCTIONS = "continued_pretraining_stages"


def build(config: dict[str, Any]) -> list[Stage]:
  """The stages of a config that `continued_pretraining_config.check` has passed, in order.

  Raises:
    ValueError: the model's shape is impossible.
  """
  c = config
  documents = [Stage(f"{name}/documents", "text_stages:documents", c[name]) for name in CORPORA]
  rows = [
    Stage(
      f"{name}/rows",
      f"{_FUNCTIONS}:rows",
      {
        "seq_len": c["tokens"]["seq_len"],
        "max_tokens": c["tokens"][f"{name}_tokens"],
        "batch_documents": c["tokens"]["batch_documents"],
      },
      {"documents": f"{name}/documents", "tokenizer": "tokenizer"},
      Plan(tokens=c["tokens"][f"{name}_tokens"]),
    )
    for name in CORPORA
  ]
  if c["initial"]["kind"] == "checkpoint":
    stages = [*_checkpoint(c), *documents, *rows]
  else:
    stages = [*documents, _new_tokenizer(c), *rows, _pretraining(c)]
  return [*stages, _tuning(c), _export(c)]


def _checkpoint(c):
  initial = c["initial"]
  config = {"path": initial["path"], "model": c["model"]}
  return [
    Stage("initial", f"{_FUNCTIONS}:checkpoint", config),
    Stage(
      "tokenizer",
      f"{_FUNCTIONS}:checkpoint_tokenizer",
      {"special_tokens": initial["special_tokens"]},
      {"initial": "initial"},
    ),
  ]


def _new_tokenizer(c):
  config = {"path": None, "special_tokens": {}, **c["initial"]["tokenizer"]}
  return Stage("tokenizer", "text_stages:tokenizer", config, {"documents": "replay/documents"})


def _pretraining(c):
  initial = c["initial"]
  training, total_tokens = initial["training"], initial["total_tokens"]
  model = {**c["model"], "dropout_rate": initial["dropout_rate"]}
  config = {
    "model": model,
    "mesh": c["mesh"],
    "training": training,
    "num_steps": max(1, total_tokens // (training["batch_rows"] * training["seq_len"])),
    "mixture": {"unique": 1.0},
    "weight_decay": initial["weight_decay"],
    "evaluation": c["evaluation"],
    "seed": c["seed"],
  }
  inputs = {"tokens": "replay/rows", "tokenizer": "tokenizer"}
  return Stage(
    "initial",
    "model_stages:pretrain",
    config,
    inputs,
    _training_plan(model, training, total_tokens),
    uses_devices=True,
  )


def _tuning(c):
  config = {
    "kind": c["initial"]["kind"],
    "model": c["model"],
    "mesh": c["mesh"],
    "training": c["training"],
    "evaluation": c["evaluation"],
    "seed": c["seed"],
    **c["tuning"],
  }
  inputs = {
    "initial": "initial",
    "tokenizer": "tokenizer",
    **{name: f"{name}/rows" for name in CORPORA},
  }
  tokens = round(c["tuning"]["epochs"] * c["tokens"]["new_text_tokens"])
  return Stage(
    "tuned",
    f"{_FUNCTIONS}:tune",
    config,
    inputs,
    _training_plan(c["model"], c["training"], tokens),
    uses_devices=True,
  )


def _export(c):
  return Stage(
    "export",
    f"{_FUNCTIONS}:export",
    {
      "kind": c["initial"]["kind"],
      "mesh": c["mesh"],
      "seq_len": c["tokens"]["seq_len"],
      **c["export"],
    },
    {"initial": "initial", "tokenizer": "tokenizer", "tuned": "tuned"},
    uses_devices=True,
  )


def _training_plan(model, training, tokens):
  network = LlamaConfig(**model)
  flops = tokens * network.train_flops_per_token(training["seq_len"])
  # Parameters, gradients and AdamW's two moments, all float32.
  return Plan(tokens, flops, 16.0 * network.num_parameters)
