"""Splits documents into train, validation and test passages that share no text.

Every pass streams through an external sort by hash: memory holds one bucket of a sort, and the
held-out passages with their shingles.
"""

import contextlib
import hashlib
import itertools
import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.data import corpora, shingles
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runtime.config import section

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation", "test")

# Where a text may be cut: white space, and sentence ends of scripts without spaces.
_END, _CLOSING = "[。！？｡။។]", "[」』”’）]"
_BOUNDARY = re.compile(rf"\s+|(?:(?<={_END})|(?<={_END}{_CLOSING}))(?!\s|{_END}|{_CLOSING})")
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
      together, in source order.
    shingle_size: drops held-out passages that share this many consecutive words with train; two
      characters of a script without spaces count as one word.
    num_buckets: memory is about the corpus divided by this, or the largest group if order is
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
  passage. Records are {"id", "document", "group", "text"}, where "document" is the id of the
  document that the passage is from; a cut document's passages are "id#0", "id#1", ...

  Any prefix of the train passages is a random sample that contains every shorter prefix, so unique
  data and a larger oracle set are prefixes of one order. The output depends only on the documents,
  the config and the seed; with order="document" not even on the order of the documents.

  Args:
    source: the corpus's name in error messages.
    scratch: a folder with room for about three times the corpus; its subfolder "split" is emptied
      first and removed at the end.

  Returns:
    Counts: documents, repeated (documents that were dropped because another one has their text),
    dropped_short (passages), and by split: groups, passages, characters, dropped_leaking,
    dropped_leaking_share (of the split's passages).

  Raises:
    ValueError: no documents, two documents with one id, or an empty split.
  """
  fractions = {"validation": config.validation_fraction, "test": config.test_fraction}
  # A group goes to the first split whose threshold exceeds its hash in [0, 1).
  held_out_share = fractions["test"] + fractions["validation"]
  thresholds = {"test": fractions["test"], "validation": held_out_share, "train": 1.0}
  summary: dict[str, Any] = {"documents": 0, "repeated": 0, "dropped_short": 0}
  for count in ("groups", "passages", "characters"):
    summary[count] = dict.fromkeys(SPLITS, 0)
  for count in ("dropped_leaking", "dropped_leaking_share"):
    summary[count] = dict.fromkeys(HELD_OUT, 0)
  with _emptied(pathlib.Path(scratch) / "split") as folder:
    num_buckets = config.num_buckets
    by_content = _sorted_by_content(documents, folder, source, seed, num_buckets, summary)
    by_order = {name: _HashSort(folder / name, num_buckets) for name in SPLITS}
    by_group = _HashSort(folder / "group", num_buckets)
    for _, copies in itertools.groupby(by_content, key=lambda item: item[0][:_HASH_CHARS]):
      (_, (id_, group, text, index)), *others = copies
      summary["repeated"] += len(others)
      unit = int(_hash(seed, "role", group)[:13], 16) / 16**13  # 52 bits: exact in a float
      name = next(n for n, threshold in thresholds.items() if unit < threshold)
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
        record = {"id": passage_id, "document": id_, "group": group, "text": passage}
        by_order[name].add(key, record)
    for _, groups in itertools.groupby(by_group, key=lambda item: item[0]):
      summary["groups"][next(groups)[1]] += 1

    held_out = _without_leaks(by_order, config.shingle_size, summary)
    _check_splits(summary, config, {"train": by_order["train"], **held_out}, source)
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
) -> _HashSort:
  """Sorts records [id, group, text, index] so that documents of equal text are neighbors."""
  by_content = _HashSort(folder / "content", num_buckets)
  by_id = _HashSort(folder / "id", num_buckets)
  for index, document in enumerate(documents):
    folded = " ".join(document.text.split())  # copies often differ only in white space
    id_hash = _hash(seed, "id", document.id)
    record = [document.id, document.group, document.text.strip(), index]
    # The id breaks ties: which one of several copies is kept must not depend on their order.
    by_content.add(_hash(seed, "content", folded) + id_hash, record)
    by_id.add(id_hash, document.id)
    summary["documents"] += 1
  if not summary["documents"]:
    raise ValueError(f"the corpus is empty: {source} gave no document")
  for (id_hash, id_), (next_hash, _) in itertools.pairwise(by_id):
    if id_hash == next_hash:
      raise ValueError(
        f"two documents of {source} have the id {id_!r}; ids must be unique (without an id_field, "
        f"documents are named by file and number)"
      )
  return by_content


def _without_leaks(
  by_order: Mapping[str, _HashSort], shingle_size: int, summary: dict[str, Any]
) -> dict[str, list[dict[str, str]]]:
  """Returns the held-out records that share no shingle with train, nor validation with test."""
  held_out = {
    name: [(record, _shingles(record["text"], shingle_size)) for _, record in by_order[name]]
    for name in HELD_OUT
  }
  # Memory keeps only held-out shingles; the train passages stream past them.
  wanted = set().union(*(found for items in held_out.values() for _, found in items))
  leaked = set()
  for _, record in by_order["train"] if wanted else ():
    leaked |= wanted & _shingles(record["text"], shingle_size)
  for name in ("test", "validation"):
    num_passages = len(held_out[name])
    held_out[name] = [item for item in held_out[name] if leaked.isdisjoint(item[1])]
    dropped = summary["dropped_leaking"][name] = num_passages - len(held_out[name])
    summary["dropped_leaking_share"][name] = dropped / max(num_passages, 1)
    # Test goes first: a validation passage that shares text with a kept test passage is dropped.
    leaked = leaked.union(*(item[1] for item in held_out[name]))
  return {name: [record for record, _ in items] for name, items in held_out.items()}


def cut_passages(text: str, *, max_chars: int, min_chars: int) -> list[str]:
  """Cuts a text at paragraphs, else at lines, else at sentences, else at words, else anywhere.

  Passages have `min_chars` to `max_chars` characters if the text is long enough and `max_chars` is
  at least twice `min_chars`; stripping long runs of white space can make one shorter.
  """
  text = text.strip()
  passages, begin = [], 0
  while len(text) - begin > max_chars:
    # Every cut leaves enough text for another passage, so that no short remainder is lost.
    last = min(begin + max_chars, len(text) - min_chars)
    window = list(_boundaries(text, begin + max(min_chars, 1), last))
    window = [found for found in window if len(text) - found.end() >= min_chars]
    if window:
      # The last of the best boundaries: the longest passage that does not cut a paragraph.
      end, following = min(reversed(window), key=lambda found: _rank(text, found)).span()
    else:
      end = following = last
    passages.append(text[begin:end].strip())
    begin = following
  passages.append(text[begin:].strip())
  return passages


def _boundaries(text: str, first: int, last: int) -> Iterator[re.Match]:
  """Yields the places to cut that begin in [first, last]."""
  for found in _BOUNDARY.finditer(text, first):
    if found.start() > last:
      return
    # The rest of white space that begins before `first` is no boundary.
    if found.start() > first or not found.group() or not text[first - 1].isspace():
      yield found


def _rank(text: str, blank: re.Match) -> int:
  """Ranks a boundary as a place to cut; lower is better."""
  newlines = blank.group().count("\n")
  if newlines:
    return _PARAGRAPH if newlines > 1 else _LINE
  is_sentence = not blank.group() or text[blank.start() - 1] in ".!?。！？"
  return _SENTENCE if is_sentence else _WORD


def _hash(seed: int, purpose: str, text: str) -> str:
  """Hashes to 128 bits in hex; `purpose` makes split and order independent of each other."""
  return hashlib.blake2b(f"{seed}\0{purpose}\0{text}".encode(), digest_size=16).hexdigest()


def _shingles(text: str, size: int) -> frozenset[int]:
  """Returns shingles of `size` words; a shorter text is one shingle, so that copies are found."""
  tokens = shingles.words(text)
  found = shingles.runs(tokens, size) or ([" ".join(tokens)] if tokens else [])
  return frozenset(map(shingles.run_hash, found))


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
    for _ in shard:  # write_jsonl does not read records for a shard that exists: count them here
      pass


def _check_splits(
  summary: dict[str, Any], config: SplitConfig, left: Mapping[str, Sized], source: str
) -> None:
  """Raises ValueError if a split has no passages; `left` are those of each split."""
  fractions = {
    "train": 1 - config.validation_fraction - config.test_fraction,
    "validation": config.validation_fraction,
    "test": config.test_fraction,
  }
  wanted = [name for name in SPLITS if fractions[name]]
  empty = [name for name in wanted if not left[name]]
  if not empty:
    return
  num_groups = sum(summary["groups"].values())
  name = empty[0]
  drawn, fraction = summary["groups"][name], fractions[name]
  if num_groups < len(wanted):
    fault = f"{', '.join(wanted)} need a group each"
    change = "set validation_fraction or test_fraction to 0 to do without that split"
  elif not drawn:
    fault = (
      f"none was drawn for {name}, whose share of {fraction:g} expects {fraction * num_groups:.2g}"
    )
    change = "lower the fractions"
    if name != "train":
      change = f"raise {name}_fraction ({3 / num_groups:.2g} expects 3), or set it to 0"
  else:
    fault = f"of the {drawn} drawn for {name}, every passage is shorter than min_passage_chars"
    change = f"lower min_passage_chars ({config.min_passage_chars})"
    if name != "train" and (leaking := summary["dropped_leaking"][name]):
      fault += f", or shares text with other splits ({leaking} do)"
  raise ValueError(
    f"{source} gave {summary['documents']} documents in {num_groups} groups, which a split never "
    f"divides; {fault}. Use more documents or finer groups (group_field; group_by='file' for a "
    f"text folder; a long text cut into several files or records), or {change}"
  )


@contextlib.contextmanager
def _emptied(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Empties a folder, and removes it afterwards."""
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  try:
    yield folder
  finally:
    shutil.rmtree(folder)
