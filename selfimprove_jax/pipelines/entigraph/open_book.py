"""The stage `passages`: finds passages of the source documents for every question."""

import itertools
from typing import Annotated, Any

from pydantic import Field

from selfimprove_jax.data.sources import SourceDocument, SourceQuestion
from selfimprove_jax.evaluation import qa
from selfimprove_jax.evaluation.tasks import metrics
from selfimprove_jax.language_models import LanguageModel, ScoreRequest
from selfimprove_jax.language_models.local import ComputeConfig
from selfimprove_jax.pipelines.common import checkpoints
from selfimprove_jax.pipelines.entigraph.sources import read_documents
from selfimprove_jax.retrieval import rag
from selfimprove_jax.retrieval.rag import RagConfig, Retrieved
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section
from selfimprove_jax.runtime.partitioning import LocalMeshConfig
from selfimprove_jax.sampling.engine import EngineConfig

_Count = Annotated[int, Field(ge=1)]
_RECALL_AT = (1, 2, 4, 8)


@section
class OpenBookConfig:
  """Configures open-book questions.

  Attributes:
    num_passages: passages before a question, the best one last; 0 asks no open-book questions.
    num_candidates: passages found by their embeddings.
    reranks: the initial model orders the candidates, by how likely the question is after each;
      otherwise the order of the embeddings stays.
  """

  rag: RagConfig
  num_passages: Annotated[int, Field(ge=0)]
  num_candidates: _Count = 16
  reranks: bool = False

  def __post_init__(self) -> None:
    if self.num_passages > self.num_candidates:
      raise ValueError(
        f"num_passages={self.num_passages} must be at most num_candidates={self.num_candidates}"
      )


@section
class PassagesStageConfig(OpenBookConfig):
  """Configures the stage `passages`; the model's settings are for reranking."""

  mesh: LocalMeshConfig
  compute: ComputeConfig
  engine: EngineConfig
  seed: int


def passages(context: Context, config: PassagesStageConfig) -> dict[str, Any]:
  """Finds passages for the test questions among those of all documents.

  A question's choices are part of its query, as in the paper, in every format. The right answer is
  one of them, so passages for short answers are easier to find than by the question alone.

  Returns:
    The number of `chunks` and of `questions`; `recall_at_k`: k -> share of the questions with a
    passage of their document among the first k; and `answered_at_k`: k -> share of the questions
    with short answers, one of which is in the first k passages.
  """
  documents = read_documents(context.inputs["sources"])
  asked = [
    (document, question)
    for document in read_documents(context.inputs["sources"], "test")
    for question in document.questions
  ]
  index = rag.build_index(documents, config.rag, seed=config.seed)
  queries = [qa.retrieval_query(document, question) for document, question in asked]
  found = index.retrieve(queries, config.num_candidates)
  if config.reranks:
    model = checkpoints.load_model(
      context.inputs["initial"], config.mesh, config.compute, config.engine
    )
    found = rag.rerank(queries, found, _likelihoods(model), config.num_candidates)
  context.writer.write_jsonl(
    "passages.jsonl",
    (
      {
        "question": question.id,
        "document": document.id,
        "passages": [one.chunk.text for one in reversed(best[: config.num_passages])],
      }
      for (document, question), best in zip(asked, found, strict=True)
    ),
  )
  gold = [document.id for document, _ in asked]
  return {
    "chunks": len(index.chunks),
    "questions": len(asked),
    "recall_at_k": {str(k): rag.recall_at_k(found, gold, k) for k in _RECALL_AT},
    "answered_at_k": {str(k): _answered(asked, found, k) for k in _RECALL_AT},
  }


def _likelihoods(model: LanguageModel) -> rag.Score:
  """Returns a scorer of passages: the log-likelihood of the question after the passage."""

  def score(pairs: Any) -> list[float]:
    requests = (
      ScoreRequest(context=f"{passage}\n\n", continuation=query) for query, passage in pairs
    )
    return [scored.logprob for scored in model.score(requests)]

  return score


def _answered(
  asked: list[tuple[SourceDocument, SourceQuestion]], found: list[list[Retrieved]], k: int
) -> float | None:
  hits = [
    any(
      metrics.contains(one.chunk.text, answer)
      for one, answer in itertools.product(best[:k], question.short_answers)
    )
    for (_, question), best in zip(asked, found, strict=True)
    if question.short_answers
  ]
  return sum(hits) / len(hits) if hits else None
