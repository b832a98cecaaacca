"""Stages from raw text to packed rows: documents, tokenizer, rows."""

import collections
import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from selfimprove_jax.data import corpora, packing, split
from selfimprove_jax.data import rows as rows_lib
from selfimprove_jax.data.corpora import Document, SourceConfig
from selfimprove_jax.data.decontamination import DecontaminationConfig, Findings, open_benchmarks
from selfimprove_jax.data.split import SplitConfig
from selfimprove_jax.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_bpe
from selfimprove_jax.runs import storage
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Context, Stage
from selfimprove_jax.runtime.config import section

_Item = TypeVar("_Item")

CONTAMINATED = "_contaminated.jsonl"
"""Lists the documents that contain items of benchmarks, in the artifacts that are checked."""


@section
class CorpusConfig:
  """Selects a corpus and sets how it is split.

  Attributes:
    on_error: "raise" stops at the first bad record; "skip" lists it in `_rejected.jsonl`.
  """

  source: SourceConfig
  on_error: Literal["raise", "skip"] = "raise"
  split: SplitConfig


@section
class DocumentsConfig:
  """Configures the stage `documents`.

  Attributes:
    min_test_groups: fewer groups of test documents are an error, before anything is trained.
  """

  corpus: CorpusConfig
  seed: int
  min_test_groups: int = 0


@section
class CheckedDocumentsConfig(DocumentsConfig):
  """Configures the stage `documents` with a search for items of benchmarks."""

  decontamination: DecontaminationConfig


def documents_stage(
  name: str, config: DocumentsConfig, decontamination: DecontaminationConfig | None
) -> Stage:
  """Returns the stage that reads a corpus, and checks it if benchmarks are named."""
  if decontamination is None:
    # Without the section in its config, so that runs that are not checked do not depend on it.
    return Stage(name, documents, config)
  checked = CheckedDocumentsConfig(**vars(config), decontamination=decontamination)
  return Stage(name, checked_documents, checked)


def documents(context: Context, config: DocumentsConfig) -> dict[str, Any]:
  """Reads a corpus, holds out groups of documents and cuts long documents into passages."""
  return _read_and_split(context, config, None)


def checked_documents(context: Context, config: CheckedDocumentsConfig) -> dict[str, Any]:
  """Does what `documents` does, and drops or marks the documents that contain benchmark items.

  Whole documents are checked, before they are cut. `_contaminated.jsonl` lists those with items.
  """
  return _read_and_split(context, config, config.decontamination)


def _read_and_split(
  context: Context, config: DocumentsConfig, decontamination: DecontaminationConfig | None
) -> dict[str, Any]:
  corpus, rejected = config.corpus, []
  on_bad = rejected.append if corpus.on_error == "skip" else None

  def found() -> Iterator[Document]:
    yield from corpora.read_documents(corpus.source, on_bad=on_bad)
    if rejected:  # said before the split, which may find too few documents
      context.progress.note(
        f"records skipped, because they are not documents: {len(rejected)}; `_rejected.jsonl` "
        f"lists them. The first: {rejected[0]}"
      )

  findings = None
  if decontamination is not None:
    findings = Findings(open_benchmarks(decontamination), decontamination)
  summary = write_documents(
    context,
    found(),
    corpus.split,
    seed=config.seed,
    source=corpus.source.kind,
    findings=findings,
  )
  if summary["groups"]["test"] < config.min_test_groups:
    raise ValueError(
      f"{summary['groups']['test']} of the {sum(summary['groups'].values())} groups of documents "
      f"is for testing, and errors over groups need {config.min_test_groups}: raise "
      f"corpus.split.test_fraction={corpus.split.test_fraction:g}, or give documents more groups "
      f"(corpus.source.group_field; a text folder has group_by='file')"
    )
  context.writer.write_jsonl("_rejected.jsonl", ({"message": message} for message in rejected))
  return {**summary, "rejected": len(rejected)}


def write_documents(
  context: Context,
  found: Iterator[Document],
  config: SplitConfig,
  *,
  seed: int,
  source: str,
  findings: Findings | None = None,
) -> dict[str, Any]:
  """Writes documents as `split.write_split` does, after a search for items of benchmarks.

  Args:
    source: the corpus's name in error messages.
    findings: drops or marks the documents that contain benchmark items, which are listed in
      `_contaminated.jsonl`; None does not search.
  """
  scratch = storage.scratch(context.folder / ".scratch")
  scratch.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    bar = stack.enter_context(context.progress.track(None, label="documents", unit="documents"))
    kept = _counted(found, bar)
    if findings is not None:
      # On disk, since a corpus may have more such documents than memory holds.
      listed = stack.enter_context(tempfile.TemporaryFile("w+", dir=scratch, encoding="utf-8"))
      kept = findings.kept(kept, on_found=lambda item: listed.write(json.dumps(item) + "\n"))
    summary = split.write_split(
      kept, context.writer, config, seed=seed, source=source, scratch=scratch
    )
    if summary["repeated"]:
      context.progress.note(
        f"documents dropped, because others have the same text: {summary['repeated']} of "
        f"{summary['documents']}"
      )
    if findings is not None:
      listed.seek(0)
      context.writer.write_jsonl(CONTAMINATED, map(json.loads, listed))
      context.progress.note(f"{context.name}: {findings.sentence}")
      summary["decontamination"] = findings.summary()
  return summary


def _counted(found: Iterator[Document], bar: Any) -> Iterator[Document]:
  for document in found:
    yield document
    bar.update(1)


def split_records(documents: Artifact, split_name: str) -> Iterator[dict[str, Any]]:
  """Yields the documents of a split ("train", "validation" or "test") in order."""
  for name in sorted(documents.shards):
    if name.startswith(f"{split_name}-"):
      yield from documents.read_jsonl(name)


@section
class TokenizerStageConfig(TokenizerConfig):
  """Configures the stage `tokenizer`; `unique_tokens` is that of the stage `rows`."""

  unique_tokens: int


def tokenizer(context: Context, config: TokenizerStageConfig) -> dict[str, Any]:
  """Trains a byte-level BPE on the first train documents, or copies an existing tokenizer.

  A new tokenizer sees documents of the unique data only.
  """
  seen = {}
  if config.path is None:
    result, seen = _train_on_unique(context.inputs["documents"], config)
  else:
    result = load_tokenizer(config.path, config.special_tokens)
  if not context.writer.has("tokenizer"):
    with context.writer.shard("tokenizer") as (folder, counts):
      result.save(folder)
      counts["records"] = result.vocab_size
  return {"vocab_size": result.vocab_size, "trained": config.path is None, **seen}


def _train_on_unique(
  documents: Artifact, config: TokenizerStageConfig
) -> tuple[Tokenizer, dict[str, int]]:
  """Returns a tokenizer and how much text it has seen, none of it beyond the unique data.

  How many documents the unique data hold depends on the tokenizer, so it is trained again, on
  fewer documents, until all of them are among the unique data.
  """

  def first(number: int | None) -> Iterator[dict[str, Any]]:
    return itertools.islice(split_records(documents, "train"), number)

  def count(sized: Iterable[tuple[Any, int]], budget: int) -> int:
    return sum(1 for _ in within_budget(sized, budget))

  number = count(((r, len(r["text"])) for r in first(None)), config.train_chars)
  while True:
    made = train_bpe((r["text"] for r in first(number)), vocab_size=config.vocab_size)
    num_unique = count(_encoded(first(number), made, 1000), config.unique_tokens)
    if num_unique == number:
      num_characters = sum(len(r["text"]) for r in first(number))
      return made, {"train_documents": number, "train_characters": num_characters}
    number = num_unique


def within_budget(items: Iterable[tuple[_Item, int]], budget: float | int) -> Iterator[_Item]:
  """Yields the first items of (item, size), until their sizes add up to `budget` or more."""
  spent = 0
  for item, size in items:
    if spent >= budget:
      return
    spent += size
    yield item


def _encoded(
  records: Iterable[dict[str, Any]], tokenizer: Tokenizer, batch_documents: int
) -> Iterator[tuple[tuple[dict[str, Any], list[int]], int]]:
  """Yields ((record, its ids), their number with BOS and EOS, which the ids lack)."""
  remaining = iter(records)
  while batch := list(itertools.islice(remaining, batch_documents)):
    for record, ids in zip(batch, tokenizer.encode_batch([r["text"] for r in batch])):
      yield (record, ids), len(ids) + 2


def open_tokenizer(artifact: Artifact) -> Tokenizer:
  """Loads the tokenizer of the stage `tokenizer`."""
  return load_tokenizer(artifact.path("tokenizer"))


@section
class RowsConfig:
  """Configures the stage `rows`.

  Attributes:
    unique_tokens: size of the unique data, the first train documents.
    oracle_tokens: size of the oracle's data, which begins with the unique data; less if the corpus
      is smaller. 0 writes none.
    max_document_tokens: also lists documents up to this length, for pairing, in `unique.jsonl` and
      so on, with their numbers of tokens. 0 writes no lists.
    batch_documents: documents to tokenize at a time.
    may_fall_short: accept a corpus of fewer than `unique_tokens`.
    scores_unique: also lists the segments of the unique rows, so that a model can be scored on
      them; those of the held-out splits always are.
  """

  seq_len: Annotated[int, Field(ge=2)]
  unique_tokens: Annotated[int, Field(ge=1)]
  oracle_tokens: Annotated[int, Field(ge=0)] = 0
  max_document_tokens: Annotated[int, Field(ge=0)] = 0
  batch_documents: Annotated[int, Field(ge=1)]
  may_fall_short: bool = False
  scores_unique: bool = False


def rows(context: Context, config: RowsConfig) -> dict[str, Any]:
  """Packs BOS document EOS into rows: unique data, oracle data and the held-out splits.

  Writes `unique.array_record`, `oracle.array_record`, `validation...` and `test...`, the latter two
  with the documents of their segments. The order of the train documents is random, so a smaller
  budget is a random subset of a larger one.

  Differs from the continued pretraining of the EntiGraph paper (arXiv 2409.07431): rows hold whole
  documents where they fit, and attention does not cross documents; there, blocks are cut from one
  long concatenation, without a mask.
  """
  tokenizer = open_tokenizer(context.inputs["tokenizer"])
  documents = context.inputs["documents"]
  # Name -> (split, token budget).
  parts: dict[str, tuple[str, float | int]] = {"unique": ("train", config.unique_tokens)}
  if config.oracle_tokens:
    parts["oracle"] = ("train", config.oracle_tokens)
  parts |= {name: (name, float("inf")) for name in split.HELD_OUT}
  summary: dict[str, Any] = {}
  with context.progress.track(None, label=context.name, unit="tokens") as bar:

    def encoded(split_name: str, budget: float | int) -> Iterator[tuple[dict[str, Any], list[int]]]:
      """Yields the first documents of a split, up to `budget` tokens with BOS and EOS."""
      records = split_records(documents, split_name)
      found = _encoded(records, tokenizer, config.batch_documents)
      for record, ids in within_budget(found, budget):
        bar.update(len(ids))
        yield record, ids

    for name, (split_name, budget) in parts.items():
      examples = (
        packing.document_example(ids, tokenizer, label=label(record))
        for record, ids in encoded(split_name, budget)
      )
      summary[name] = write_packed(
        context,
        name,
        examples,
        config.seq_len,
        tokenizer.pad_id,
        is_scored=name in split.HELD_OUT or (name == "unique" and config.scores_unique),
      )
      if config.max_document_tokens and name != "oracle":
        # Tokenized a second time: a list in memory would hold the whole corpus.
        listed = (
          {**record, "num_tokens": len(ids)}
          for record, ids in encoded(split_name, budget)
          if len(ids) <= config.max_document_tokens
        )
        context.writer.write_jsonl(f"{name}.jsonl", listed)
  found = summary["unique"]["tokens"]
  if found < config.unique_tokens and not config.may_fall_short:
    raise ValueError(
      f"unique_tokens={config.unique_tokens}, and the train documents hold {found}. Lower "
      f"unique_tokens to that, or give the corpus more text and use a new workdir, since this one "
      f"keeps the corpus as it was"
    )
  return summary


def label(record: dict[str, Any]) -> packing.Label:
  """Returns the label of a document."""
  return packing.Label(record["id"], record["group"], len(record["text"].encode()))


def write_packed(
  context: Context,
  name: str,
  examples: Iterable[packing.Example],
  seq_len: int,
  pad_id: int,
  *,
  keep_order: bool = False,
  is_scored: bool = False,
) -> dict[str, int]:
  """Packs examples into the shard `<name>.array_record`; returns its `packing.row_counts`.

  Args:
    is_scored: also write `<name>.segments.jsonl`, which `rows.open_labeled` reads; the examples
      need labels.
  """
  shard, listed = name + rows_lib.SUFFIX, name + rows_lib.SEGMENTS
  if not context.writer.has(shard) or (is_scored and not context.writer.has(listed)):
    packed = packing.pack_labeled(
      examples, seq_len=seq_len, pad_id=pad_id, num_open_rows=1 if keep_order else 32
    )
    segments: list[dict[str, Any]] = []

    def packed_rows() -> Iterator[packing.Row]:
      for number, (row, of_row) in enumerate(packed):
        if is_scored:
          segments.extend(rows_lib.segments(number, of_row))
        yield row

    if context.writer.has(shard):
      collections.deque(packed_rows(), maxlen=0)  # a run that ended between the two shards
    else:
      with context.writer.shard(shard) as (path, counts):
        counts.update(rows_lib.write_rows(path, packed_rows()))
    if is_scored:
      context.writer.write_jsonl(listed, segments)
  return context.writer.counts(shard)
