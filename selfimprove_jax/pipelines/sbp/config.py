"""Configures synthetic bootstrapped pretraining."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from selfimprove_jax.data.decontamination import DecontaminationConfig
from selfimprove_jax.data.tokenizer import TokenizerConfig
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.common import benchmarks, planning
from selfimprove_jax.pipelines.common.benchmarks import BenchmarksConfig
from selfimprove_jax.pipelines.common.models import REAL, EvaluationConfig
from selfimprove_jax.pipelines.common.text import CorpusConfig
from selfimprove_jax.pipelines.sbp.comparison import ComparisonConfig
from selfimprove_jax.pipelines.sbp.stages import (
  PairsConfig,
  SynthesisConfig,
  SynthesizerConfig,
  SyntheticRowsConfig,
)
from selfimprove_jax.retrieval.embedding import EmbeddingConfig
from selfimprove_jax.retrieval.pairs import NUM_SPECIAL_TOKENS
from selfimprove_jax.runs.runner import RuntimeConfig
from selfimprove_jax.runtime.config import choices, section
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.synthesis.data_quality import RelevanceConfig
from selfimprove_jax.training.config import TrainingConfig

TUNED_ON = {"sbp": "nearest", "random_pairs": "random"}
"""Synthetic sources that a synthesizer writes, and the pairs that it is tuned on."""
SYNTHETIC = ("sbp", "unconditional", "random_pairs")

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]


def _check_mixture(sources: tuple[str, ...]) -> Callable[[dict[str, float]], dict[str, float]]:
  def check(mixture: dict[str, float]) -> dict[str, float]:
    for name in mixture:
      if name not in sources:
        raise ValueError(f"there is no source {name!r}{choices(name, sources)}")
    if abs(sum(mixture.values()) - 1) > 1e-6:
      raise ValueError(f"the shares sum to {sum(mixture.values()):g} and must sum to 1")
    return mixture

  return check


Shares = dict[str, Annotated[float, Field(gt=0, le=1)]]


@section
class TokensConfig:
  """Configures token budgets of the real data; see `text.RowsConfig`."""

  unique_tokens: Count
  oracle_tokens: Count
  max_document_tokens: Count
  batch_documents: Count


@section
class SeedPretrainingConfig:
  """Configures the pretraining of the seed model, from which the synthesizer is tuned."""

  total_tokens: Count
  mixture: Annotated[Shares, AfterValidator(_check_mixture(REAL))]
  weight_decay: Decay
  dropout_rate: Dropout


@section
class ArmConfig:
  """Configures one arm of the comparison, a model that is pretrained from scratch.

  Attributes:
    label: its name in the report.
    num_seeds: trainings, each with another seed; two or more measure the noise of the seed.
    mixture: source -> share of the training tokens.
    all_in_of: name of another arm. Train for that arm's all-in FLOPs (which include its seed model,
      embedding, tuning and sampling) instead of on `total_tokens`.
  """

  label: str
  mixture: Annotated[Shares, AfterValidator(_check_mixture((*REAL, *SYNTHETIC)))]
  weight_decay: Decay
  dropout_rate: Dropout
  num_seeds: Count = 1
  all_in_of: str | None = None


@section
class Config:
  """Configures the pipeline.

  Attributes:
    seed: seeds training, pairing and sampling.
    split_seed: seeds the choice of held-out documents; runs that differ only in `seed` are scored
      on the same documents.
    seq_len: tokens of a training row.
    pair_tokens: tokens of a row of pairs, and so of the longest pair.
    shingle_size: words per shingle in the search for near-duplicate pairs and samples.
    total_tokens: tokens that each arm learns to predict; padding does not count.
    draws_anew: each further training of an arm has synthesizers and samples of its own, so that the
      measured noise includes theirs. Otherwise all trainings of an arm read the same samples.
    benchmarks: scored with the result of each training of an arm.
    decontamination: of the corpus and of the samples; see `checked_against`.
  """

  pipeline: Literal["sbp"]
  title: str
  runtime: RuntimeConfig
  seed: Seed
  split_seed: Seed
  seq_len: Annotated[int, Field(ge=2)]
  pair_tokens: Count
  shingle_size: Count
  total_tokens: Count
  draws_anew: bool = False
  mesh: MeshConfig
  corpus: CorpusConfig
  benchmarks: BenchmarksConfig = BenchmarksConfig()
  decontamination: DecontaminationConfig = DecontaminationConfig()
  tokenizer: TokenizerConfig
  tokens: TokensConfig
  model: LlamaConfig
  training: TrainingConfig
  seed_model: SeedPretrainingConfig
  embeddings: EmbeddingConfig
  pairs: PairsConfig
  synthesizer: SynthesizerConfig
  synthesis: SynthesisConfig
  synthetic_rows: SyntheticRowsConfig
  relevance: RelevanceConfig
  arms: dict[str, ArmConfig]
  evaluation: EvaluationConfig
  comparison: ComparisonConfig

  def __post_init__(self) -> None:
    planning.check_model(self.model, dropout_knob="arms.NAME.dropout_rate")
    planning.check_vocabulary("tokenizer", self.tokenizer, self.model)
    planning.check_holds_out("corpus.split", self.corpus.split)
    planning.check_has_steps("total_tokens", self.total_tokens, self.training, self.seq_len)
    seed_tokens = self.seed_model.total_tokens
    planning.check_has_steps("seed_model.total_tokens", seed_tokens, self.training, self.seq_len)
    self.benchmarks.check_length(self.seq_len)
    self._check_tokens()
    self._check_arms()

  @property
  def checked_against(self) -> DecontaminationConfig | None:
    """The benchmarks that training text is checked against; None for none."""
    return benchmarks.decontamination(self.decontamination, self.benchmarks)

  def _check_tokens(self) -> None:
    tokens, most = self.tokens, self.tokens.max_document_tokens
    if tokens.oracle_tokens < tokens.unique_tokens:
      raise ValueError(
        f"tokens.oracle_tokens={tokens.oracle_tokens} must be at least "
        f"tokens.unique_tokens={tokens.unique_tokens}: the oracle's data begin with the unique data"
      )
    if self.pair_tokens <= most + NUM_SPECIAL_TOKENS:
      raise ValueError(
        f"pair_tokens={self.pair_tokens} must be more than tokens.max_document_tokens={most} and "
        f"{NUM_SPECIAL_TOKENS} special tokens, or the longest documents fit into no pair"
      )
    longest = max(self.synthesis.prompt_buckets)
    if longest < most + 2:
      raise ValueError(
        f"synthesis.prompt_buckets={self.synthesis.prompt_buckets}: the longest must be at least "
        f"{most + 2}, which is BOS, tokens.max_document_tokens={most} and SEP"
      )

  def _check_arms(self) -> None:
    if "baseline" not in self.arms:
      raise ValueError("arms: there is no arm `baseline`, which the others are compared with")
    all_in = {name: arm.all_in_of for name, arm in self.arms.items() if arm.all_in_of is not None}
    for name, other in all_in.items():
      others = [arm for arm in self.arms if arm != name]
      if other not in others:
        raise ValueError(
          f"arms.{name}.all_in_of={other!r} must be another arm{choices(other, others)}"
        )
    for name, other in all_in.items():
      if other in all_in:
        raise ValueError(
          f"arms.{name}.all_in_of={other!r} must be an arm that trains on `total_tokens`"
        )
