"""Synthetic continued pretraining as a list of stages (EntiGraph; arXiv 2409.07431).

  sources, generator -> entities -> relations          -> corpora/NAME/documents, .../rows -> arms
                        rephrasings, spa, strategies,
                        active_reading, focal
  initial -> tokenizer;  replay/documents -> replay/rows
  questions/FORMAT -> answers/MODEL/FORMAT;  passages -> open_questions/FORMAT -> open_answers/...

A generator writes many texts about a few source documents. Each arm continues the pretraining of
one checkpoint on a corpus (the documents themselves, rephrasings, EntiGraph's relations, or one of
its rivals) with replay. Every model is asked the documents' questions, without the documents and
after passages of them.
"""

import itertools

import selfimprove_jax.pipelines.entigraph.arms as arms
import selfimprove_jax.pipelines.entigraph.corpora as corpora
import selfimprove_jax.pipelines.entigraph.open_book as open_book
import selfimprove_jax.pipelines.entigraph.questions as questions
import selfimprove_jax.pipelines.entigraph.synthesis as synthesis
from selfimprove_jax.pipelines.common import benchmarks, initial, planning, text
from selfimprove_jax.pipelines.entigraph.arms import ArmConfig
from selfimprove_jax.pipelines.entigraph.config import Config
from selfimprove_jax.pipelines.entigraph.generators import generator_stage
from selfimprove_jax.pipelines.entigraph.sources import sources
from selfimprove_jax.runs.stage import Stage

_ALL = 10**15  # tokens: a corpus is used whole
_DIVERSITY_WORDS = 200_000
_STEP_INPUTS = {"relations": ("entities",), "active_reading": ("strategies",)}


def stages(config: Config) -> list[Stage]:
  """Returns the stages, each after those it reads."""
  c = config
  tokenizer = initial.TokenizerStageConfig(special_tokens=c.initial.special_tokens)
  start = initial.InitialStageConfig(path=c.initial.path, model=c.model)
  replay = text.DocumentsConfig(corpus=c.replay, seed=c.seed)
  return [
    Stage("sources", sources, c.sources),
    # First, so that a missing file is reported before anything is generated or trained.
    *benchmarks.examples_stages(c.benchmarks),
    *(_questions(c, f"questions/{name}", name) for name in c.questions.formats),
    Stage("initial", initial.initial, start),
    *_open_book(c),
    Stage("tokenizer", initial.tokenizer, tokenizer, {"initial": "initial"}),
    text.documents_stage("replay/documents", replay, c.checked_against),
    _rows(c, "replay", c.replay_tokens),
    generator_stage(c.generator, c.synthesis.prompts, c.synthesis.generation),
    *(_texts(c, step) for step in _steps(c)),
    *itertools.chain.from_iterable(_corpus(c, name) for name in corpora_names(c)),
    *_diversity(c),
    _initial_losses(c),
    *(_arm(c, name, arm, seed) for seed in c.training_seeds for name, arm in c.arms.items()),
    *_answers(c),
  ]


def models(config: Config) -> dict[str, str]:
  """Returns the stages of the initial model and of every trained model, by what they are called.

  A name is "initial", or ARM/SEED.
  """
  names = [f"{arm}/{seed}" for seed in config.training_seeds for arm in config.arms]
  return {"initial": "initial"} | {name: f"arms/{name}" for name in names}


def corpora_names(config: Config) -> list[str]:
  """Returns the corpora that arms train on or are validated on."""
  named = [
    corpus
    for arm in config.arms.values()
    for corpus in (*arm.corpora, arm.early_stopping)
    if corpus is not None
  ]
  return [name for name in corpora.STEPS if name in named]


def _steps(c: Config) -> list[str]:
  """Returns the steps of the synthesis that the corpora need, in order."""
  needed = {step for name in corpora_names(c) for step in corpora.STEPS[name]}
  needed |= {earlier for step in needed for earlier in _STEP_INPUTS.get(step, ())}
  order = ("entities", "relations", "rephrasings", "spa", "strategies", "active_reading", "focal")
  return [step for step in order if step in needed]


def _texts(c: Config, step: str) -> Stage:
  made = synthesis.TextsStageConfig(
    step=step, generator=c.generator, synthesis=c.synthesis, seed=c.seed
  )
  names = ("sources", "generator", *_STEP_INPUTS.get(step, ()))
  return Stage(
    step,
    synthesis.texts,
    made,
    {n: n for n in names},
    uses_devices=c.generator.kind == "local",
    # Replayed texts would fail again.
    failures=synthesis.FAILURES if c.generator.kind in ("local", "endpoint") else None,
  )


def _corpus(c: Config, name: str) -> list[Stage]:
  made = corpora.CorpusStageConfig(
    corpus=name,
    max_piece_chars=c.corpora.max_piece_chars,
    max_tokens_per_document=c.corpora.max_tokens_per_document,
    seed=c.seed,
    decontamination=c.checked_against or c.decontamination,
  )
  inputs = {step: step for step in ("sources", *corpora.STEPS[name])}
  documents = Stage(f"corpora/{name}/documents", corpora.documents, made, inputs)
  return [documents, _rows(c, f"corpora/{name}", _ALL)]


def _diversity(c: Config) -> list[Stage]:
  names = [name for name in corpora_names(c) if name != "raw"]
  if not names:
    return []
  made = corpora.DiversityStageConfig(
    max_words=_DIVERSITY_WORDS, embedding=c.open_book.rag.embedding, seed=c.seed
  )
  inputs = {"sources": "sources"} | {name: f"corpora/{name}/documents" for name in names}
  return [Stage("diversity", corpora.diversity, made, inputs)]


def _rows(c: Config, name: str, num_tokens: int) -> Stage:
  scored = {f"corpora/{arm.early_stopping}" for arm in c.arms.values()}
  rows = text.RowsConfig(
    seq_len=c.seq_len,
    unique_tokens=num_tokens,
    batch_documents=c.corpora.batch_documents,
    may_fall_short=True,
    scores_unique=name in scored,
  )
  inputs = {"documents": f"{name}/documents", "tokenizer": "tokenizer"}
  return Stage(f"{name}/rows", text.rows, rows, inputs)


def _arm(c: Config, name: str, arm: ArmConfig, seed: int) -> Stage:
  # How an arm is shown leaves its training valid.
  trained = {name: value for name, value in vars(arm).items() if name != "curve"}
  made = arms.ArmStageConfig(
    **trained,
    model=c.model,
    mesh=c.mesh,
    training=c.training,
    weight_decay=c.weight_decay,
    seq_len=c.seq_len,
    evaluation=c.evaluation,
    seed=seed,
  )
  inputs = {"initial": "initial", "tokenizer": "tokenizer", "replay": "replay/rows"}
  inputs |= {corpus: f"corpora/{corpus}/rows" for corpus in arm.corpora}
  if arm.early_stopping is not None:
    inputs[arm.early_stopping] = f"corpora/{arm.early_stopping}/rows"
  plan = planning.training_plan(c.model, arm.target_tokens, c.seq_len)
  return Stage(f"arms/{name}/{seed}", arms.arm, made, inputs, plan, uses_devices=True)


def _initial_losses(c: Config) -> Stage:
  made = arms.InitialLossesConfig(
    model=c.model, mesh=c.mesh, seq_len=c.seq_len, evaluation=c.evaluation
  )
  inputs = {"initial": "initial", "replay": "replay/rows"}
  return Stage("losses/initial", arms.initial_losses, made, inputs, uses_devices=True)


def _questions(c: Config, stage: str, name: str, **inputs: str) -> Stage:
  made = questions.QuestionsStageConfig(
    format=name, num_shots=c.questions.num_shots, num_samples=c.questions.num_samples
  )
  return Stage(stage, questions.questions, made, {"sources": "sources"} | inputs)


def _open_book(c: Config) -> list[Stage]:
  """Returns the stages that make open-book questions; none without passages."""
  if not c.open_book.num_passages:
    return []
  made = open_book.PassagesStageConfig(
    **vars(c.open_book),
    mesh=c.questions.mesh,
    compute=c.questions.compute,
    engine=c.questions.engine,
    seed=c.seed,
  )
  inputs = {"sources": "sources"} | ({"initial": "initial"} if c.open_book.reranks else {})
  found = {"passages": "passages"}
  return [
    Stage("passages", open_book.passages, made, inputs),
    *(_questions(c, f"open_questions/{name}", name, **found) for name in c.questions.formats),
  ]


def _answers(c: Config) -> list[Stage]:
  """Returns the stages that ask every model; last, since a loaded model takes memory."""
  asked = benchmarks.ScoresConfig(
    mesh=c.questions.mesh,
    compute=c.questions.compute,
    engine=c.questions.engine,
    examples_per_shard=c.questions.examples_per_shard,
  )
  books = {"answers": "questions"}
  if c.open_book.num_passages:
    books["open_answers"] = "open_questions"
  made = []
  for model, stage in models(c).items():
    made += [
      Stage(
        f"{answers}/{model}/{name}",
        benchmarks.scores,
        asked,
        {"checkpoint": stage, "examples": f"{examples}/{name}"},
        uses_devices=True,
      )
      for answers, examples in books.items()
      for name in c.questions.formats
    ]
    made += benchmarks.model_stages(
      c.benchmarks, stage, seq_len=c.seq_len, with_dynamics=model != "initial"
    )
  return made
