"""What is dropped of sampled documents before they are trained on.

The SBP paper filters its samples by an n-gram rule against looping text and reports the share of
looping documents ("Repetition"); the rule itself is not known to us: paper value not verified.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selfimprove_jax.data import shingles
from selfimprove_jax.retrieval import near_duplicates

_TAIL_WORDS = 64
REASONS = ("too_short", "looping", "near_duplicate")


def filter_documents(
  records: Sequence[Mapping[str, Any]],
  *,
  min_tokens: int,
  max_repetition: float,
  max_jaccard: float,
  shingle_size: int,
  references: Iterable[str] = (),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
  """Divides sampled documents into those to train on and those to keep beside.

  Args:
    records: Each with "text" and "num_tokens", and "seed_text" (None without a seed); all else is
      passed on. Their order decides which of two near-duplicates is kept: the earlier.
    min_tokens: Documents of fewer tokens are "too_short", and so are those of fewer words than a
      shingle, in which the other rules see nothing (a sample of dashes alone).
    max_repetition: See `is_looping`: such documents are "looping".
    max_jaccard: In [0, 1). Documents that overlap more, in word shingles, with their own seed's
      text, a reference or an earlier document that the first two rules let pass are
      "near_duplicate".
    shingle_size: In words.
    references: The unique corpus; read once, not kept.

  Returns:
    The kept records; the dropped ones, each with a "reason" (the first that applies, in the order
    above); and counts: "sampled", each reason, "kept".

  Raises:
    ValueError: a threshold is out of range.
  """
  if not 0 <= max_repetition <= 1:
    raise ValueError(f"max_repetition={max_repetition}: a share, in [0, 1]")
  reasons: list[str | None] = []
  for record in records:
    num_words = len(shingles.words(record["text"]))
    if record["num_tokens"] < min_tokens or num_words < shingle_size:
      reasons.append("too_short")
    elif is_looping(record["text"], max_repetition=max_repetition):
      reasons.append("looping")
    else:
      reasons.append(None)

  rest = [i for i, reason in enumerate(reasons) if reason is None]
  texts = [records[i]["text"] for i in rest]
  options = {"threshold": max_jaccard, "shingle_size": shingle_size}
  of_each_other = near_duplicates.near_duplicates(texts, **options)
  of_references = near_duplicates.near_duplicates_of(references, texts, **options)
  for i, earlier, reference in zip(rest, of_each_other, of_references, strict=True):
    copies_seed = records[i]["seed_text"] is not None and (
      overlap(records[i]["text"], records[i]["seed_text"], shingle_size) > max_jaccard
    )
    if copies_seed or earlier is not None or reference is not None:
      reasons[i] = "near_duplicate"

  pairs = list(zip(records, reasons, strict=True))
  kept = [dict(record) for record, reason in pairs if reason is None]
  dropped = [{**record, "reason": reason} for record, reason in pairs if reason is not None]
  seen = collections.Counter(reasons)
  counts = {"sampled": len(records), **{r: seen[r] for r in REASONS}, "kept": len(kept)}
  return kept, dropped, counts


def repetition(text: str, n: int = 3) -> float:
  """Share of a text's word n-grams that occurred in it before, in [0, 1); 0 for under n words."""
  words = shingles.words(text)
  return _repeated_share(words, n)


def is_looping(text: str, *, max_repetition: float) -> bool:
  """Whether over `max_repetition` of the word 3-grams repeat, in the text or its last 64 words.

  The end counts by itself because a sample that falls into a loop stays in it until it is cut off.
  (SBP's "Repetition" flags looping text by an n-gram rule; paper value not verified.)
  """
  words = shingles.words(text)
  return max(_repeated_share(words, 3), _repeated_share(words[-_TAIL_WORDS:], 3)) > max_repetition


def overlap(a: str, b: str, shingle_size: int) -> float:
  """Jaccard overlap of the word shingles of two texts."""
  return shingles.jaccard(
    shingles.word_shingles(a, shingle_size), shingles.word_shingles(b, shingle_size)
  )


def _repeated_share(words: Sequence[str], n: int) -> float:
  grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
  return 1 - len(set(grams)) / len(grams) if grams else 0.0
