"""Stages from raw text to packed rows: documents, tokenizer, rows."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from selfimprove_jax.data import corpora, packing, split
from selfimprove_jax.data import rows as rows_lib
from selfimprove_jax.data.corpora import Document, SourceConfig
from selfimprove_jax.data.split import SplitConfig
from selfimprove_jax.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_bpe
from selfimprove_jax.runs import storage
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section


@section
class CorpusConfig:
  """Selects a corpus and sets how it is split.

  Attributes:
    on_error: "raise" stops at the first bad record; "skip" leaves it out and lists it in
      `_rejected.jsonl`.
  """

  source: SourceConfig
  on_error: Literal["raise", "skip"] = "raise"
  split: SplitConfig


@section
class DocumentsConfig:
  """Configures the stage `documents`."""

  corpus: CorpusConfig
  seed: int


def documents(context: Context, config: DocumentsConfig) -> dict[str, Any]:
  """Reads a corpus, holds out groups of documents and cuts long documents into passages."""
  corpus, rejected = config.corpus, []
  options = {} if corpus.on_error == "raise" else {"on_bad": rejected.append}
  found = corpora.read_documents(corpus.source, **options)
  with context.progress.track(None, label="documents", unit="documents") as bar:

    def counted() -> Iterator[Document]:
      for document in found:
        yield document
        bar.update(1)

    summary = split.write_split(
      counted(),
      context.writer,
      corpus.split,
      seed=config.seed,
      source=corpus.source.kind,
      scratch=storage.scratch(context.folder / ".scratch"),
    )
  context.writer.write_jsonl("_rejected.jsonl", ({"message": message} for message in rejected))
  return {**summary, "rejected": len(rejected)}


def split_records(documents: Artifact, split_name: str) -> Iterator[dict[str, Any]]:
  """Yields the documents of a split ("train", "validation" or "test") in order."""
  for name in sorted(documents.shards):
    if name.startswith(f"{split_name}-"):
      yield from documents.read_jsonl(name)


def tokenizer(context: Context, config: TokenizerConfig) -> dict[str, Any]:
  """Trains a byte-level BPE on the first train documents, or copies an existing tokenizer."""
  if config.path is None:
    records = split_records(context.inputs["documents"], "train")
    result = train_bpe(_first_chars(records, config.train_chars), vocab_size=config.vocab_size)
  else:
    result = load_tokenizer(config.path, config.special_tokens)
  if not context.writer.has("tokenizer"):
    with context.writer.shard("tokenizer") as (folder, counts):
      result.save(folder)
      counts["records"] = result.vocab_size
  return {"vocab_size": result.vocab_size, "trained": config.path is None}


def _first_chars(records: Iterable[dict[str, Any]], num_chars: int) -> Iterator[str]:
  seen = 0
  for record in records:
    if seen >= num_chars:
      return
    seen += len(record["text"])
    yield record["text"]


def open_tokenizer(artifact: Artifact) -> Tokenizer:
  """Loads the tokenizer of the stage `tokenizer`."""
  return load_tokenizer(artifact.path("tokenizer"))


@section
class RowsConfig:
  """Configures the stage `rows`.

  Attributes:
    unique_tokens: the first train documents up to this many tokens are the unique data.
    oracle_tokens: the same for the oracle's data, which begins with the unique data; a smaller
      corpus gives less, which the summary shows. 0 writes none.
    max_document_tokens: documents up to this length, which pairing may use, are also listed in
      `unique.jsonl` and so on, with their numbers of tokens. 0 writes no lists.
    batch_documents: documents to tokenize at a time.
    may_fall_short: accept a corpus of fewer than `unique_tokens`.
  """

  seq_len: Annotated[int, Field(ge=2)]
  unique_tokens: Annotated[int, Field(ge=1)]
  oracle_tokens: Annotated[int, Field(ge=0)] = 0
  max_document_tokens: Annotated[int, Field(ge=0)] = 0
  batch_documents: Annotated[int, Field(ge=1)]
  may_fall_short: bool = False


def rows(context: Context, config: RowsConfig) -> dict[str, Any]:
  """Packs BOS document EOS into rows: unique data, oracle data and the held-out splits.

  Writes `unique.array_record`, `oracle.array_record`, `validation...` and `test...`. The order of
  the train documents is random, so fewer tokens are a random part of more.

  Differs from the continued pretraining of the EntiGraph paper (arXiv 2409.07431): rows hold whole
  documents where they fit, and attention does not cross documents; there, blocks are cut from one
  long concatenation, without a mask.

  Raises:
    ValueError: the corpus has fewer than `unique_tokens` and may not fall short.
  """
  tokenizer = open_tokenizer(context.inputs["tokenizer"])
  documents = context.inputs["documents"]
  # Name -> (split, token budget).
  parts: dict[str, tuple[str, float | int]] = {"unique": ("train", config.unique_tokens)}
  if config.oracle_tokens:
    parts["oracle"] = ("train", config.oracle_tokens)
  parts |= {name: (name, float("inf")) for name in split.HELD_OUT}
  summary: dict[str, Any] = {}

  def encoded(split_name: str, budget: float | int) -> Iterator[tuple[dict[str, Any], list[int]]]:
    for record, ids in encoded_records(
      documents, split_name, tokenizer, budget, batch_documents=config.batch_documents
    ):
      bar.update(len(ids))
      yield record, ids

  with context.progress.track(None, label=context.name, unit="tokens") as bar:
    for name, (split_name, budget) in parts.items():
      examples = (
        packing.document_example(ids, tokenizer) for _, ids in encoded(split_name, budget)
      )
      summary[name] = write_packed(context, name, examples, config.seq_len, tokenizer.pad_id)
      if config.max_document_tokens and name != "oracle":
        # Tokenized a second time: a list in memory would hold the whole corpus.
        context.writer.write_jsonl(
          f"{name}.jsonl",
          (
            {**record, "num_tokens": len(ids)}
            for record, ids in encoded(split_name, budget)
            if len(ids) <= config.max_document_tokens
          ),
        )
  found = summary["unique"]["tokens"]
  if found < config.unique_tokens and not config.may_fall_short:
    raise ValueError(
      f"unique_tokens={config.unique_tokens}, and the train documents hold {found}. Lower "
      f"unique_tokens to that, or give the corpus more text and use a new workdir, since this one "
      f"keeps the corpus as it was"
    )
  return summary


def encoded_records(
  documents: Artifact,
  split_name: str,
  tokenizer: Tokenizer,
  budget: float | int,
  *,
  batch_documents: int,
) -> Iterator[tuple[dict[str, Any], list[int]]]:
  """Yields the first documents of a split, up to `budget` tokens with BOS and EOS.

  The ids are without BOS and EOS.
  """
  spent = 0
  records = split_records(documents, split_name)
  while batch := list(itertools.islice(records, batch_documents)):
    for record, ids in zip(batch, tokenizer.encode_batch([r["text"] for r in batch])):
      if spent >= budget:
        return
      spent += len(ids) + 2  # BOS and EOS
      yield record, ids


def write_packed(
  context: Context,
  name: str,
  examples: Iterable[packing.Example],
  seq_len: int,
  pad_id: int,
  *,
  keep_order: bool = False,
) -> dict[str, int]:
  """Packs examples into the shard `<name>.array_record`; returns its `packing.row_counts`."""
  shard = name + rows_lib.SUFFIX
  if not context.writer.has(shard):
    packed = packing.pack(
      examples, seq_len=seq_len, pad_id=pad_id, num_open_rows=1 if keep_order else 32
    )
    with context.writer.shard(shard) as (path, counts):
      counts.update(rows_lib.write_rows(path, packed))
  return context.writer.counts(shard)
