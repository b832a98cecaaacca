"""Documents -> train, validation and test passages that share no text.

The work is a few external sorts by hash: every pass streams, and memory holds one bucket of a sort
beside the held-out passages with their shingles.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

from selfimprove_jax import artifacts
from selfimprove_jax.data import corpora, shingles

ROLES = ("train", "validation", "test")

_WHITESPACE = re.compile(r"\s+")
_PARAGRAPH, _LINE, _SENTENCE, _WORD = range(4)
_HASH_CHARS = 32
_MAX_PENDING_CHARS = 1 << 24


def write_split(
  documents: Iterable[corpora.Document],
  writer: artifacts.Writer,
  *,
  source: str,
  num_shards: int,
  scratch: str | pathlib.Path,
  seed: int,
  validation_fraction: float,
  test_fraction: float,
  max_passage_chars: int,
  min_passage_chars: int,
  order: str,
  shingle_size: int = 10,
  num_buckets: int = 64,
) -> dict[str, Any]:
  """Writes `train-00000-of-00004.jsonl` ... `test-00000-of-00001.jsonl`; returns what was counted.

  In this order: exact duplicates are dropped (white space folded); each group is given to one
  role by a hash; documents are cut into passages; passages are ordered by a hash; and held-out
  passages that share a run of `shingle_size` words with any train passage, or validation
  passages that share one with a test passage, are dropped. Records are {"id", "group", "text"};
  the passages of a cut document are "id#0", "id#1", ...

  Any prefix of the train passages is a random sample and holds every shorter one, so that unique
  data and a larger oracle pool are prefixes of one order. The output is a function of the
  documents and the arguments; with order="document" even their order does not matter.

  Args:
    source: What to call the corpus in errors.
    num_shards: Shards of the train role, of equal numbers of passages; the held-out have one each.
    scratch: A folder with room for about three times the corpus; its subfolder "split" is made
      anew and removed at the end.
    validation_fraction: Expected share of groups; 0 leaves the role out.
    order: "document" shuffles passages; "group" shuffles groups and keeps the passages of one
      together, in the order they came.
    num_buckets: Memory is about the corpus over this, or the largest group where order is
      "group"; the output does not depend on it.

  Returns:
    Counts: documents, duplicates, dropped_short (passages), and by role: groups, passages,
    characters, dropped_leaking, dropped_leaking_share (of the role's passages).

  Raises:
    ValueError: no documents, two documents with one id, a role left empty, or an argument out of
      range.
  """
  fractions = {"validation": validation_fraction, "test": test_fraction}
  _check_arguments(fractions, max_passage_chars, min_passage_chars, order)
  summary: dict[str, Any] = {"documents": 0, "duplicates": 0, "dropped_short": 0}
  for count in ("groups", "passages", "characters"):
    summary[count] = dict.fromkeys(ROLES, 0)
  for count in ("dropped_leaking", "dropped_leaking_share"):
    summary[count] = dict.fromkeys(fractions, 0)
  with _emptied(pathlib.Path(scratch) / "split") as folder:
    by_content = _sorted_by_content(documents, folder, source, seed, num_buckets, summary)
    by_order = {role: _HashSort(folder / role, num_buckets) for role in ROLES}

    def passage_key(passage_id, group, place):
      if order == "document":
        return _hash(seed, "passage", passage_id)
      return f"{_hash(seed, 'order', group)}{place}"

    by_group = _HashSort(folder / "group", num_buckets)
    for id_, group, text, index in _without_duplicates(by_content, summary):
      role = _role(seed, group, fractions)
      by_group.add(_hash(seed, "group", group), role)
      passages = cut_passages(text, max_chars=max_passage_chars, min_chars=min_passage_chars)
      kept = [passage for passage in passages if len(passage) >= min_passage_chars]
      summary["dropped_short"] += len(passages) - len(kept)
      for number, passage in enumerate(kept):
        passage_id = id_ if len(kept) == 1 else f"{id_}#{number}"
        key = passage_key(passage_id, group, f"{index:016x}{number:08x}")
        by_order[role].add(key, {"id": passage_id, "group": group, "text": passage})
    for _, groups in itertools.groupby(by_group, key=lambda item: item[0]):
      summary["groups"][next(groups)[1]] += 1

    held_out = _without_leaks(by_order, fractions, shingle_size, summary)
    _check_roles(summary, fractions, {role: len(held_out[role]) for role in fractions}, by_order)
    for role in ROLES:
      if role == "train":
        records = (record for _, record in by_order[role])
        _write_role(writer, role, records, len(by_order[role]), num_shards, summary)
      elif fractions[role]:
        _write_role(writer, role, held_out[role], len(held_out[role]), 1, summary)
  return summary


def _sorted_by_content(documents, folder, source, seed, num_buckets, summary):
  """[id, group, text, index] of each document, those of equal text together."""
  by_content = _HashSort(folder / "content", num_buckets)
  by_id = _HashSort(folder / "id", num_buckets)
  for index, document in enumerate(documents):
    folded = " ".join(document.text.split())
    id_hash = _hash(seed, "id", document.id)
    record = [document.id, document.group, document.text.strip(), index]
    by_content.add(_hash(seed, "content", folded) + id_hash, record)
    by_id.add(id_hash, document.id)
    summary["documents"] += 1
  if not summary["documents"]:
    raise ValueError(f"the corpus is empty: {source} gave no document")
  _check_unique(by_id, source)
  return by_content


def _without_duplicates(by_content, summary):
  content = None
  for key, record in by_content:
    if key[:_HASH_CHARS] == content:
      summary["duplicates"] += 1
      continue
    content = key[:_HASH_CHARS]
    yield record


def _without_leaks(by_order, fractions, shingle_size, summary):
  """Role -> held-out records that share no run of words with train, or validation with test."""
  held_out = {
    role: [(record, _shingles(record["text"], shingle_size)) for _, record in by_order[role]]
    for role in fractions
  }
  leaked = _shared_shingles(by_order["train"], held_out, shingle_size)
  for role in ("test", "validation"):
    whole = len(held_out[role])
    held_out[role] = [item for item in held_out[role] if leaked.isdisjoint(item[1])]
    summary["dropped_leaking"][role] = whole - len(held_out[role])
    summary["dropped_leaking_share"][role] = (whole - len(held_out[role])) / max(whole, 1)
    leaked = leaked.union(*(item[1] for item in held_out[role]))
  return {role: [record for record, _ in items] for role, items in held_out.items()}


def cut_passages(text: str, *, max_chars: int, min_chars: int) -> list[str]:
  """Cuts at paragraphs; where one is too long at lines, then sentences, words, and anywhere.

  Each passage has `min_chars` to `max_chars` characters, if the text has as many and
  `max_chars` is at least twice `min_chars`; long runs of blanks can make one shorter.
  """
  text = text.strip()
  runs = [(m.start(), m.end(), _rank(text, m)) for m in _WHITESPACE.finditer(text)]
  starts = [start for start, _, _ in runs]
  passages, begin = [], 0
  while len(text) - begin > max_chars:
    # The last cut still leaves enough for a passage, so that no short remainder is lost.
    last = min(begin + max_chars, len(text) - min_chars)
    window = runs[
      bisect.bisect_left(starts, begin + max(min_chars, 1)) : bisect.bisect_right(starts, last)
    ]
    window = [run for run in window if len(text) - run[1] >= min_chars]
    if window:
      end, following, _ = min(reversed(window), key=lambda run: run[2])
    else:
      end = following = last
    passages.append(text[begin:end].strip())
    begin = following
  passages.append(text[begin:].strip())
  return passages


def _rank(text: str, blank: re.Match) -> int:
  newlines = blank.group().count("\n")
  if newlines:
    return _PARAGRAPH if newlines > 1 else _LINE
  return _SENTENCE if text[blank.start() - 1] in ".!?" else _WORD


def _hash(seed: int, purpose: str, text: str) -> str:
  """128 bits in hex; each purpose has its own, so that role and order are independent."""
  return hashlib.blake2b(f"{seed}\0{purpose}\0{text}".encode(), digest_size=16).hexdigest()


def _role(seed: int, group: str, fractions: dict[str, float]) -> str:
  unit = int(_hash(seed, "role", group)[:13], 16) / 16**13
  if unit < fractions["test"]:
    return "test"
  return "validation" if unit < fractions["test"] + fractions["validation"] else "train"


def _shingles(text: str, size: int) -> frozenset[int]:
  """Shingles of `size` words; a shorter text is one shingle, so that its copies are found."""
  found = shingles.word_shingles(text, size)
  return found or shingles.word_shingles(text, max(len(shingles.words(text)), 1))


def _shared_shingles(train: "_HashSort", held_out: dict[str, list], size: int) -> set[int]:
  """The held-out shingles that a train passage has too."""
  sought = set().union(*(found for items in held_out.values() for _, found in items))
  if not sought:
    return set()
  shared = set()
  for _, record in train:
    shared |= sought & _shingles(record["text"], size)
  return shared


def _write_role(
  writer: artifacts.Writer,
  role: str,
  records: Iterable[dict[str, str]],
  num_records: int,
  num_shards: int,
  summary: dict[str, Any],
) -> None:
  def counted(records):
    for record in records:
      summary["passages"][role] += 1
      summary["characters"][role] += len(record["text"])
      yield record

  records = counted(records)
  for index in range(num_shards):
    size = (index + 1) * num_records // num_shards - index * num_records // num_shards
    shard = itertools.islice(records, size)
    writer.write_jsonl(f"{role}-{artifacts.shard_name(index, num_shards)}", shard)
    for _ in shard:  # what a shard that was there already did not take
      pass


def _check_arguments(
  fractions: dict[str, float], max_passage_chars: int, min_passage_chars: int, order: str
) -> None:
  if min(fractions.values()) < 0 or sum(fractions.values()) >= 1:
    raise ValueError(f"held-out fractions are {fractions}; they are 0 or more, and below 1 in all")
  if min_passage_chars < 1 or max_passage_chars < 2 * min_passage_chars:
    raise ValueError(
      f"passages of {min_passage_chars} to {max_passage_chars} characters: the longest must be at "
      f"least twice the shortest (and that at least 1), or remainders would be lost"
    )
  if order not in ("document", "group"):
    raise ValueError(f"order is {order!r}; it is 'document' or 'group'")


def _check_unique(by_id: "_HashSort", source: str) -> None:
  for (key, id_), (next_key, _) in itertools.pairwise(by_id):
    if key == next_key:
      raise ValueError(f"two documents of {source} have the id {id_!r}; ids must be unique")


def _check_roles(
  summary: dict[str, Any],
  fractions: dict[str, float],
  num_held_out: dict[str, int],
  by_order: dict[str, "_HashSort"],
) -> None:
  if not len(by_order["train"]):
    raise ValueError(
      f"no train passage is left of {summary['documents']} documents "
      f"({summary['dropped_short']} too short): lower validation_fraction, test_fraction "
      f"({fractions}) or min_passage_chars"
    )
  for role, fraction in fractions.items():
    if fraction and not num_held_out[role]:
      raise ValueError(
        f"no {role} passage is left: {summary['groups'][role]} groups fell to it, and all of its "
        f"{summary['dropped_leaking'][role]} passages share text with other roles; raise "
        f"{role}_fraction ({fraction}), or set it to 0 to go without"
      )


@contextlib.contextmanager
def _emptied(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  try:
    yield folder
  finally:
    shutil.rmtree(folder)


class _HashSort:
  """An external sort by uniformly distributed hex keys: one file a range of keys."""

  def __init__(self, folder: pathlib.Path, num_buckets: int):
    folder.mkdir()
    self._paths = [folder / f"{index:06d}" for index in range(num_buckets)]
    self._pending: list[list[str]] = [[] for _ in self._paths]
    self._pending_chars = 0
    self._length = 0

  def __len__(self) -> int:
    return self._length

  def add(self, key: str, record: Any) -> None:
    line = f"{key}\t{json.dumps(record)}\n"
    self._pending[int(key[:8], 16) * len(self._paths) >> 32].append(line)
    self._pending_chars += len(line)
    self._length += 1
    if self._pending_chars > _MAX_PENDING_CHARS:
      self._flush()

  def _flush(self) -> None:
    for path, lines in zip(self._paths, self._pending):
      with path.open("a", encoding="ascii") as file:  # not kept open: laptops allow 256 files
        file.writelines(lines)
      lines.clear()
    self._pending_chars = 0

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    """(key, record) in order of key."""
    self._flush()
    for path in self._paths:
      with path.open(encoding="ascii") as file:
        lines = sorted(file)
      for line in lines:
        key, _, record = line.partition("\t")
        yield key, json.loads(record)
