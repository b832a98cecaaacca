"""The model that writes synthetic text: a local one, an endpoint, or recorded replies."""

import hashlib
import pathlib
from collections.abc import Container, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.language_models import LanguageModel
from selfimprove_jax.language_models.local import ComputeConfig
from selfimprove_jax.language_models.transcript import TranscriptModel
from selfimprove_jax.pipelines.common import checkpoints, endpoints
from selfimprove_jax.pipelines.common.endpoints import EndpointConfig
from selfimprove_jax.pipelines.entigraph.sources import read_documents
from selfimprove_jax.runs import storage
from selfimprove_jax.runs.artifacts import Artifact, ArtifactError
from selfimprove_jax.runs.stage import Context, Stage
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import LocalMeshConfig
from selfimprove_jax.sampling.engine import EngineConfig
from selfimprove_jax.synthesis import recorded
from selfimprove_jax.synthesis.prompts import PromptSet
from selfimprove_jax.synthesis.records import GenerationConfig
from selfimprove_jax.synthesis.synthesizer import Synthesizer
from selfimprove_jax.synthesis.units import Unit

_TRANSCRIPT = "transcript.jsonl"


@section
class RecordedGenerator:
  """Replays texts that a model wrote elsewhere; units without a recorded text are left out.

  Attributes:
    folder: one subfolder per source document; see `synthesis.recorded`.
    name: the name of the model in the records.
  """

  kind: Literal["recorded"] = "recorded"
  folder: str
  name: str = "a large language model"


@section
class TranscriptGenerator:
  """Replays a transcript of requests and replies; a request that it lacks is an error."""

  kind: Literal["transcript"] = "transcript"
  path: str


@section
class LocalGenerator:
  """Runs a checkpoint on this machine; `path` is that of `CheckpointConfig`."""

  kind: Literal["local"] = "local"
  path: str
  mesh: LocalMeshConfig = LocalMeshConfig()
  compute: ComputeConfig = ComputeConfig()
  engine: EngineConfig


@section
class EndpointGenerator:
  """Asks an OpenAI-compatible endpoint (extra `endpoint`).

  Attributes:
    url: its address, such as https://HOST/v1.
    is_free: confirms that its calls cost nothing, where no price is given.
  """

  kind: Literal["endpoint"] = "endpoint"
  url: str
  endpoint: EndpointConfig
  is_free: bool = False

  def __post_init__(self) -> None:
    if not self.endpoint.model:
      raise ValueError(f"endpoint.model={self.endpoint.model!r} must name the model at {self.url}")
    priced = self.endpoint.input_usd_per_million or self.endpoint.output_usd_per_million
    if not priced and not self.is_free:
      raise ValueError(
        f"endpoint.input_usd_per_million=0 and output_usd_per_million=0: give the prices of "
        f"{self.endpoint.model} at {self.url}, or set is_free=True if it costs nothing"
      )


GeneratorConfig = Annotated[
  RecordedGenerator | TranscriptGenerator | LocalGenerator | EndpointGenerator,
  Field(discriminator="kind"),
]


@section
class RecordedStageConfig(RecordedGenerator):
  """Configures the stage `generator` for recorded texts."""

  prompts: str
  generation: GenerationConfig


def generator_stage(config: GeneratorConfig, prompts: str, generation: GenerationConfig) -> Stage:
  """Returns the stage `generator`, which records what the synthesis is made with."""
  if isinstance(config, RecordedGenerator):
    made = RecordedStageConfig(**vars(config), prompts=prompts, generation=generation)
    return Stage("generator", write_transcript, made, {"sources": "sources"})
  if isinstance(config, TranscriptGenerator):
    return Stage("generator", record_transcript, config)
  if isinstance(config, LocalGenerator):
    path = checkpoints.CheckpointConfig(path=config.path)
    return Stage("generator", checkpoints.checkpoint, path)
  address = endpoints.AddressConfig(url=config.url, model=config.endpoint.model)
  return Stage("generator", endpoints.endpoint, address)


def write_transcript(context: Context, config: RecordedStageConfig) -> dict[str, Any]:
  """Turns recorded texts into a transcript that the requests of the synthesis find.

  Raises:
    ValueError: the folder has no recorded texts of the source documents.
  """
  documents = read_documents(context.inputs["sources"])
  prompts = PromptSet.load(config.prompts)
  synthesizer = Synthesizer(documents, prompts, config.generation, config.name)
  if not context.writer.has(_TRANSCRIPT):
    with context.writer.shard(_TRANSCRIPT) as (path, counts):
      counts["records"] = recorded.write_transcript(
        path,
        recorded_texts(config.folder, {document.id for document in documents}),
        synthesizer.make_request,
        config.name,
      )
  num_texts = context.writer.counts(_TRANSCRIPT)["records"]
  if not num_texts:
    raise ValueError(
      f"generator.folder={config.folder!r} has no recorded texts of the documents "
      f"{', '.join(document.id for document in documents)}"
    )
  return {"texts": num_texts, "model": config.name}


def recorded_texts(folder: str, documents: Container[str]) -> Iterator[tuple[Unit, str]]:
  """Yields the recorded texts about some documents."""
  root = pathlib.Path(folder)
  if not root.is_dir():
    raise ValueError(f"generator.folder={folder!r} is not a folder")
  folders = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
  for subfolder in sorted(folders):
    yield from (item for item in recorded.read_recorded(subfolder) if item[0].document in documents)


def record_transcript(context: Context, config: TranscriptGenerator) -> dict[str, Any]:
  """Records the digest of a transcript, so that a later change of it is noticed."""
  del context  # the artifact is its summary
  return {"path": config.path, "sha256": _sha256(config.path)}


def open_generator(config: GeneratorConfig, artifact: Artifact) -> LanguageModel:
  """Returns the model that writes synthetic text.

  Raises:
    ArtifactError: the transcript or the checkpoint has changed since the run began.
  """
  if isinstance(config, RecordedGenerator):
    return TranscriptModel(artifact.path(_TRANSCRIPT))
  if isinstance(config, TranscriptGenerator):
    if _sha256(config.path) != artifact.summary["sha256"]:
      raise ArtifactError(f"{config.path} has changed since the run began; use another workdir")
    return TranscriptModel(config.path)
  if isinstance(config, LocalGenerator):
    return checkpoints.load_model(artifact, config.mesh, config.compute, config.engine)
  return endpoints.connect(config.url, config.endpoint)


def recorded_ids(config: GeneratorConfig, artifact: Artifact) -> frozenset[str] | None:
  """Returns the ids of the units that can be answered; None if all can."""
  if not isinstance(config, RecordedGenerator):
    return None
  return recorded.recorded_ids(artifact.path(_TRANSCRIPT))


def _sha256(path: str) -> str:
  digest = hashlib.sha256()
  with storage.path(path).open("rb") as file:
    while block := file.read(1 << 20):
      digest.update(block)
  return digest.hexdigest()
