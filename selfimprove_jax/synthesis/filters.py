"""Filters sampled documents before they are trained on.

The SBP paper filters looping samples by an n-gram rule and reports their share ("Repetition"). We
do not know the rule itself.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from selfimprove_jax.data import shingles
from selfimprove_jax.retrieval import near_duplicates
from selfimprove_jax.runtime.config import section

_TAIL_WORDS = 64
REASONS = ("too_short", "looping", "near_duplicate")


@section
class DocumentFilterConfig:
  """Configures the filters of sampled documents, applied in this order.

  Attributes:
    min_tokens: documents of fewer tokens are "too_short", and so are those of fewer words than a
      shingle, which the other rules cannot judge (a sample of dashes only).
    max_repetition: documents that `is_looping` finds are "looping".
    max_jaccard: documents whose word shingles overlap more with their own seed, a reference or an
      earlier document that passed the first two rules are "near_duplicate".
  """

  min_tokens: Annotated[int, Field(ge=0)]
  max_repetition: Annotated[float, Field(ge=0, le=1)]
  max_jaccard: Annotated[float, Field(ge=0, lt=1)]


def filter_documents(
  records: Sequence[Mapping[str, Any]],
  config: DocumentFilterConfig,
  *,
  shingle_size: int,
  references: Iterable[str] = (),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
  """Splits sampled documents into those to train on and dropped ones.

  Args:
    records: each with "text", "num_tokens" and "seed_text" (None without a seed); keeps all fields,
      and the earlier one of two near-duplicates.
    shingle_size: in words.
    references: the unique corpus; read once, not kept in memory.

  Returns:
    The kept records; the dropped ones, each with a "reason" (the first that applies); and counts:
    "sampled", each reason, "kept".
  """
  reasons: list[str | None] = [None] * len(records)
  for i, record in enumerate(records):
    num_words = shingles.num_words(shingles.words(record["text"]))
    if record["num_tokens"] < config.min_tokens or num_words < shingle_size:
      reasons[i] = "too_short"
    elif is_looping(record["text"], max_repetition=config.max_repetition):
      reasons[i] = "looping"

  rest = [i for i, reason in enumerate(reasons) if reason is None]
  texts = [records[i]["text"] for i in rest]
  rule = {"threshold": config.max_jaccard, "shingle_size": shingle_size}
  of_each_other = near_duplicates.near_duplicates(texts, **rule)
  of_references = near_duplicates.near_duplicates_of(references, texts, **rule)
  for i, earlier, reference in zip(rest, of_each_other, of_references, strict=True):
    seed_text = records[i]["seed_text"]
    copies_seed = seed_text is not None and (
      overlap(records[i]["text"], seed_text, shingle_size) > config.max_jaccard
    )
    if copies_seed or earlier is not None or reference is not None:
      reasons[i] = "near_duplicate"

  pairs = list(zip(records, reasons, strict=True))
  kept = [dict(record) for record, reason in pairs if reason is None]
  dropped = [{**record, "reason": reason} for record, reason in pairs if reason is not None]
  seen = collections.Counter(reasons)
  counts = {"sampled": len(records), **{r: seen[r] for r in REASONS}, "kept": len(kept)}
  return kept, dropped, counts


def is_looping(text: str, *, max_repetition: float) -> bool:
  """Returns whether over `max_repetition` of the word 3-grams of a text repeat earlier ones.

  Also judges the last 64 words by themselves: a sample that falls into a loop stays in it until it
  is cut off, even after a long and sound beginning.
  """
  words = shingles.words(text)
  tail = shingles.tail(words, _TAIL_WORDS)
  return max(_repeated_share(words), _repeated_share(tail)) > max_repetition


def overlap(a: str, b: str, shingle_size: int) -> float:
  """Returns the Jaccard overlap of the word shingles of two texts."""
  return shingles.jaccard(
    shingles.word_shingles(a, shingle_size), shingles.word_shingles(b, shingle_size)
  )


def _repeated_share(words: Sequence[str]) -> float:
  grams = shingles.runs(words, 3)
  return 1 - len(set(grams)) / len(grams) if grams else 0.0
