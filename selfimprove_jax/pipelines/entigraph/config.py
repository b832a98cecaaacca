"""Configures synthetic continued pretraining."""

from typing import Annotated, Literal

from pydantic import Field

from selfimprove_jax.data.decontamination import DecontaminationConfig
from selfimprove_jax.data.tokenizer import SpecialTokens
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.common import benchmarks, planning
from selfimprove_jax.pipelines.common.benchmarks import BenchmarksConfig
from selfimprove_jax.pipelines.common.models import EvaluationConfig
from selfimprove_jax.pipelines.common.text import CorpusConfig
from selfimprove_jax.pipelines.entigraph.arms import ArmConfig
from selfimprove_jax.pipelines.entigraph.generators import GeneratorConfig
from selfimprove_jax.pipelines.entigraph.open_book import OpenBookConfig
from selfimprove_jax.pipelines.entigraph.questions import QuestionsConfig
from selfimprove_jax.pipelines.entigraph.sources import SourcesConfig
from selfimprove_jax.pipelines.entigraph.synthesis import SynthesisConfig
from selfimprove_jax.runs.runner import RuntimeConfig
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import MeshConfig
from selfimprove_jax.training.config import TrainingConfig

_Seed = Annotated[int, Field(ge=0, lt=2**32)]
_Count = Annotated[int, Field(ge=1)]


@section
class InitialConfig:
  """Names the pretrained checkpoint that every arm starts from.

  Attributes:
    path: a Hugging Face folder, a GGUF file, or an orbax folder of `save_params`.
    special_tokens: tokens that the tokenizer does not define itself.
  """

  path: str
  special_tokens: SpecialTokens = SpecialTokens()


@section
class CorporaConfig:
  """Configures the corpora that arms train on.

  Attributes:
    max_piece_chars: source documents are cut at paragraphs into pieces of at most this, each with
      the title before it; None leaves them whole. Longer paragraphs and synthetic texts are not
      cut.
    max_tokens_per_document: synthetic tokens of a corpus per source document, as the generator
      counts them; None takes all.
    batch_documents: texts to tokenize at a time.
  """

  max_piece_chars: _Count | None = None
  max_tokens_per_document: _Count | None = None
  batch_documents: _Count = 1000


@section
class Config:
  """Configures the pipeline.

  Attributes:
    seed: seeds the synthesis and the order of texts.
    training_seeds: every arm is trained once with each.
    sources: the source documents whose knowledge the model should acquire.
    generator: the model that writes synthetic text about them.
    replay: text like the pretraining data, mixed in against forgetting. Its held-out documents
      measure what was forgotten.
    replay_tokens: the first documents of the replay text up to this are used.
    arms: name -> arm. Each is compared with the initial model.
    questions: closed-book questions to the initial model and to each arm.
    open_book: the same questions after passages that were found for them.
    benchmarks: scored with the initial model and with each arm: what was forgotten.
    decontamination: of the synthetic texts and the replay; see `checked_against`.
    model: the model to train; the checkpoint must have its shape.
    training: one setting for all arms.
  """

  pipeline: Literal["entigraph"]
  title: str
  runtime: RuntimeConfig
  seed: _Seed
  training_seeds: Annotated[tuple[_Seed, ...], Field(min_length=1)] = (0,)
  seq_len: Annotated[int, Field(ge=2)]
  mesh: MeshConfig
  sources: SourcesConfig
  generator: GeneratorConfig
  synthesis: SynthesisConfig
  corpora: CorporaConfig
  initial: InitialConfig
  replay: CorpusConfig
  replay_tokens: _Count
  arms: Annotated[dict[str, ArmConfig], Field(min_length=1)]
  model: LlamaConfig
  training: TrainingConfig
  weight_decay: Annotated[float, Field(ge=0)]
  evaluation: EvaluationConfig
  questions: QuestionsConfig
  open_book: OpenBookConfig
  benchmarks: BenchmarksConfig = BenchmarksConfig()
  decontamination: DecontaminationConfig = DecontaminationConfig()

  def __post_init__(self) -> None:
    if self.model.dropout_rate:
      raise ValueError(f"model.dropout_rate={self.model.dropout_rate} must be 0: arms have none")
    self.benchmarks.check_length(self.seq_len)
    for name, arm in self.arms.items():
      if name == "initial" or not name or set(name) & set("/ "):
        raise ValueError(
          f"arms.{name}: an arm needs a name without slashes and spaces, other than initial, which "
          f"is the model before training"
        )
      planning.check_has_steps(
        f"arms.{name}.target_tokens", arm.target_tokens, self.training, self.seq_len
      )
      self._check_is_written(name, arm)

  def _check_is_written(self, name: str, arm: ArmConfig) -> None:
    """Raises ValueError if the synthesis writes no texts for a corpus that an arm reads."""
    c = self.synthesis
    needed = {
      "rephrase": (
        c.rephrase_samples and set(c.rephrase_styles) - {"qa"},
        "rephrase_samples above 0, with a style other than 'qa' in synthesis.rephrase_styles",
      ),
      "qa": (
        c.rephrase_samples and "qa" in c.rephrase_styles,
        "rephrase_samples above 0, with 'qa' in synthesis.rephrase_styles",
      ),
      "spa": (c.spa_samples, "spa_samples above 0"),
      "active_reading": (c.active_reading_samples, "active_reading_samples above 0"),
      "focal": (c.focal_samples, "focal_samples above 0"),
    }
    for corpus in (*arm.corpora, arm.early_stopping):
      is_written, knob = needed.get(corpus, (True, ""))
      verb = "trains on" if corpus in arm.corpora else "is validated on"
      if not is_written:
        raise ValueError(
          f"arms.{name} {verb} {corpus!r}, which the synthesis does not write: raise "
          f"synthesis.{knob}"
        )

  @property
  def checked_against(self) -> DecontaminationConfig | None:
    """The benchmarks that training text is checked against; None for none."""
    return benchmarks.decontamination(self.decontamination, self.benchmarks)
