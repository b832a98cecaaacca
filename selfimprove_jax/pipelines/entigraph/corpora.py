"""Stages that turn source documents and synthetic texts into corpora to train on."""

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.data import shingles
from selfimprove_jax.data.corpora import Document
from selfimprove_jax.data.decontamination import (
  DecontaminationConfig,
  Findings,
  ItemText,
  open_benchmarks,
)
from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.data.split import SplitConfig
from selfimprove_jax.pipelines.common import text
from selfimprove_jax.pipelines.entigraph.sources import read_documents
from selfimprove_jax.retrieval.embedding import TextEmbeddingConfig, TfidfSvdConfig, text_embedder
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section
from selfimprove_jax.synthesis.diversity import measure

Corpus = Literal["raw", "entigraph", "rephrase", "qa", "spa", "active_reading", "focal"]

STEPS: dict[str, tuple[str, ...]] = {
  "raw": (),
  "entigraph": ("entities", "relations"),
  "rephrase": ("rephrasings",),
  "qa": ("rephrasings",),
  "spa": ("spa",),
  "active_reading": ("active_reading",),
  "focal": ("focal",),
}
"""The steps of the synthesis whose records make a corpus."""

_LEAST_WORDS = 1000  # fewer tell nothing of a corpus
_PARAGRAPH = re.compile(r"\n\s*\n")


@section
class CorpusStageConfig:
  """Configures a corpus.

  Attributes:
    max_piece_chars: a source document is cut at paragraphs into pieces of at most this, each with
      the title before it; None leaves it whole. Longer paragraphs and synthetic texts are not cut.
    max_tokens_per_document: takes a document's synthetic texts in order up to about this; None
      takes all.
  """

  corpus: Corpus
  max_piece_chars: Annotated[int, Field(ge=1)] | None
  max_tokens_per_document: int | None
  seed: int
  decontamination: DecontaminationConfig


def documents(context: Context, config: CorpusStageConfig) -> dict[str, Any]:
  """Collects the texts of a corpus, in an order that a hash makes.

  A part of the order is a random part of the corpus, as the scaling curves need.
  """
  split = SplitConfig(
    num_shards=1,
    validation_fraction=0.0,
    test_fraction=0.0,
    max_passage_chars=10**9,
    min_passage_chars=1,
    order="document",
  )
  found = _sources(context, config) if config.corpus == "raw" else _synthetic(context, config)
  return text.write_documents(
    context,
    found,
    split,
    seed=config.seed,
    source=f"the corpus {config.corpus!r}",
    findings=_findings(context, config),
  )


def _findings(context: Context, config: CorpusStageConfig) -> Findings | None:
  """Returns the search for benchmarks' items and, in synthetic texts, for the test questions.

  A generator that knows such questions, or has one in view, may write them into its texts.
  """
  if config.decontamination.action == "off":
    return None
  questions: list[ItemText] = []
  if config.corpus != "raw":
    questions = [
      ItemText("source questions", question.id, question.question)
      for document in read_documents(context.inputs["sources"])
      for question in document.questions
    ]
  if not questions and config.decontamination.data_dir is None:
    return None
  return Findings(open_benchmarks(config.decontamination, questions), config.decontamination)


def _sources(context: Context, config: CorpusStageConfig) -> Iterator[Document]:
  for document in read_documents(context.inputs["sources"]):
    for number, piece in enumerate(pieces(document, config.max_piece_chars)):
      yield Document(f"{document.id}/{number}", document.id, piece)


def pieces(document: SourceDocument, max_chars: int | None) -> list[str]:
  """Cuts a document at its paragraphs; every piece begins with the title."""
  title = document.name
  if max_chars is None:
    return [f"{title}\n\n{document.text}"]
  made: list[str] = []
  for paragraph in _PARAGRAPH.split(document.text):
    if made and len(made[-1]) + 2 + len(paragraph) <= max_chars:
      made[-1] += f"\n\n{paragraph}"
    else:
      made.append(f"{title}\n\n{paragraph}")
  return made


def _synthetic(context: Context, config: CorpusStageConfig) -> Iterator[Document]:
  spent: dict[str, int] = {}
  for step in STEPS[config.corpus]:
    for record in context.inputs[step].records():
      document = record["document"]
      if "failure" in record or not _belongs(record["kind"], config.corpus):
        continue
      limit = config.max_tokens_per_document
      if limit is not None and spent.get(document, 0) >= limit:
        continue
      spent[document] = spent.get(document, 0) + record["usage"]["completion_tokens"]
      written = record["summary"] if record["kind"] == "entities" else record["text"]
      yield Document(record["id"], document, written)


def _belongs(kind: str, corpus: str) -> bool:
  """Tells whether a text is of a corpus; rephrasings as questions and answers have their own."""
  if corpus in ("rephrase", "qa"):
    return (kind == "rephrase/qa") == (corpus == "qa")
  return True


@section
class DiversityStageConfig:
  """Configures the stage `diversity`.

  Attributes:
    max_words: of each corpus, drawn at random; fewer if a corpus is smaller.
    embedding: for the distances between texts; fitted on those of all corpora.
  """

  max_words: Annotated[int, Field(ge=1)]
  embedding: TextEmbeddingConfig
  seed: int


def diversity(context: Context, config: DiversityStageConfig) -> dict[str, Any]:
  """Measures the diversity of synthetic corpora at equal numbers of words.

  Returns:
    `num_words`, and by corpus the measures of `synthesis.diversity.measure`; none if a corpus has
    too few words, and no distances if there are too few texts for the embedding.
  """
  documents = {d.id: d.text for d in read_documents(context.inputs["sources"])}
  texts = {
    name: [(r["group"], r["text"]) for r in text.split_records(artifact, "train")]
    for name, artifact in context.inputs.items()
    if name != "sources"
  }
  words = {
    name: sum(len(shingles.words(written)) for _, written in found) for name, found in texts.items()
  }
  num_words = min(config.max_words, *words.values())
  if num_words < _LEAST_WORDS:
    return {"num_words": num_words, "corpora": {}}
  everything = [written for found in texts.values() for _, written in found]
  embed = None
  # An SVD has fewer directions than there are texts.
  if not isinstance(config.embedding, TfidfSvdConfig) or config.embedding.dim < len(everything):
    embed = text_embedder(config.embedding, everything, seed=config.seed)
  options = {"num_words": num_words, "seed": config.seed, "embed": embed}
  measured = {name: measure(found, documents, **options) for name, found in texts.items()}
  return {
    "num_words": num_words,
    "corpora": {
      name: {key: value if math.isfinite(value) else None for key, value in found.items()}
      for name, found in measured.items()
    },
  }
