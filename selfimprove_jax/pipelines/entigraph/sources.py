"""The stage `sources`: source documents, their questions, and which documents are for tuning."""

import dataclasses
from typing import Annotated, Any

from pydantic import Field

from selfimprove_jax.data import sources as sources_lib
from selfimprove_jax.data.sources import SourceDocument, SourceDocumentsConfig, SourceQuestion
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section


@section
class SourcesConfig:
  """Names the source documents.

  Attributes:
    validation_fraction: share of the documents, by title, on whose questions settings may be
      tuned (the paper: 0.2). All other questions are the test.
  """

  documents: SourceDocumentsConfig
  validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0


def sources(context: Context, config: SourcesConfig) -> dict[str, Any]:
  """Reads the source documents and their questions.

  Raises:
    ValueError: as `data.sources.read_sources`; or no document has a question.
  """
  documents = sources_lib.read_sources(config.documents)
  held = set(sources_lib.split_sources(documents, config.validation_fraction).validation)
  context.writer.write_jsonl(
    "documents.jsonl",
    (
      {**dataclasses.asdict(document), "split": "validation" if document.id in held else "test"}
      for document in documents
    ),
  )
  return {
    "documents": len(documents),
    "validation_documents": len(held),
    "questions": sum(len(document.questions) for document in documents),
    "characters": sum(len(document.text) for document in documents),
  }


def read_documents(artifact: Artifact, split: str | None = None) -> list[SourceDocument]:
  """Returns the source documents of the stage; with `split`, those of "validation" or "test"."""
  return [
    _document(record) for record in artifact.records() if split is None or record["split"] == split
  ]


def _document(record: dict[str, Any]) -> SourceDocument:
  fields = {name: value for name, value in record.items() if name not in ("split", "questions")}
  questions = tuple(
    SourceQuestion(**{n: tuple(v) if isinstance(v, list) else v for n, v in question.items()})
    for question in record["questions"]
  )
  return SourceDocument(**fields, questions=questions)
