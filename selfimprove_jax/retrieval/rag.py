"""Finds passages of source documents for questions (arXiv 2409.07431, section 5 and appendix F).

  index = rag.build_index(documents, config, seed=0)
  found = index.retrieve(queries, config.search.num_neighbors)
  found = rag.rerank(queries, found, score, k=8)
  passages = {id_: [one.chunk.text for one in best] for id_, best in zip(ids, found)}

The paper splits documents into chunks of 1,024 characters, finds 128 of them for each question, and
keeps 8 after reranking (16 without its synthetic data). It embeds with text-embedding-3-large and
reranks with rerank-english-v3.0, two paid services. Here a language model can rerank, by how likely
the query is after the passage:

  def score(pairs):
    requests = (ScoreRequest(context=p + "\\n\\n", continuation=query) for query, p in pairs)
    return [scored.logprob for scored in model.score(requests)]

Axis letters: Q queries, C chunks, E embedding.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import numpy as np
from jaxtyping import Float
from pydantic import Field

from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.retrieval import ann, embedding
from selfimprove_jax.runtime.config import section

# Ends of pieces, coarse to fine: paragraphs, lines, sentences, words, characters.
_ENDS = tuple(
  re.compile(pattern)
  for pattern in (r"\n[^\S\n]*\n\s*", r"\n\s*", r"[.!?][\"'”’)\]]*\s+", r"\s+", r"(?s:.)")
)

Embed = Callable[[Sequence[str]], Float[np.ndarray, "C E"]]
Score = Callable[[Sequence[tuple[str, str]]], Sequence[float]]
"""Scores (query, passage) pairs; a better passage has a higher score."""


@section
class RagConfig:
  """Configures an index of source documents.

  Attributes:
    max_chars: of a chunk, without its heading.
  """

  max_chars: Annotated[int, Field(ge=1)] = 1024
  embedding: embedding.TextEmbeddingConfig
  search: ann.SearchConfig


@dataclasses.dataclass(frozen=True)
class Chunk:
  """A part of a document.

  Attributes:
    document: the document's id.
    text: the heading, which names the document, and the part.
  """

  document: str
  text: str


@dataclasses.dataclass(frozen=True)
class Retrieved:
  """A chunk found for a query; a higher score is better."""

  chunk: Chunk
  score: float


def chunks(document: SourceDocument, max_chars: int) -> list[Chunk]:
  """Splits a document into chunks that do not overlap, each under the document's title.

  A chunk ends with a paragraph where one ends in time, or else with a line, a sentence, or a word;
  only a word longer than a chunk is cut. White space between chunks is dropped.

  Args:
    max_chars: of a chunk, without its heading.

  Raises:
    ValueError: `max_chars` is not positive.
  """
  if max_chars < 1:
    raise ValueError(f"max_chars={max_chars} must be at least 1")
  by = f" by {document.author}" if document.author else ""
  year = f" ({document.year})" if document.year else ""
  heading = f'"{document.name}"{by}{year}\n'
  parts = (part.strip() for part in _split(document.text, max_chars, _ENDS))
  return [Chunk(document.id, heading + part) for part in parts if part]


def _split(text: str, max_chars: int, ends: Sequence[re.Pattern[str]]) -> Iterator[str]:
  """Splits by the coarsest pattern, joins what fits, and splits what is too long by the next one.

  As in LangChain's RecursiveCharacterTextSplitter, the last part of a long piece is not joined with
  the piece behind it.
  """
  start = end = 0
  stops = [match.end() for match in ends[0].finditer(text)]
  for stop in [*stops, len(text)]:
    if len(text[start:stop].strip()) > max_chars:
      if end > start:
        yield text[start:end]
      start = end
      if len(text[start:stop].strip()) > max_chars:
        yield from _split(text[start:stop].strip(), max_chars, ends[1:])
        start = stop
    end = stop
  if end > start:
    yield text[start:end]


@dataclasses.dataclass(frozen=True)
class Index:
  """Chunks and their embeddings; make it with `build_index`."""

  chunks: tuple[Chunk, ...]
  embed: Embed
  rows_CE: Float[np.ndarray, "C E"]
  search: ann.SearchConfig

  def retrieve(self, queries: Sequence[str], k: int) -> list[list[Retrieved]]:
    """Returns the `k` chunks nearest to each query, nearest first; all if there are fewer.

    Scores are cosines. A query with nothing to embed has cosine 0 to all and gets the first chunks.

    Raises:
      ValueError: `k` is not positive.
    """
    if k < 1:
      raise ValueError(f"k={k} must be at least 1")
    if not queries:
      return []
    search = dataclasses.replace(self.search, num_neighbors=min(k, len(self.chunks)))
    found = ann.find_neighbors(self.rows_CE, self.embed(queries), search)
    return [
      [
        Retrieved(self.chunks[id_], score)
        for id_, score in zip(ids, scores, strict=True)
        if id_ != ann.NO_NEIGHBOR
      ]
      for ids, scores in zip(found.ids_QM.tolist(), found.scores_QM.tolist(), strict=True)
    ]


def build_index(documents: Sequence[SourceDocument], config: RagConfig, *, seed: int) -> Index:
  """Splits documents into chunks and embeds them.

  Args:
    seed: of an embedder that is fitted; it is fitted on the chunks.

  Raises:
    ValueError: the documents have no text, or the embedder does not fit them.
  """
  made = tuple(chunk for document in documents for chunk in chunks(document, config.max_chars))
  if not made:
    raise ValueError(f"the {len(documents)} documents have no text to find passages in")
  texts = [chunk.text for chunk in made]
  embed = embedding.text_embedder(config.embedding, texts, seed=seed)
  return Index(made, embed, embed(texts), config.search)


def rerank(
  queries: Sequence[str], retrieved: Sequence[Sequence[Retrieved]], score: Score, k: int
) -> list[list[Retrieved]]:
  """Returns the `k` chunks of each query that `score` prefers, best first, with its scores.

  Equal scores keep the order of `retrieved`. `score` is called once, with the pairs of all queries.

  Raises:
    ValueError: `k` is not positive, or there is not one list per query, one score per pair, or a
      score is not a number.
  """
  if k < 1:
    raise ValueError(f"k={k} must be at least 1")
  if len(queries) != len(retrieved):
    raise ValueError(f"{len(queries)} queries have {len(retrieved)} lists of chunks")
  pairs = [
    (query, one.chunk.text)
    for query, found in zip(queries, retrieved, strict=True)
    for one in found
  ]
  scores = [float(value) for value in score(pairs)]
  if len(scores) != len(pairs):
    raise ValueError(f"{len(pairs)} pairs of query and passage got {len(scores)} scores")
  if any(math.isnan(value) for value in scores):
    at = next(index for index, value in enumerate(scores) if math.isnan(value))
    raise ValueError(f"the score of query {pairs[at][0]!r} is NaN")
  remaining = iter(scores)
  rescored = [[Retrieved(one.chunk, next(remaining)) for one in found] for found in retrieved]
  return [sorted(found, key=lambda one: -one.score)[:k] for found in rescored]


def recall_at_k(
  retrieved: Sequence[Sequence[Retrieved]], gold_documents: Sequence[str], k: int
) -> float:
  """Returns the share of queries with a chunk of the right document among the first `k`.

  Args:
    gold_documents: the id of each query's document.

  Raises:
    ValueError: there are no queries, or not one document per query.
  """
  if not gold_documents or len(retrieved) != len(gold_documents):
    raise ValueError(
      f"recall needs one document per query; there are {len(retrieved)} queries and "
      f"{len(gold_documents)} documents"
    )
  hits = [
    any(one.chunk.document == gold for one in found[:k])
    for found, gold in zip(retrieved, gold_documents, strict=True)
  ]
  return sum(hits) / len(hits)
