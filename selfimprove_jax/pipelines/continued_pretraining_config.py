"""The config of the continued pretraining pipeline: which keys each section may and must have."""

from typing import Any

from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines import config_check, continued_pretraining

SECTIONS = (
  *("pipeline", "title", "seed", "mesh", "runtime"),
  *("initial", "new_text", "replay", "tokens", "model", "training", "tuning"),
  *("evaluation", "export"),
)
_INITIAL = {
  "checkpoint": ("kind", "path", "special_tokens"),
  "pretrain": ("kind", "tokenizer", "training", "total_tokens", "weight_decay", "dropout_rate"),
}
# Sections that are read key by key.
_KEYS = {
  "runtime": ("parallel_stages",),
  "tokens": ("seq_len", "new_text_tokens", "replay_tokens", "batch_documents"),
  "training": config_check.TRAINING,
  "evaluation": ("batch_rows", "max_validation_rows"),
}
_SPLIT_GIVEN = ("documents", "writer", "source", "scratch")
# Section -> the function whose arguments it holds, and those it gets from elsewhere.
_ARGUMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
  "mesh": ("partitioning:make_mesh", ("devices",)),
  "model": ("models.llama:LlamaConfig", ()),
  "new_text": ("pipelines.text_stages:documents", ("context",)),
  "new_text.split": ("data.split:write_split", _SPLIT_GIVEN),
  "replay": ("pipelines.text_stages:documents", ("context",)),
  "replay.split": ("data.split:write_split", _SPLIT_GIVEN),
  "tuning": (
    "pipelines.continued_pretraining_stages:tune",
    ("context", "kind", "model", "mesh", "training", "evaluation", "seed"),
  ),
  "export": (
    "pipelines.continued_pretraining_stages:export",
    ("context", "kind", "mesh", "seq_len"),
  ),
}


def check(config: dict[str, Any]) -> None:
  """Compares every section with what reads it, before anything runs.

  Raises:
    ValueError: a section or a key is missing or unknown; or a value is out of its range, or does
      not go with another.
  """
  config_check.compare("the config", config, required=SECTIONS, allowed=SECTIONS)
  for section, keys in _KEYS.items():
    config_check.compare(f"section {section!r}", config[section], required=keys, allowed=keys)
  for section, (function, given) in _ARGUMENTS.items():
    config_check.compare_section(config, section, function, given)
  for name in continued_pretraining.CORPORA:
    config_check.check_corpus(name, config[name])
    _check_held_out(name, config[name]["split"])
  _check_initial(config)
  _check_values(config)


def _check_initial(config):
  initial = config["initial"]
  kind = initial.get("kind")
  if kind not in _INITIAL:
    raise ValueError(f"initial.kind={kind!r} is unknown; there are {sorted(_INITIAL)}")
  config_check.compare(
    "section 'initial'", initial, required=_INITIAL[kind], allowed=_INITIAL[kind]
  )
  if kind == "checkpoint":
    config_check.compare_section(
      config, "initial.special_tokens", "data.tokenizer:load_tokenizer", ("path_or_name",)
    )
    return
  config_check.compare_section(
    config,
    "initial.tokenizer",
    "pipelines.text_stages:tokenizer",
    ("context", "path", "special_tokens"),
  )
  config_check.compare(
    "section 'initial.training'",
    initial["training"],
    required=config_check.TRAINING,
    allowed=config_check.TRAINING,
  )


def _check_held_out(name, split):
  for role in ("validation_fraction", "test_fraction"):
    if not split[role] > 0:
      raise ValueError(
        f"{name}.split.{role}={split[role]} must be above 0: what is learnt and what is forgotten "
        f"is measured on held-out documents of both corpora"
      )


def _check_values(config):
  tuning = config["tuning"]
  if not 0 <= tuning["replay_share"] < 1:
    raise ValueError(f"tuning.replay_share={tuning['replay_share']} must be in [0, 1)")
  if not tuning["epochs"] > 0:
    raise ValueError(f"tuning.epochs={tuning['epochs']} must be above 0")
  seq_len = config["tokens"]["seq_len"]
  sections = {"training": config["training"]}
  if config["initial"]["kind"] == "pretrain":
    sections["initial.training"] = config["initial"]["training"]
  for section, training in sections.items():
    if training["seq_len"] != seq_len:
      raise ValueError(
        f"{section}.seq_len={training['seq_len']} is not tokens.seq_len={seq_len}: rows are packed "
        f"once, for all"
      )
  dropout_rate = LlamaConfig(**config["model"]).dropout_rate
  if dropout_rate:
    raise ValueError(
      f"model.dropout_rate={dropout_rate}: the rate of a training is given with it, as "
      f"tuning.dropout_rate"
    )
