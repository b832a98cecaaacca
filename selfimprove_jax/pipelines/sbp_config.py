"""The config of the SBP pipeline: which keys each section may and must have.

A section is the keyword arguments of some function, so that is what it is compared with. All of it
is checked before anything runs: a misspelt key shall not be found by the last stage.
"""

import importlib
import inspect
from collections.abc import Collection
from typing import Any

from selfimprove_jax.data import corpora
from selfimprove_jax.pipelines import pair_stages

SECTIONS = (
  *("pipeline", "title", "seed", "mesh", "runtime"),
  *("corpus", "tokenizer", "tokens", "model", "training", "total_tokens", "seed_model"),
  *("embeddings", "pairs", "synthesizer", "synthesis", "synthetic_rows", "relevance"),
  *("arms", "evaluation", "comparison"),
)
_TRAINING = (
  *("batch_rows", "seq_len", "peak_lr", "final_lr", "warmup_fraction", "b1", "b2", "eps"),
  *("clip_norm", "accumulation_steps", "num_evaluations", "num_checkpoints", "keep", "patience"),
  "board_every",
)
_PRETRAINING = ("mixture", "weight_decay", "dropout_rate")
# Sections that are read key by key.
_KEYS = {
  "runtime": ("parallel_stages",),
  "training": _TRAINING,
  "seed_model": ("total_tokens", *_PRETRAINING),
  "evaluation": ("batch_rows", "max_validation_rows"),
}
# Section -> the function whose arguments it holds, and those it gets from elsewhere.
_ARGUMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
  "mesh": ("partitioning:make_mesh", ()),
  "model": ("models.llama:LlamaConfig", ()),
  "corpus": ("pipelines.text_stages:documents", ("context",)),
  "corpus.split": ("data.split:write_split", ("documents", "writer", "source", "scratch")),
  "tokenizer": ("pipelines.text_stages:tokenizer", ("context",)),
  "tokenizer.special_tokens": ("data.tokenizer:load_tokenizer", ("path_or_name",)),
  "tokens": ("pipelines.text_stages:tokens", ("context",)),
  "pairs": ("pipelines.pair_stages:make_pairs", ("context",)),
  "pairs.search": ("retrieval.ann:find_neighbors", ("database_CE", "queries_QE")),
  "pairs.filters": (
    "retrieval.pairs:make_pairs",
    (
      *("neighbors", "seed_ids", "target_ids", "seed_texts", "target_texts"),
      *("seed_lengths", "target_lengths"),
    ),
  ),
  "synthesizer": (
    "pipelines.model_stages:tune_synthesizer",
    ("context", "pairs", "mesh", "evaluation"),
  ),
  "synthesis": ("pipelines.synthesis_stages:sample", ("context", "conditional", "mesh")),
  "synthesis.sampling": ("sampling.sampler:SamplingConfig", ()),
  "synthetic_rows": ("pipelines.synthesis_stages:synthetic_rows", ("context",)),
  "synthetic_rows.filter": ("synthesis.filters:filter_documents", ("records", "references")),
  "synthetic_rows.quality": (
    "evaluation.data_quality:duplicate_rate",
    ("texts", "max_jaccard", "shingle_size", "seed"),
  ),
  "relevance": ("pipelines.synthesis_stages:relevance", ("context",)),
  "comparison": ("evaluation.comparison:compare", ("arms", "conditioning_gap", "gate")),
}


def check(config: dict[str, Any]) -> None:
  """Compares every section with what reads it.

  Raises:
    ValueError: a section or a key is missing or unknown; all of one section's are named.
  """
  _compare("the config", config, required=SECTIONS, allowed=SECTIONS)
  for section, keys in _KEYS.items():
    _compare(f"section {section!r}", config[section], required=keys, allowed=keys)
  for section, (function, given) in _ARGUMENTS.items():
    values = config
    for key in section.split("."):
      values = values[key]
    _compare_with_arguments(section, values, _load(function), given)
  tuning = config["synthesizer"]["training"]
  _compare("section 'synthesizer.training'", tuning, required=_TRAINING, allowed=_TRAINING)
  arm_keys = ("label", "all_in_of", *_PRETRAINING)
  for name, arm in config["arms"].items():
    _compare(f"section 'arms.{name}'", arm, required=arm_keys, allowed=arm_keys)
  _check_choices(config)


def _check_choices(config):
  """Sections whose keys depend on one of their values."""
  corpus = config["corpus"]
  try:  # nothing is read before the first document is asked for
    corpora.read_corpus(
      corpus["source"], on_error=corpus["on_error"], on_rejected=print, **corpus["options"]
    )
  except TypeError as error:
    raise ValueError(f"section 'corpus.options' does not fit: {error}") from None
  embeddings = dict(config["embeddings"])
  method = embeddings.pop("method", None)
  if method not in pair_stages.EMBEDDINGS:
    raise ValueError(
      f"embeddings.method={method!r} is unknown; there are {sorted(pair_stages.EMBEDDINGS)}"
    )
  _compare_with_arguments(
    "embeddings", embeddings, pair_stages.EMBEDDINGS[method], ("context", "texts")
  )


def _load(function):
  module, name = function.split(":")
  return getattr(importlib.import_module(f"selfimprove_jax.{module}"), name)


def _compare_with_arguments(section, values, function, given):
  parameters = {
    name: p for name, p in inspect.signature(function).parameters.items() if name not in given
  }
  required = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty]
  _compare(f"section {section!r}", values, required=required, allowed=parameters)


def _compare(
  where: str, found: Collection[str], *, required: Collection[str], allowed: Collection[str]
) -> None:
  missing = [key for key in required if key not in found]
  unknown = [key for key in found if key not in allowed]
  if missing or unknown:
    raise ValueError(
      f"{where} lacks {missing} and has unknown keys {unknown}; its keys are {sorted(allowed)}"
    )
