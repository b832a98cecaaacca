"""The config of the SBP pipeline: which keys each section may and must have.

A section is the keyword arguments of some function, so that is what it is compared with. All of it
is checked before anything runs: a misspelt key shall not be found by the last stage.
"""

from typing import Any

from selfimprove_jax.pipelines import config_check, pair_stages

SECTIONS = (
  *("pipeline", "title", "seed", "mesh", "runtime"),
  *("corpus", "tokenizer", "tokens", "model", "training", "total_tokens", "seed_model"),
  *("embeddings", "pairs", "synthesizer", "synthesis", "synthetic_rows", "relevance"),
  *("arms", "evaluation", "comparison"),
)
_PRETRAINING = ("mixture", "weight_decay", "dropout_rate")
# Sections that are read key by key.
_KEYS = {
  "runtime": ("parallel_stages",),
  "training": config_check.TRAINING,
  "seed_model": ("total_tokens", *_PRETRAINING),
  "evaluation": ("batch_rows", "max_validation_rows"),
}
# Section -> the function whose arguments it holds, and those it gets from elsewhere.
_ARGUMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
  "mesh": ("partitioning:make_mesh", ("devices",)),
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
  "synthesis": ("pipelines.synthesis_stages:sample", ("context", "conditional")),
  "synthesis.mesh": ("partitioning:make_mesh", ("devices",)),
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
  config_check.compare("the config", config, required=SECTIONS, allowed=SECTIONS)
  for section, keys in _KEYS.items():
    config_check.compare(f"section {section!r}", config[section], required=keys, allowed=keys)
  for section, (function, given) in _ARGUMENTS.items():
    config_check.compare_section(config, section, function, given)
  tuning = config["synthesizer"]["training"]
  config_check.compare(
    "section 'synthesizer.training'",
    tuning,
    required=config_check.TRAINING,
    allowed=config_check.TRAINING,
  )
  arm_keys = ("label", "all_in_of", *_PRETRAINING)
  for name, arm in config["arms"].items():
    config_check.compare(f"section 'arms.{name}'", arm, required=arm_keys, allowed=arm_keys)
  _check_choices(config)


def _check_choices(config):
  """Sections whose keys depend on one of their values."""
  config_check.check_corpus("corpus", config["corpus"])
  embeddings = dict(config["embeddings"])
  method = embeddings.pop("method", None)
  if method not in pair_stages.EMBEDDINGS:
    raise ValueError(
      f"embeddings.method={method!r} is unknown; there are {sorted(pair_stages.EMBEDDINGS)}"
    )
  config_check.compare_with_arguments(
    "embeddings", embeddings, pair_stages.EMBEDDINGS[method], ("context", "texts")
  )
