"""Synthetic bootstrapped pretraining as a list of stages (arXiv 2509.15248).

  documents -> tokenizer -> tokens -> seed -> embeddings -> pairs -> synthesizer -> samples
            -> synthetic -> arms

Every arm trains from scratch on a mixture of real data (`unique`, `oracle`) and synthetic sources:
`sbp`, and the controls `unconditional` (samples of the seed model) and `random_pairs` (samples of a
synthesizer that is tuned on random pairs). The second training of an arm, with another seed, is the
stage `arms/<arm>-2`; with `draws_anew` it reads `synthetic/<source>-2`, and so on. Benchmarks are
scored after all arms are trained (pipelines/common/benchmarks.py).
"""

import dataclasses
import hashlib
import itertools

# The module: after the package's import, its attribute `stages` is the function below.
import selfimprove_jax.pipelines.sbp.stages as sbp
from selfimprove_jax.pipelines.common import benchmarks, models, planning, text
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
  draws = _draws(c)
  made = [
    # First, so that a missing file is reported before anything is trained.
    *benchmarks.examples_stages(c.benchmarks),
    text.documents_stage(
      "documents",
      # Arms are compared over groups, which needs at least two.
      text.DocumentsConfig(corpus=c.corpus, seed=c.split_seed, min_test_groups=2),
      c.checked_against,
    ),
    Stage(
      "tokenizer",
      text.tokenizer,
      text.TokenizerStageConfig(**vars(c.tokenizer), unique_tokens=c.tokens.unique_tokens),
      {"documents": "documents"},
    ),
    Stage(
      "tokens",
      text.rows,
      text.RowsConfig(seq_len=c.seq_len, **vars(c.tokens)),
      {"documents": "documents", "tokenizer": "tokenizer"},
      Plan(tokens=c.tokens.oracle_tokens),
    ),
    _pretraining("seed", c, c.seed_model, c.seed_model.total_tokens, 0),
  ]
  if any(source in TUNED_ON for source in draws):
    made += [_embeddings(c), _pairs(c)]
  for source, num_draws in draws.items():
    for draw in range(num_draws):
      made += _synthesis(c, source, draw)
  arms = [_arm(c, name, k) for name, arm in c.arms.items() for k in range(arm.num_seeds)]
  scored = [benchmarks.model_stages(c.benchmarks, arm.name, seq_len=c.seq_len) for arm in arms]
  return [*made, *arms, *itertools.chain(*scored)]


def arm_stages(arm: str, config: Config) -> list[str]:
  """Returns the names of an arm's trainings."""
  return [numbered(f"arms/{arm}", k) for k in range(config.arms[arm].num_seeds)]


def numbered(name: str, k: int) -> str:
  """Returns the name of the `k`-th training or draw; the first has no number."""
  return f"{name}-{k + 1}" if k else name


def seed_of(seed: int, k: int) -> int:
  """Returns the seed of the `k`-th training or draw; the first has the run's own.

  The others are spread by a hash: with `seed + k`, runs of neighboring seeds would share trainings.
  """
  digest = hashlib.blake2b(f"{seed}/{k}".encode(), digest_size=4).digest()
  return int.from_bytes(digest) if k else seed


def all_in_stages(arm: str, config: Config) -> list[str]:
  """Returns the stages whose FLOPs an arm needs: seed, embedding, tuning, sampling, itself.

  Those of its first training.
  """
  names = []
  for source in (source for source in config.arms[arm].mixture if source in SYNTHETIC):
    tuning = ["embeddings", f"synthesizer/{TUNED_ON[source]}"] if source in TUNED_ON else []
    names += ["seed", *tuning, f"samples/{source}"]
  return [*dict.fromkeys(names), f"arms/{arm}"]


def _draws(c: Config) -> dict[str, int]:
  """Returns each synthetic source that is used, with how often it is drawn."""
  draws = {}
  for source in SYNTHETIC:
    users = [arm for arm in c.arms.values() if source in arm.mixture]
    if users:
      draws[source] = max(arm.num_seeds for arm in users) if c.draws_anew else 1
  return draws


def _embeddings(c: Config) -> Stage:
  e = c.embeddings
  if isinstance(e, TfidfSvdConfig):
    tfidf = sbp.TfidfEmbeddingsConfig(dim=e.dim, seed=c.seed)
    return Stage("embeddings", sbp.tfidf_embeddings, tfidf, _READ)
  model = sbp.ModelEmbeddingsConfig(mesh=c.mesh, batch_size=e.batch_size, seq_len=c.seq_len)
  inputs = {**_READ, "seed": "seed"}
  return Stage("embeddings", sbp.model_embeddings, model, inputs, uses_devices=True)


def _pairs(c: Config) -> Stage:
  pairs = sbp.PairsStageConfig(
    **vars(c.pairs), pair_tokens=c.pair_tokens, shingle_size=c.shingle_size, seed=c.seed
  )
  return Stage("pairs", sbp.pairs, pairs, {**_READ, "embeddings": "embeddings"})


def _synthesis(c: Config, source: str, draw: int) -> list[Stage]:
  made = [_synthesizer(c, TUNED_ON[source], draw)] if source in TUNED_ON else []
  sampling = sbp.SamplesStageConfig(
    **vars(c.synthesis), conditional=bool(made), seed=seed_of(c.seed, draw)
  )
  inputs = {**_READ, "model": made[0].name if made else "seed"}
  sampled = c.synthesis.target_tokens
  plan = Plan(sampled, sampled * c.model.forward_flops_per_token(c.seq_len))
  rows = sbp.SyntheticRowsStageConfig(
    **vars(c.synthetic_rows), seq_len=c.seq_len, shingle_size=c.shingle_size, seed=c.seed
  )
  pack = sbp.synthetic_rows
  if (checked := c.checked_against) is not None:
    pack = sbp.checked_synthetic_rows
    rows = sbp.CheckedSyntheticRowsStageConfig(**vars(rows), decontamination=checked)
  samples, synthetic = (numbered(f"{kind}/{source}", draw) for kind in ("samples", "synthetic"))
  made += [
    Stage(samples, sbp.samples, sampling, inputs, plan, uses_devices=True),
    Stage(synthetic, pack, rows, {**_READ, "samples": samples}),
  ]
  if source == "sbp" and not draw:
    relevance = sbp.RelevanceStageConfig(**vars(c.relevance), seed=c.seed)
    read = ("tokens", "embeddings", "pairs")
    inputs = {**{name: name for name in read}, "synthetic": "synthetic/sbp"}
    made.append(Stage("relevance", sbp.relevance, relevance, inputs))
  return made


def _synthesizer(c: Config, pairs: str, draw: int) -> Stage:
  tuning = sbp.SynthesizerStageConfig(
    **vars(c.synthesizer),
    pairs=pairs,
    mesh=c.mesh,
    evaluation=c.evaluation,
    seq_len=c.pair_tokens,
    seed=seed_of(c.seed, draw),
  )
  inputs = {**_READ, "seed": "seed", "pairs": "pairs"}
  plan = planning.training_plan(c.model, None, c.pair_tokens)
  name = numbered(f"synthesizer/{pairs}", draw)
  return Stage(name, sbp.synthesizer, tuning, inputs, plan, uses_devices=True)


def _pretraining(
  name: str, c: Config, run: SeedPretrainingConfig | ArmConfig, total_tokens: int, k: int
) -> Stage:
  """Returns the stage of the `k`-th training of a model from scratch."""
  model = dataclasses.replace(c.model, dropout_rate=run.dropout_rate)
  pretraining = models.PretrainConfig(
    model=model,
    mesh=c.mesh,
    training=c.training,
    seq_len=c.seq_len,
    total_targets=total_tokens,
    mixture=run.mixture,
    weight_decay=run.weight_decay,
    evaluation=c.evaluation,
    seed=seed_of(c.seed, k),
  )
  draw = k if c.draws_anew else 0
  sources = [source for source in run.mixture if source in SYNTHETIC]
  inputs = {**_READ, **{s: numbered(f"synthetic/{s}", draw) for s in sources}}
  plan = planning.training_plan(model, total_tokens, c.seq_len)
  return Stage(name, models.pretrain, pretraining, inputs, plan, uses_devices=True)


def _arm(c: Config, name: str, k: int) -> Stage:
  arm = c.arms[name]
  stage = _pretraining(numbered(f"arms/{name}", k), c, arm, c.total_tokens, k)
  if arm.all_in_of is None:
    return stage
  costs = {f"cost_{i}": cost for i, cost in enumerate(all_in_stages(arm.all_in_of, c)[:-1])}
  return dataclasses.replace(
    stage,
    function=models.pretrain_all_in,
    config=models.PretrainAllInConfig(**vars(stage.config), matched_inputs=tuple(costs)),
    inputs={**stage.inputs, **costs},
    plan=Plan(state_bytes=stage.plan.state_bytes),  # the costs are known once those stages ran
  )
