"""Measures how diverse the texts of a synthetic corpus are, without a judging model.

EntiGraph (arXiv 2409.07431) explains why rephrased text teaches less by its lack of diversity. The
measures here are n-gram overlap with the source, as there, distinct n-grams, compression, and the
distances of embeddings. All of them depend on the amount of text, so corpora are compared at an
equal number of words.
"""

import collections
import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Integer

from selfimprove_jax.data import shingles

OVERLAP_SIZES = (2, 4, 8, 16)
NUM_BLOCKS = 10
MAX_EMBEDDED = 300

_DISTINCT_SIZE = 4
_WORDS_PER_RATE = 10_000
_MAX_NORM_ERROR = 1e-3

_Embed = Callable[[Sequence[str]], Float[np.ndarray, "N E"]]


def measure(
  texts: Sequence[tuple[str, str]],
  sources: Mapping[str, str],
  *,
  num_words: int,
  seed: int,
  embed: _Embed | None = None,
) -> dict[str, float]:
  """Measures the diversity of a sample of `num_words` words of a corpus.

  Draws texts at random without replacement and divides their words among `NUM_BLOCKS` blocks of
  equal size. Words are those of `shingles.words`, so each character of a script without spaces
  counts as one.

  Args:
    texts: id of the source document, and a text written about it.
    sources: text of each source document.
    num_words: must be equal for corpora that are compared.
    embed: texts -> unit rows; None leaves out the distance of embeddings.

  Returns:
    `source_overlap_N` for N of `OVERLAP_SIZES`, `distinct_4grams`, `compression_ratio` and, with
    `embed`, `embedding_distance`; see the functions below. Each has a standard error `..._stderr`:
    over blocks, which are drawn from one corpus, or over the embedded texts.

  Raises:
    ValueError: the corpus has fewer words, a source is missing, or rows are not of unit length.
  """
  if num_words < NUM_BLOCKS * _DISTINCT_SIZE:
    raise ValueError(f"num_words={num_words} must be at least {NUM_BLOCKS * _DISTINCT_SIZE}")
  if missing := sorted({document for document, _ in texts} - sources.keys()):
    raise ValueError(f"no source document {missing[0]!r}; texts name {len(missing)} missing ones")
  rng = np.random.default_rng(seed)
  blocks = _blocks(texts, rng.permutation(len(texts)), num_words // NUM_BLOCKS)
  found = {}
  for size, shares in source_overlaps(blocks, sources).items():
    found |= _mean(f"source_overlap_{size}", shares)
  found |= _mean("distinct_4grams", [distinct_rate(block) for block in blocks])
  found |= _mean("compression_ratio", [compression_ratio(block) for block in blocks])
  if embed is not None:
    chosen = rng.permutation(len(texts))[:MAX_EMBEDDED]
    distance, stderr = embedding_distance(embed([texts[index][1] for index in chosen]))
    found |= {"embedding_distance": distance, "embedding_distance_stderr": stderr}
  return found


@dataclasses.dataclass(frozen=True)
class Piece:
  """A text, or the part of it that fits in a block, with its words and its source document."""

  document: str
  text: str
  words: list[str]

  def cut(self, num_words: int) -> tuple["Piece", "Piece"]:
    """Returns the first words, and the rest."""
    # Lower-casing and normalization move words, so their place in the text is an estimate. Only
    # the compression of a block's last text depends on it.
    at = round(len(self.text) * num_words / len(self.words))
    first = Piece(self.document, self.text[:at], self.words[:num_words])
    return first, Piece(self.document, self.text[at:], self.words[num_words:])


def source_overlaps(
  blocks: Sequence[Sequence[Piece]], sources: Mapping[str, str]
) -> dict[int, list[float]]:
  """Returns the share of n-grams that occur in their own source document, by n and block.

  Counts every occurrence. A block whose texts are shorter than n words has no n-grams and is left
  out.
  """
  by_document = collections.defaultdict(list)
  for number, block in enumerate(blocks):
    for piece in block:
      by_document[piece.document].append((number, piece.words))
  hits, totals = (np.zeros((len(OVERLAP_SIZES), len(blocks)), int) for _ in range(2))
  for document, pieces in by_document.items():
    source = shingles.words(sources[document])
    for row, size in enumerate(OVERLAP_SIZES):
      in_source = set(_ngrams(source, size))
      for number, words in pieces:
        hits[row, number] += sum(ngram in in_source for ngram in _ngrams(words, size))
        totals[row, number] += max(0, len(words) - size + 1)
  return {
    size: (hits[row, totals[row] > 0] / totals[row, totals[row] > 0]).tolist()
    for row, size in enumerate(OVERLAP_SIZES)
  }


def distinct_rate(block: Sequence[Piece]) -> float:
  """Returns the distinct 4-grams of a block per 10,000 words; n-grams do not cross texts."""
  distinct = {ngram for piece in block for ngram in _ngrams(piece.words, _DISTINCT_SIZE)}
  return _WORDS_PER_RATE * len(distinct) / sum(len(piece.words) for piece in block)


def compression_ratio(block: Sequence[Piece]) -> float:
  """Returns bytes of text per byte of zlib output at level 9; higher is more repetitive.

  zlib finds repetition within 32 KiB only, that is within some 5,000 words of English.
  """
  content = "\n".join(piece.text for piece in block).encode()
  return len(content) / len(zlib.compress(content, 9))


def embedding_distance(rows_NE: Float[np.ndarray, "N E"]) -> tuple[float, float]:
  """Returns the mean cosine distance of all pairs of unit rows, and its standard error over rows.

  The standard error is the first-order one of a U-statistic; NaN for fewer than three rows.
  """
  num = len(rows_NE)
  if num < 2:
    raise ValueError(f"pairwise distances need at least two texts, not {num}")
  rows_NE = rows_NE.astype(np.float64)
  norms_N = np.linalg.norm(rows_NE, axis=1)
  if not np.all(np.abs(norms_N - 1) <= _MAX_NORM_ERROR):
    worst = norms_N[np.argmax(np.abs(norms_N - 1))]
    raise ValueError(f"`embed` must return unit rows; one has length {worst:.3f}")
  similarity_N = (rows_NE @ rows_NE.sum(axis=0) - norms_N**2) / (num - 1)
  stderr = 2 * similarity_N.std(ddof=1) / np.sqrt(num) if num > 2 else np.nan
  return float(1 - similarity_N.mean()), float(stderr)


def _blocks(
  texts: Sequence[tuple[str, str]], order: Integer[np.ndarray, "N"], block_words: int
) -> list[list[Piece]]:
  """Divides texts among blocks of exactly `block_words` words; cuts those that cross a border."""
  blocks: list[list[Piece]] = [[]]
  free, total = block_words, 0
  for index in order:
    document, text = texts[index]
    rest = Piece(document, text, shingles.words(text))
    total += len(rest.words)
    while rest.words:
      piece, rest = rest.cut(free) if len(rest.words) > free else (rest, Piece(document, "", []))
      blocks[-1].append(piece)
      free -= len(piece.words)
      if not free and len(blocks) == NUM_BLOCKS:
        return blocks
      if not free:
        blocks.append([])
        free = block_words
  raise ValueError(f"num_words={block_words * NUM_BLOCKS}, and the texts have {total} words")


def _ngrams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
  return zip(*(itertools.islice(words, start, None) for start in range(size)))


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
  """Returns the mean over blocks and its standard error; NaN where blocks are too few."""
  mean = float(np.mean(values)) if len(values) else float("nan")
  many = len(values) > 1
  stderr = float(np.std(values, ddof=1) / np.sqrt(len(values))) if many else float("nan")
  return {name: mean, f"{name}_stderr": stderr}
