"""Configures continued pretraining."""

from typing import Annotated, Literal

from pydantic import Field

from selfimprove_jax.data.decontamination import DecontaminationConfig
from selfimprove_jax.data.tokenizer import SpecialTokens, TokenizerConfig
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.common import benchmarks, planning
from selfimprove_jax.pipelines.common.benchmarks import BenchmarksConfig
from selfimprove_jax.pipelines.common.export import ExportConfig
from selfimprove_jax.pipelines.common.models import EvaluationConfig
from selfimprove_jax.pipelines.common.text import CorpusConfig
from selfimprove_jax.pipelines.continued_pretraining.stages import TuningConfig
from selfimprove_jax.runs.runner import RuntimeConfig
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.training.config import TrainingConfig

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1)]


@section
class CheckpointInitialConfig:
  """Starts from a pretrained checkpoint, with its own tokenizer.

  Attributes:
    path: a Hugging Face folder, a GGUF file, or an orbax folder of `save_params`.
    special_tokens: tokens that the tokenizer does not define itself.
  """

  kind: Literal["checkpoint"] = "checkpoint"
  path: str
  special_tokens: SpecialTokens = SpecialTokens()


@section
class PretrainInitialConfig:
  """Starts from a model and a tokenizer that are first trained on the replay text."""

  kind: Literal["pretrain"] = "pretrain"
  tokenizer: TokenizerConfig
  training: TrainingConfig
  total_tokens: Count
  weight_decay: Annotated[float, Field(ge=0)]
  dropout_rate: Annotated[float, Field(ge=0, lt=1)]


InitialConfig = Annotated[
  CheckpointInitialConfig | PretrainInitialConfig, Field(discriminator="kind")
]


@section
class TokensConfig:
  """Configures token budgets of the two corpora; see `text.RowsConfig`.

  Each corpus uses its first documents up to the budget, or all. Their order is random, so a smaller
  budget is a random part of a larger one (the scaling curves of the paper).
  """

  new_text_tokens: Count
  replay_tokens: Count
  batch_documents: Count


@section
class Config:
  """Configures the pipeline.

  Attributes:
    seed: seeds the training runs.
    split_seed: seeds the choice of held-out documents; runs that differ only in `seed` are scored
      on the same documents.
    new_text, replay: a corpus may be trained on whole, with `split.validation_fraction` and
      `split.test_fraction` of 0; then nothing is measured on it.
    benchmarks: scored with the initial and with the tuned model; `at_checkpoints` scores those of
      continued pretraining.
    decontamination: of both corpora; see `checked_against`.
    model: the model to train; a checkpoint must have its shape.
    training: continued pretraining; `initial.training` configures the pretraining before it.
  """

  pipeline: Literal["continued_pretraining"]
  title: str
  runtime: RuntimeConfig
  seed: Seed
  split_seed: Seed
  seq_len: Annotated[int, Field(ge=2)]
  mesh: MeshConfig
  initial: InitialConfig
  new_text: CorpusConfig
  replay: CorpusConfig
  benchmarks: BenchmarksConfig = BenchmarksConfig()
  decontamination: DecontaminationConfig = DecontaminationConfig()
  tokens: TokensConfig
  model: LlamaConfig
  training: TrainingConfig
  tuning: TuningConfig
  evaluation: EvaluationConfig
  export: ExportConfig

  def __post_init__(self) -> None:
    planning.check_model(self.model, dropout_knob="tuning.dropout_rate")
    self.benchmarks.check_length(self.seq_len)
    for name, corpus in self.corpora.items():
      held_out = corpus.split.validation_fraction
      planning.check_validates(f"{name}.split", held_out, self._trainings[name])
    if isinstance(self.initial, PretrainInitialConfig):
      planning.check_vocabulary("initial.tokenizer", self.initial.tokenizer, self.model)
      planning.check_has_steps(
        "initial.total_tokens", self.initial.total_tokens, self.initial.training, self.seq_len
      )

  @property
  def _trainings(self) -> dict[str, dict[str, TrainingConfig]]:
    """The trainings that are validated on each corpus, by their paths."""
    initial = self.initial
    pretraining = isinstance(initial, PretrainInitialConfig)
    return {
      "new_text": {"training": self.training},
      "replay": {"initial.training": initial.training} if pretraining else {},
    }

  @property
  def checked_against(self) -> DecontaminationConfig | None:
    """The benchmarks that training text is checked against; None for none."""
    return benchmarks.decontamination(self.decontamination, self.benchmarks)

  @property
  def corpora(self) -> dict[str, CorpusConfig]:
    """Both corpora by the names of their stages."""
    return {"new_text": self.new_text, "replay": self.replay}
