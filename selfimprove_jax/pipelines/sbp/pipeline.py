"""Synthetic bootstrapped pretraining as a list of stages (arXiv 2509.15248).

  documents -> tokenizer -> tokens -> seed -> embeddings -> pairs -> synthesizer -> samples
            -> synthetic -> arms

Every arm trains from scratch on a mixture of real data (`unique`, `oracle`) and synthetic sources:
`sbp`, and the controls `unconditional` (samples of the seed model) and `random_pairs` (samples of a
synthesizer that is tuned on random pairs).
"""

import dataclasses

# The module. Once the package is imported, its name `stages` is the function below.
import selfimprove_jax.pipelines.sbp.stages as sbp
from selfimprove_jax.pipelines.common import models, planning, text
from selfimprove_jax.pipelines.sbp.config import (
  SYNTHETIC,
  TUNED_ON,
  ArmConfig,
  Config,
  SeedPretrainingConfig,
)
from selfimprove_jax.retrieval.embedding import TfidfSvdConfig
from selfimprove_jax.runs.stage import Plan, Stage

_READ = {"tokens": "tokens", "tokenizer": "tokenizer"}


def stages(config: Config) -> list[Stage]:
  """Returns the stages that the arms need, each after those it reads."""
  c = config
  used = {source for arm in c.arms.values() for source in arm.mixture}
  sources = [source for source in SYNTHETIC if source in used]
  made = [
    Stage("documents", text.documents, text.DocumentsConfig(corpus=c.corpus, seed=c.split_seed)),
    Stage("tokenizer", text.tokenizer, c.tokenizer, {"documents": "documents"}),
    Stage(
      "tokens",
      text.rows,
      text.RowsConfig(seq_len=c.seq_len, **vars(c.tokens)),
      {"documents": "documents", "tokenizer": "tokenizer"},
      Plan(tokens=c.tokens.oracle_tokens),
    ),
    _pretraining("seed", c, c.seed_model, c.seed_model.total_tokens),
  ]
  if any(source in TUNED_ON for source in sources):
    made += [_embeddings(c), _pairs(c)]
  for source in sources:
    made += _synthesis(c, source)
  return [*made, *(_arm(c, name) for name in c.arms)]


def all_in_stages(arm: str, config: Config) -> list[str]:
  """Returns the stages whose FLOPs an arm needs: seed, embedding, tuning, sampling, itself."""
  names = []
  for source in config.arms[arm].mixture:
    if source in SYNTHETIC:
      names.append("seed")
      if source in TUNED_ON:
        names += ["embeddings", f"synthesizer/{TUNED_ON[source]}"]
      names.append(f"samples/{source}")
  return [*dict.fromkeys(names), f"arms/{arm}"]


def _embeddings(c: Config) -> Stage:
  if isinstance(c.embeddings, TfidfSvdConfig):
    tfidf = sbp.TfidfEmbeddingsConfig(dim=c.embeddings.dim, seed=c.seed)
    return Stage("embeddings", sbp.tfidf_embeddings, tfidf, _READ)
  by_model = sbp.ModelEmbeddingsConfig(
    mesh=c.mesh, batch_size=c.embeddings.batch_size, seq_len=c.seq_len
  )
  inputs = {**_READ, "seed": "seed"}
  return Stage("embeddings", sbp.model_embeddings, by_model, inputs, uses_devices=True)


def _pairs(c: Config) -> Stage:
  pairs = sbp.PairsStageConfig(
    **vars(c.pairs), pair_tokens=c.pair_tokens, shingle_size=c.shingle_size, seed=c.seed
  )
  return Stage("pairs", sbp.pairs, pairs, {**_READ, "embeddings": "embeddings"})


def _synthesis(c: Config, source: str) -> list[Stage]:
  made, model = [], "seed"
  if source in TUNED_ON:
    model = f"synthesizer/{TUNED_ON[source]}"
    made.append(_synthesizer(c, TUNED_ON[source]))
  sampling = sbp.SamplesStageConfig(
    **vars(c.synthesis), conditional=source in TUNED_ON, seed=c.seed
  )
  sampled = c.synthesis.target_tokens
  rows = sbp.SyntheticRowsStageConfig(
    **vars(c.synthetic_rows), seq_len=c.seq_len, shingle_size=c.shingle_size, seed=c.seed
  )
  made += [
    Stage(
      f"samples/{source}",
      sbp.samples,
      sampling,
      {**_READ, "model": model},
      Plan(sampled, sampled * c.model.forward_flops_per_token(c.seq_len)),
      uses_devices=True,
    ),
    Stage(
      f"synthetic/{source}", sbp.synthetic_rows, rows, {**_READ, "samples": f"samples/{source}"}
    ),
  ]
  if source == "sbp":
    relevance = sbp.RelevanceStageConfig(**vars(c.relevance), seed=c.seed)
    inputs = {"tokens": "tokens", "pairs": "pairs", "synthetic": "synthetic/sbp"}
    made.append(Stage("relevance", sbp.relevance, relevance, inputs))
  return made


def _synthesizer(c: Config, pairs: str) -> Stage:
  tuning = sbp.SynthesizerStageConfig(
    **vars(c.synthesizer),
    pairs=pairs,
    mesh=c.mesh,
    evaluation=c.evaluation,
    seq_len=c.pair_tokens,
    seed=c.seed,
  )
  return Stage(
    f"synthesizer/{pairs}",
    sbp.synthesizer,
    tuning,
    {**_READ, "seed": "seed", "pairs": "pairs"},
    planning.training_plan(c.model, None, c.pair_tokens),
    uses_devices=True,
  )


def _pretraining(
  name: str, c: Config, run: SeedPretrainingConfig | ArmConfig, total_tokens: int
) -> Stage:
  """Returns the stage that pretrains a model from scratch."""
  model = dataclasses.replace(c.model, dropout_rate=run.dropout_rate)
  pretraining = models.PretrainConfig(
    model=model,
    mesh=c.mesh,
    training=c.training,
    seq_len=c.seq_len,
    num_steps=total_tokens // (c.training.batch_rows * c.seq_len),
    mixture=run.mixture,
    weight_decay=run.weight_decay,
    evaluation=c.evaluation,
    seed=c.seed,
  )
  inputs = {**_READ, **{s: f"synthetic/{s}" for s in run.mixture if s in SYNTHETIC}}
  plan = planning.training_plan(model, total_tokens, c.seq_len)
  return Stage(name, models.pretrain, pretraining, inputs, plan, uses_devices=True)


def _arm(c: Config, name: str) -> Stage:
  arm = c.arms[name]
  stage = _pretraining(f"arms/{name}", c, arm, c.total_tokens)
  if arm.all_in_of is None:
    return stage
  costs = {f"cost_{i}": cost for i, cost in enumerate(all_in_stages(arm.all_in_of, c)[:-1])}
  return dataclasses.replace(
    stage,
    function=models.pretrain_all_in,
    config=models.PretrainAllInConfig(**vars(stage.config), matched_inputs=tuple(costs)),
    inputs={**stage.inputs, **costs},
    plan=Plan(state_bytes=stage.plan.state_bytes),  # the costs are known when those stages are done
  )
