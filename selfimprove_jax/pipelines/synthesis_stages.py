"""Stages that sample: synthetic documents, and the rows made from those that pass the filters."""

import collections
import functools
from collections.abc import Iterator
from typing import Any

from selfimprove_jax import partitioning
from selfimprove_jax.data import packing
from selfimprove_jax.evaluation import data_quality
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.model_stages import load_model
from selfimprove_jax.pipelines.pair_stages import paired_documents
from selfimprove_jax.pipelines.stages import Context
from selfimprove_jax.pipelines.text_stages import open_tokenizer, write_packed
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.sampler import SamplingConfig
from selfimprove_jax.synthesis import filters, sbp


def sample(
  context: Context,
  *,
  conditional: bool,
  target_tokens: int,
  documents_per_shard: int,
  max_shards: int,
  mesh: dict[str, int],
  sampling: dict[str, Any],
  batch_size: int,
  prompt_buckets: list[int],
  max_new_tokens: int,
  seed: int,
) -> dict[str, Any]:
  """Samples documents until there are `target_tokens` of them.

  A shard is the unit of resumption: those that are whole are not sampled again. A record's seed
  document and its randomness depend on `seed` and its number alone.

  Args:
    conditional: after `BOS d1 SEP`, each d1 uniform among the unique documents; else after `BOS`.
    target_tokens: sampling ends with the shard that reaches it.

  Raises:
    ValueError: `max_shards` shards hold fewer tokens than `target_tokens`.
  """
  tokenizer = open_tokenizer(context.inputs["tokenizer"])
  documents = paired_documents(context.inputs["tokens"], "unique")

  @functools.cache
  def engine() -> Engine:  # not made where every shard is there already
    on = partitioning.make_mesh(**mesh)
    network, params = load_model(context.inputs["model"], on)
    return Engine(
      network,
      params,
      on,
      sampling=SamplingConfig(**sampling),
      eos_id=tokenizer.eos_id,
      pad_id=tokenizer.pad_id,
      batch_size=batch_size,
      prompt_buckets=prompt_buckets,
      max_new_tokens=max_new_tokens,
    )

  def synthesize(numbers: range) -> Iterator[dict[str, Any]]:
    seeds: list[dict[str, Any] | None] = [None] * len(numbers)
    prompts = [sbp.unconditional_prompt(tokenizer)] * len(numbers)
    if conditional:
      chosen = (sbp.seed_index(n, num_documents=len(documents), seed=seed) for n in numbers)
      seeds = [documents[index] for index in chosen]
      ids = tokenizer.encode_batch([document["text"] for document in seeds])
      prompts = [sbp.conditional_prompt(d1_ids, tokenizer) for d1_ids in ids]
    completions = engine().generate(
      prompts, seed=seed, record_ids=numbers, on_batch=lambda _, tokens: bar.update(tokens)
    )
    for number, document, prompt, completion in zip(numbers, seeds, prompts, completions):
      yield sbp.synthetic_record(
        number,
        source=context.folder.name,
        seed_document=document,
        prompt=prompt,
        completion=completion,
        tokenizer=tokenizer,
      )

  totals: collections.Counter[str] = collections.Counter()
  finish_reasons: collections.Counter[str] = collections.Counter()
  with context.progress.track(target_tokens, label=context.name, unit="tokens") as bar:
    for shard in range(max_shards):
      if totals["tokens"] >= target_tokens:
        break
      name = f"{shard:05d}.jsonl"
      first = shard * documents_per_shard
      context.writer.write_jsonl(name, synthesize(range(first, first + documents_per_shard)))
      for record in context.writer.read_jsonl(name):
        totals["documents"] += 1
        totals["tokens"] += record["num_tokens"]
        totals["prompt_tokens"] += record["num_prompt_tokens"]
        finish_reasons[record["finish_reason"]] += 1
  if totals["tokens"] < target_tokens:
    raise ValueError(
      f"{max_shards} shards of {documents_per_shard} documents hold {totals['tokens']} tokens, "
      f"target_tokens={target_tokens} were asked for; raise max_shards"
    )
  model = LlamaConfig(**context.inputs["model"].summary["model"])
  flops_per_token = model.forward_flops_per_token(max(prompt_buckets) + max_new_tokens)
  return {
    **totals,
    "finish_reasons": dict(sorted(finish_reasons.items())),
    "flops": (totals["tokens"] + totals["prompt_tokens"]) * flops_per_token,
  }


def synthetic_rows(
  context: Context,
  *,
  seq_len: int,
  filter: dict[str, Any],
  quality: dict[str, Any],
  seed: int,
) -> dict[str, Any]:
  """Filters sampled documents and packs what is kept; dropped ones stay beside, with the reason."""
  tokenizer = open_tokenizer(context.inputs["tokenizer"])
  unique = [r["text"] for r in paired_documents(context.inputs["tokens"], "unique")]
  records = list(context.inputs["samples"].records())
  kept, dropped, counts = filters.filter_documents(records, references=unique, **filter)
  if not kept:
    raise ValueError(
      f"the filters dropped all {len(records)} documents of {context.inputs['samples'].folder}: "
      f"{counts}; the model is too weak or the thresholds are too strict"
    )
  context.writer.write_jsonl("documents.jsonl", kept)
  context.writer.write_jsonl("_dropped.jsonl", dropped)
  examples = (packing.document_example(tokenizer.encode(r["text"]), tokenizer) for r in kept)
  packed = write_packed(context, "rows", examples, seq_len, tokenizer.pad_id)
  texts = [r["text"] for r in records if r["text"].strip()]
  shingle_size, max_jaccard = filter["shingle_size"], filter["max_jaccard"]
  measured = {
    "repetition": data_quality.repetition_rate(texts, max_repetition=filter["max_repetition"]),
    "duplicates": data_quality.duplicate_rate(
      texts, max_jaccard=max_jaccard, shingle_size=shingle_size, seed=seed, **quality
    ),
    "copied_8_word_runs": data_quality.copied_share(texts, unique),
  }
  with_seed = [r for r in records if r["seed_text"]]
  if with_seed:
    measured["pair_copying"] = data_quality.pair_copying_rate(
      [r["seed_text"] for r in with_seed],
      [r["text"] for r in with_seed],
      max_jaccard=max_jaccard,
      shingle_size=shingle_size,
    )
  return {
    "counts": counts,
    "rows": packed,
    "quality": {name: estimate.to_dict() for name, estimate in measured.items()},
  }


def relevance(context: Context, *, dim: int, sample_size: int, seed: int) -> dict[str, Any]:
  """How much of a real pair's topical similarity a synthesis has to its seed.

  Measured with TF-IDF fitted on the unique and held-out documents; real pairs are the held-out
  ones.
  """
  from selfimprove_jax.retrieval.embedding import TfidfSvd

  tokens = context.inputs["tokens"]
  by_id = {r["id"]: r["text"] for r in paired_documents(tokens, "test")}
  texts = [r["text"] for r in paired_documents(tokens, "unique")] + list(by_id.values())
  real = [
    (by_id[pair["d1"]], by_id[pair["d2"]])
    for pair in context.inputs["pairs"].read_jsonl("test.jsonl")
  ]
  documents = list(context.inputs["synthetic"].read_jsonl("documents.jsonl"))[:sample_size]
  found = data_quality.topical_relevance(
    [r["seed_text"] for r in documents],
    [r["text"] for r in documents],
    real_pairs=real[:sample_size],
    embed=TfidfSvd.fit(texts, dim=dim, seed=seed),
    seed=seed,
  )
  share = found.retained_share
  return {
    "own": found.own_seed.to_dict(),
    "random": found.random_seed.to_dict(),
    "real": found.real_pairs.to_dict(),
    "retained_share": None if share is None else share.value,
  }
