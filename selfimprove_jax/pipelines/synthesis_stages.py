"""Stages that sample: synthetic documents, and the rows made from those that pass the filters."""

from typing import Any

import jax

from selfimprove_jax import partitioning
from selfimprove_jax.data import packing
from selfimprove_jax.evaluation import data_quality
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.model_stages import load_model
from selfimprove_jax.pipelines.pair_stages import paired_documents
from selfimprove_jax.pipelines.sampled_shards import write_shards
from selfimprove_jax.pipelines.stages import Context
from selfimprove_jax.pipelines.text_stages import open_tokenizer, write_packed
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import Completion, Request
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
  num_slots: int,
  prompt_buckets: list[int],
  max_new_tokens: int,
  seed: int,
) -> dict[str, Any]:
  """Samples documents until there are `target_tokens` of them.

  A record's seed document and its randomness depend on `seed` and its number alone.

  Args:
    conditional: after `BOS d1 SEP`, each d1 uniform among the unique documents; else after `BOS`.
    target_tokens: the shard that reaches it is the last.
    mesh: of the devices of one process; every process samples by itself.
    num_slots: documents that one process samples at once.
    prompt_buckets: prompt lengths that are compiled for; the last is the longest there may be.

  Raises:
    ValueError: `max_shards` shards hold fewer tokens than `target_tokens`.
  """
  tokenizer = open_tokenizer(context.inputs["tokenizer"])
  documents = paired_documents(context.inputs["tokens"], "unique")
  config = SamplingConfig(**sampling)

  def seed_document(number: int) -> dict[str, Any]:
    return documents[sbp.seed_index(number, num_documents=len(documents), seed=seed)]

  def requests(shard: int) -> list[Request]:
    numbers = range(shard * documents_per_shard, (shard + 1) * documents_per_shard)
    prompts = [sbp.unconditional_prompt(tokenizer)] * len(numbers)
    if conditional:
      ids = tokenizer.encode_batch([seed_document(number)["text"] for number in numbers])
      prompts = [sbp.conditional_prompt(d1_ids, tokenizer) for d1_ids in ids]
    return [
      Request(
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        seed=seed,
        record_id=number,
        sampling=config,
      )
      for number, prompt in zip(numbers, prompts)
    ]

  def record(shard: int, place: int, request: Request, completion: Completion) -> dict[str, Any]:
    return sbp.synthetic_record(
      request.record_id,
      source=context.folder.name,
      seed_document=seed_document(request.record_id) if conditional else None,
      prompt=request.prompt,
      completion=completion,
      tokenizer=tokenizer,
    )

  def make_engine() -> Engine:
    on = partitioning.make_mesh(**mesh, devices=jax.local_devices())
    network, params = load_model(context.inputs["model"], on)
    return Engine(
      network,
      params,
      on,
      eos_ids=(tokenizer.eos_id,),
      pad_id=tokenizer.pad_id,
      num_slots=num_slots,
      max_length=max(prompt_buckets) + max_new_tokens,
      prompt_buckets=prompt_buckets,
    )

  totals = write_shards(
    context,
    make_engine=make_engine,
    requests=requests,
    make_record=record,
    max_shards=max_shards,
    target_tokens=target_tokens,
  )
  model = LlamaConfig(**context.inputs["model"].summary["model"])
  flops_per_token = model.forward_flops_per_token(max(prompt_buckets) + max_new_tokens)
  finish = "finish/"
  return {
    **{name: total for name, total in totals.items() if not name.startswith(finish)},
    "finish_reasons": {
      name.removeprefix(finish): totals[name] for name in sorted(totals) if name.startswith(finish)
    },
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
