"""Splits documents into train, validation and test passages that share no text.

The work is a few external sorts by hash, so every pass streams. Memory holds one bucket of a sort
and the held-out passages with their shingles.
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.data import corpora, shingles
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runtime.config import section

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")

_WHITESPACE = re.compile(r"\s+")
_PARAGRAPH, _LINE, _SENTENCE, _WORD = range(4)
_HASH_CHARS = 32
_MAX_PENDING_CHARS = 1 << 24

_Fraction = Annotated[float, Field(ge=0, lt=1)]


@section
class SplitConfig:
  """Sets how documents become passages and which passages are held out.

  Attributes:
    num_shards: train shards, of equal numbers of passages; a held-out split has one shard.
    validation_fraction: expected share of the groups; 0 leaves the split out.
    test_fraction: the same for the test split.
    order: "document" shuffles passages; "group" shuffles groups and keeps the passages of a group
      together, in the order of the source.
    shingle_size: a held-out passage that shares this many consecutive words with a train passage
      is dropped.
    num_buckets: memory is about the corpus divided by this, or the largest group where order is
      "group"; the output does not depend on it.
  """

  num_shards: Annotated[int, Field(ge=1)]
  validation_fraction: _Fraction
  test_fraction: _Fraction
  max_passage_chars: Annotated[int, Field(ge=2)]
  min_passage_chars: Annotated[int, Field(ge=1)]
  order: Literal["document", "group"]
  shingle_size: Annotated[int, Field(ge=1)] = 10
  num_buckets: Annotated[int, Field(ge=1)] = 64

  def __post_init__(self) -> None:
    if self.validation_fraction + self.test_fraction >= 1:
      raise ValueError(
        f"validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} "
        f"leave nothing to train on; their sum must be below 1"
      )
    if self.max_passage_chars < 2 * self.min_passage_chars:
      raise ValueError(
        f"max_passage_chars={self.max_passage_chars} must be at least twice "
        f"min_passage_chars={self.min_passage_chars}, or the ends of documents would be lost"
      )


def write_split(
  documents: Iterable[corpora.Document],
  writer: artifacts.Writer,
  config: SplitConfig,
  *,
  seed: int,
  source: str,
  scratch: str | pathlib.Path,
) -> dict[str, Any]:
  """Writes `train-00000-of-00004.jsonl` ... `test-00000-of-00001.jsonl`; returns their counts.

  Drops exact duplicates (up to white space), assigns each group to a split by a hash, cuts
  documents into passages, orders passages by a hash, and drops held-out passages that share a run
  of `shingle_size` words with a train passage, and validation passages that share one with a test
  passage. Records are {"id", "group", "text"}; the passages of a cut document are "id#0", "id#1",
  ...

  Any prefix of the train passages is a random sample that contains every shorter one, so unique
  data and a larger oracle set are prefixes of one order. The output depends on the documents, the
  config and the seed alone; with order="document" not even on the order of the documents.

  Args:
    source: the corpus's name in error messages.
    scratch: a folder with room for about three times the corpus. Its subfolder "split" is made
      empty first and removed at the end.

  Returns:
    Counts: documents, duplicates, dropped_short (passages), and by split: groups, passages,
    characters, dropped_leaking, dropped_leaking_share (of the split's passages).

  Raises:
    ValueError: no documents, two documents with one id, or an empty split.
  """
  fractions = {"validation": config.validation_fraction, "test": config.test_fraction}
  summary: dict[str, Any] = {"documents": 0, "duplicates": 0, "dropped_short": 0}
  for count in ("groups", "passages", "characters"):
    summary[count] = dict.fromkeys(SPLITS, 0)
  for count in ("dropped_leaking", "dropped_leaking_share"):
    summary[count] = dict.fromkeys(HELD_OUT, 0)
  with _emptied(pathlib.Path(scratch) / "split") as folder:
    num_buckets = config.num_buckets
    by_content = _sorted_by_content(documents, folder, source, seed, num_buckets, summary)
    by_order = {name: _HashSort(folder / name, num_buckets) for name in SPLITS}
    by_group = _HashSort(folder / "group", num_buckets)
    for id_, group, text, index in _without_duplicates(by_content, summary):
      name = _split_of_group(seed, group, fractions)
      by_group.add(_hash(seed, "group", group), name)
      passages = cut_passages(
        text, max_chars=config.max_passage_chars, min_chars=config.min_passage_chars
      )
      kept = [passage for passage in passages if len(passage) >= config.min_passage_chars]
      summary["dropped_short"] += len(passages) - len(kept)
      for number, passage in enumerate(kept):
        passage_id = id_ if len(kept) == 1 else f"{id_}#{number}"
        if config.order == "document":
          key = _hash(seed, "passage", passage_id)
        else:
          # All passages of a group share the hash; fixed-width numbers keep them in order.
          key = f"{_hash(seed, 'order', group)}{index:016x}{number:08x}"
        by_order[name].add(key, {"id": passage_id, "group": group, "text": passage})
    for _, groups in itertools.groupby(by_group, key=lambda item: item[0]):
      summary["groups"][next(groups)[1]] += 1

    held_out = _without_leaks(by_order, config.shingle_size, summary)
    _check_splits(summary, fractions, held_out, by_order)
    train = (record for _, record in by_order["train"])
    _write_records(writer, "train", train, len(by_order["train"]), config.num_shards, summary)
    for name in HELD_OUT:
      if fractions[name]:
        _write_records(writer, name, held_out[name], len(held_out[name]), 1, summary)
  return summary


def _sorted_by_content(
  documents: Iterable[corpora.Document],
  folder: pathlib.Path,
  source: str,
  seed: int,
  num_buckets: int,
  summary: dict[str, Any],
) -> "_HashSort":
  """Sorts records [id, group, text, index] so that documents of equal text are neighbors."""
  by_content = _HashSort(folder / "content", num_buckets)
  by_id = _HashSort(folder / "id", num_buckets)
  for index, document in enumerate(documents):
    folded = " ".join(document.text.split())  # copies often differ in white space alone
    id_hash = _hash(seed, "id", document.id)
    record = [document.id, document.group, document.text.strip(), index]
    # The id breaks ties: which one of several copies is kept must not depend on their order.
    by_content.add(_hash(seed, "content", folded) + id_hash, record)
    by_id.add(id_hash, document.id)
    summary["documents"] += 1
  if not summary["documents"]:
    raise ValueError(f"the corpus is empty: {source} gave no document")
  _check_unique(by_id, source)
  return by_content


def _without_duplicates(by_content: "_HashSort", summary: dict[str, Any]) -> Iterator[list[Any]]:
  """Yields the first record of each text."""
  content = None
  for key, record in by_content:
    if key[:_HASH_CHARS] == content:
      summary["duplicates"] += 1
      continue
    content = key[:_HASH_CHARS]
    yield record


def _without_leaks(
  by_order: Mapping[str, "_HashSort"], shingle_size: int, summary: dict[str, Any]
) -> dict[str, list[dict[str, str]]]:
  """Returns the held-out records that share no shingle with train, nor validation with test."""
  held_out = {
    name: [(record, _shingles(record["text"], shingle_size)) for _, record in by_order[name]]
    for name in HELD_OUT
  }
  leaked = _shared_shingles(by_order["train"], held_out, shingle_size)
  for name in ("test", "validation"):
    whole = len(held_out[name])
    held_out[name] = [item for item in held_out[name] if leaked.isdisjoint(item[1])]
    summary["dropped_leaking"][name] = whole - len(held_out[name])
    summary["dropped_leaking_share"][name] = (whole - len(held_out[name])) / max(whole, 1)
    # Test comes first and keeps all that train allows; validation gives way to it.
    leaked = leaked.union(*(item[1] for item in held_out[name]))
  return {name: [record for record, _ in items] for name, items in held_out.items()}


def cut_passages(text: str, *, max_chars: int, min_chars: int) -> list[str]:
  """Cuts a text at paragraphs, else at lines, else at sentences, else at words, else anywhere.

  Passages have `min_chars` to `max_chars` characters if the text is long enough and `max_chars` is
  at least twice `min_chars`; long runs of white space can make one shorter.
  """
  text = text.strip()
  runs = [(m.start(), m.end(), _rank(text, m)) for m in _WHITESPACE.finditer(text)]
  starts = [start for start, _, _ in runs]
  passages, begin = [], 0
  while len(text) - begin > max_chars:
    # Every cut leaves enough text for another passage, so that no short remainder is lost.
    last = min(begin + max_chars, len(text) - min_chars)
    window = runs[
      bisect.bisect_left(starts, begin + max(min_chars, 1)) : bisect.bisect_right(starts, last)
    ]
    window = [run for run in window if len(text) - run[1] >= min_chars]
    if window:
      # The last of the best boundaries: the longest passage that does not cut a paragraph.
      end, following, _ = min(reversed(window), key=lambda run: run[2])
    else:
      end = following = last
    passages.append(text[begin:end].strip())
    begin = following
  passages.append(text[begin:].strip())
  return passages


def _rank(text: str, blank: re.Match) -> int:
  """Ranks a run of white space as a place to cut; lower is better."""
  newlines = blank.group().count("\n")
  if newlines:
    return _PARAGRAPH if newlines > 1 else _LINE
  return _SENTENCE if text[blank.start() - 1] in ".!?" else _WORD


def _hash(seed: int, purpose: str, text: str) -> str:
  """Hashes to 128 bits in hex; the purpose makes split and order independent of each other."""
  return hashlib.blake2b(f"{seed}\0{purpose}\0{text}".encode(), digest_size=16).hexdigest()


def _split_of_group(seed: int, group: str, fractions: Mapping[str, float]) -> str:
  unit = int(_hash(seed, "role", group)[:13], 16) / 16**13  # 52 bits: exact in a float
  if unit < fractions["test"]:
    return "test"
  return "validation" if unit < fractions["test"] + fractions["validation"] else "train"


def _shingles(text: str, size: int) -> frozenset[int]:
  """Returns shingles of `size` words; a shorter text is one shingle, so its copies are found."""
  found = shingles.word_shingles(text, size)
  return found or shingles.word_shingles(text, max(len(shingles.words(text)), 1))


def _shared_shingles(train: "_HashSort", held_out: Mapping[str, list], size: int) -> set[int]:
  """Returns the held-out shingles that also occur in a train passage."""
  # Only held-out shingles are kept in memory; the train passages stream past them.
  sought = set().union(*(found for items in held_out.values() for _, found in items))
  if not sought:
    return set()
  shared = set()
  for _, record in train:
    shared |= sought & _shingles(record["text"], size)
  return shared


def _write_records(
  writer: artifacts.Writer,
  name: str,
  records: Iterable[dict[str, str]],
  num_records: int,
  num_shards: int,
  summary: dict[str, Any],
) -> None:
  """Writes the shards of a split and counts their passages and characters."""

  def counted(records: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    for record in records:
      summary["passages"][name] += 1
      summary["characters"][name] += len(record["text"])
      yield record

  records = counted(records)
  for index in range(num_shards):
    size = (index + 1) * num_records // num_shards - index * num_records // num_shards
    shard = itertools.islice(records, size)
    writer.write_jsonl(f"{name}-{artifacts.shard_name(index, num_shards)}", shard)
    for _ in shard:  # a shard that exists already is not read: its records are counted here
      pass


def _check_unique(by_id: "_HashSort", source: str) -> None:
  for (key, id_), (next_key, _) in itertools.pairwise(by_id):
    if key == next_key:
      raise ValueError(f"two documents of {source} have the id {id_!r}; ids must be unique")


def _check_splits(
  summary: dict[str, Any],
  fractions: Mapping[str, float],
  held_out: Mapping[str, list[dict[str, str]]],
  by_order: Mapping[str, "_HashSort"],
) -> None:
  """Refuses a split without passages."""
  if not len(by_order["train"]):
    raise ValueError(
      f"no train passage is left of {summary['documents']} documents "
      f"({summary['dropped_short']} passages were too short): lower validation_fraction, "
      f"test_fraction ({dict(fractions)}) or min_passage_chars"
    )
  for name, fraction in fractions.items():
    if fraction and not held_out[name]:
      raise ValueError(
        f"no {name} passage is left: the split has {summary['groups'][name]} groups, and all "
        f"{summary['dropped_leaking'][name]} of its passages share text with other splits; raise "
        f"{name}_fraction ({fraction}), or set it to 0 to do without"
      )


@contextlib.contextmanager
def _emptied(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Makes a folder empty, and removes it afterwards."""
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  try:
    yield folder
  finally:
    shutil.rmtree(folder)


class _HashSort:
  """Sorts records on disk by uniformly distributed hex keys, with one file per range of keys."""

  def __init__(self, folder: pathlib.Path, num_buckets: int):
    folder.mkdir()
    self._paths = [folder / f"{index:06d}" for index in range(num_buckets)]
    self._pending: list[list[str]] = [[] for _ in self._paths]
    self._pending_chars = 0
    self._length = 0

  def __len__(self) -> int:
    return self._length

  def add(self, key: str, record: Any) -> None:
    # JSON has neither raw tabs nor newlines, so lines can be sorted and split as they are.
    line = f"{key}\t{json.dumps(record)}\n"
    # The first 32 bits choose the bucket; keys are uniform, so buckets have about the same size.
    self._pending[int(key[:8], 16) * len(self._paths) >> 32].append(line)
    self._pending_chars += len(line)
    self._length += 1
    if self._pending_chars > _MAX_PENDING_CHARS:
      self._flush()

  def _flush(self) -> None:
    for path, lines in zip(self._paths, self._pending):
      # Files are not kept open: macOS allows a process 256.
      with path.open("a", encoding="ascii") as file:
        file.writelines(lines)
      lines.clear()
    self._pending_chars = 0

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    """Yields (key, record) in order of key."""
    self._flush()
    for path in self._paths:
      with path.open(encoding="ascii") as file:
        lines = sorted(file)
      for line in lines:
        key, _, record = line.partition("\t")
        yield key, json.loads(record)
