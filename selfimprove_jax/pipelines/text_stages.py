"""Stages from raw text to packed rows: documents, tokenizer, rows."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from selfimprove_jax import artifacts, storage
from selfimprove_jax.data import corpora, packing, rows, split
from selfimprove_jax.data import tokenizer as tokenizers
from selfimprove_jax.pipelines.stages import Context

HELD_OUT = ("validation", "test")


def role_records(documents: artifacts.Artifact, role: str) -> Iterator[dict[str, Any]]:
  """The documents of `train`, `validation` or `test`, in order."""
  for name in sorted(documents.shards):
    if name.startswith(f"{role}-"):
      yield from documents.read_jsonl(name)


def documents(
  context: Context, *, source: str, options: dict[str, Any], on_error: str, split: dict[str, Any]
) -> dict[str, Any]:
  """Reads a corpus, splits off held-out groups and cuts long documents."""
  rejected: list[dict[str, Any]] = []
  corpus = corpora.read_corpus(
    source,
    on_error=on_error,
    on_rejected=lambda message: rejected.append({"message": message}),
    **options,
  )
  with context.progress.track(None, label="documents", unit="documents") as bar:
    summary = _write_split(_counted(corpus, bar), context, source, split)
  context.writer.write_jsonl("_rejected.jsonl", rejected)
  return {**summary, "rejected": len(rejected)}


def _write_split(corpus, context, source, options):
  return split.write_split(
    corpus,
    context.writer,
    source=source,
    scratch=storage.scratch(context.folder / ".scratch"),
    **options,
  )


def _counted(items: Iterable, bar) -> Iterator:
  for item in items:
    yield item
    bar.update(1)


def tokenizer(
  context: Context,
  *,
  path: str | None,
  special_tokens: dict[str, str],
  vocab_size: int,
  train_chars: int,
) -> dict[str, Any]:
  """Trains a byte-level BPE on the first training documents, or takes one that exists.

  Args:
    path: of a tokenizer's folder, or its hub name; None trains one.
    special_tokens: for an existing tokenizer: `bos_token` and so on, of `load_tokenizer`.
    vocab_size: of a new one.
    train_chars: how much text a new one sees. The first documents are also the first unique data;
      keep it below the unique data, so that the tokenizer knows no more text than the baseline.
  """
  if path is None:
    texts = _first_chars(role_records(context.inputs["documents"], "train"), train_chars)
    result = tokenizers.train_bpe(texts, vocab_size=vocab_size)
  else:
    result = tokenizers.load_tokenizer(path, **special_tokens)
  if not context.writer.has("tokenizer"):
    with context.writer.shard("tokenizer") as (folder, counts):
      result.save(folder)
      counts["records"] = result.vocab_size
  return {"vocab_size": result.vocab_size, "trained": path is None}


def _first_chars(records, num_chars):
  seen = 0
  for record in records:
    if seen >= num_chars:
      return
    seen += len(record["text"])
    yield record["text"]


def open_tokenizer(artifact: artifacts.Artifact) -> tokenizers.Tokenizer:
  return tokenizers.load_tokenizer(artifact.path("tokenizer"))


def encoded_records(
  documents: artifacts.Artifact,
  role: str,
  tokenizer: tokenizers.Tokenizer,
  budget: float | int,
  *,
  batch_documents: int,
) -> Iterator[tuple[dict[str, Any], list[int]]]:
  """The first documents of a role up to `budget` tokens with BOS and EOS; ids are without these."""
  spent = 0
  records = role_records(documents, role)
  while batch := list(itertools.islice(records, batch_documents)):
    for record, ids in zip(batch, tokenizer.encode_batch([r["text"] for r in batch])):
      if spent >= budget:
        return
      spent += len(ids) + 2  # BOS and EOS
      yield record, ids


def tokens(
  context: Context,
  *,
  seq_len: int,
  unique_tokens: int,
  oracle_tokens: int,
  max_document_tokens: int,
  batch_documents: int,
) -> dict[str, Any]:
  """Packs the unique data, the oracle's data (which begins with it) and the held-out documents.

  Writes `unique.array_record`, `oracle.array_record`, `validation...` and `test...`, and the
  documents that pairing may use, with their numbers of tokens, as `unique.jsonl` and so on.

  Args:
    unique_tokens: the first training documents up to this many tokens.
    oracle_tokens: likewise; less if the corpus ends before, which the summary shows.
    max_document_tokens: longer documents are not paired; they are trained on all the same.
    batch_documents: tokenized at a time.

  Raises:
    ValueError: the corpus has fewer than `unique_tokens`.
  """
  tokenizer = open_tokenizer(context.inputs["tokenizer"])
  documents = context.inputs["documents"]
  summary: dict[str, Any] = {}

  def encoded(role: str, budget: float | int) -> Iterator[tuple[dict[str, Any], list[int]]]:
    records = encoded_records(documents, role, tokenizer, budget, batch_documents=batch_documents)
    for record, ids in records:
      bar.update(len(ids))
      yield record, ids

  parts = {
    "unique": ("train", unique_tokens),
    "oracle": ("train", oracle_tokens),
    "validation": ("validation", float("inf")),
    "test": ("test", float("inf")),
  }
  with context.progress.track(None, label="tokens", unit="tokens") as bar:
    for part, (role, budget) in parts.items():
      examples = (packing.document_example(ids, tokenizer) for _, ids in encoded(role, budget))
      summary[part] = write_packed(context, part, examples, seq_len, tokenizer.pad_id)
      if part != "oracle":
        context.writer.write_jsonl(
          f"{part}.jsonl",
          (
            {**record, "num_tokens": len(ids)}
            for record, ids in encoded(role, budget)
            if len(ids) <= max_document_tokens
          ),
        )
  if summary["unique"]["tokens"] < unique_tokens:
    raise ValueError(
      f"the corpus is smaller than the budget asks: unique_tokens={unique_tokens}, and the "
      f"training documents hold {summary['unique']['tokens']}. Give it more text, or lower "
      f"unique_tokens to that, and begin in another workdir: this one holds the corpus as it was"
    )
  return summary


def write_packed(
  context: Context,
  name: str,
  examples: Iterable[packing.Example],
  seq_len: int,
  pad_id: int,
  *,
  keep_order: bool = False,
) -> dict[str, int]:
  """Packs examples into the shard `<name>.array_record`; gives `packing.row_counts` of it."""
  shard = name + rows.SUFFIX
  if not context.writer.has(shard):
    packed = packing.pack(
      examples, seq_len=seq_len, pad_id=pad_id, num_open_rows=1 if keep_order else 32
    )
    with context.writer.shard(shard) as (path, counts):
      counts.update(rows.write_rows(path, packed))
  return context.writer.counts(shard)
