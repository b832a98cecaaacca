"""Stages of synthetic bootstrapped pretraining, each after the config sections that it reads."""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from pydantic import Field

from selfimprove_jax.data import mixture, packing, rows
from selfimprove_jax.data.tokenizer import Tokenizer
from selfimprove_jax.evaluation import statistics
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.common import models
from selfimprove_jax.pipelines.common.text import open_tokenizer, write_packed
from selfimprove_jax.pipelines.sbp.comparison import conditioning_gap
from selfimprove_jax.retrieval import ann, embedding
from selfimprove_jax.retrieval import pairs as pairing
from selfimprove_jax.runs.artifacts import Artifact
from selfimprove_jax.runs.shards import ShardLoop
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime import partitioning
from selfimprove_jax.runtime.config import parse, section
from selfimprove_jax.runtime.partitioning import LocalMeshConfig, MeshConfig
from selfimprove_jax.runtime.progress import Bar
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import Completion, Request, SamplingConfig
from selfimprove_jax.synthesis import data_quality, filters, sbp
from selfimprove_jax.training.config import TrainingConfig

PARTS = ("unique", "validation", "test")
"""Parts of the corpus whose documents are paired, each with documents of the same part."""

Record = dict[str, Any]
Count = Annotated[int, Field(ge=1)]


def paired_documents(tokens: Artifact, part: str) -> list[Record]:
  """Returns the documents of a part that are short enough to pair, with `num_tokens`."""
  return list(tokens.read_jsonl(f"{part}.jsonl"))


@section
class TfidfEmbeddingsConfig:
  """Configures `tfidf_embeddings`."""

  dim: int
  seed: int


def tfidf_embeddings(context: Context, config: TfidfEmbeddingsConfig) -> dict[str, Any]:
  """Embeds documents by TF-IDF and an SVD, which are fitted on the unique documents."""
  texts = [r["text"] for r in paired_documents(context.inputs["tokens"], "unique")]
  embed = embedding.TfidfSvd.fit(texts, dim=config.dim, seed=config.seed)
  return _write_embeddings(context, embed, method="tfidf_svd", flops_per_token=0.0)


@section
class ModelEmbeddingsConfig:
  """Configures `model_embeddings`."""

  mesh: MeshConfig
  batch_size: int
  seq_len: int


def model_embeddings(context: Context, config: ModelEmbeddingsConfig) -> dict[str, Any]:
  """Embeds documents by the mean hidden state of the seed model.

  Differs from the paper, which embeds with Qwen3-Embedding-0.6B.
  """
  mesh = config.mesh.make()
  model, params = models.load_model(context.inputs["seed"], mesh)
  tokenizer = open_tokenizer(context.inputs["tokenizer"])

  @functools.partial(jax.jit, out_shardings=partitioning.replicated(mesh))
  def hidden(
    params: Any,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
  ) -> Float[Array, "B T D"]:
    with partitioning.axis_rules():
      hidden_BTD, _ = model.apply(
        {"params": params}, tokens_BT, positions_BT, segment_ids_BT, logits=False
      )
    return hidden_BTD

  def embed(texts: Sequence[str]) -> np.ndarray:
    with jax.set_mesh(mesh):
      return embedding.mean_pooled(
        functools.partial(hidden, params),
        [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(texts)],
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        pad_id=tokenizer.pad_id,
      )

  flops_per_token = model.c.forward_flops_per_token(config.seq_len)
  return _write_embeddings(context, embed, method="seed_model", flops_per_token=flops_per_token)


def _write_embeddings(
  context: Context,
  embed: Callable[[Sequence[str]], np.ndarray],
  *,
  method: str,
  flops_per_token: float | int,
) -> dict[str, Any]:
  num_tokens = 0
  for part in PARTS:
    documents = paired_documents(context.inputs["tokens"], part)
    num_tokens += sum(r["num_tokens"] for r in documents)
    shard = f"{part}.zarr"
    if not context.writer.has(shard):
      embeddings_CE = embed([r["text"] for r in documents])
      with context.writer.shard(shard) as (path, counts):
        embedding.write_embeddings(path, embeddings_CE)
        counts["records"] = len(embeddings_CE)
  return {"method": method, "tokens": num_tokens, "flops": flops_per_token * num_tokens}


@section
class PairsConfig:
  """Selects pairs of related documents.

  Attributes:
    recall_sample: queries whose neighbors are compared with those of exact search.
    max_gap_pairs: held-out pairs, evenly spaced, that the conditioning gap is measured on.
  """

  search: ann.SearchConfig
  filters: pairing.PairFilterConfig
  recall_sample: Count
  max_gap_pairs: Count


@section
class PairsStageConfig(PairsConfig):
  """Configures `pairs`."""

  pair_tokens: int
  shingle_size: int
  seed: int


def pairs(context: Context, config: PairsStageConfig) -> dict[str, Any]:
  """Pairs the documents of each part with each other, and packs the pairs into training rows.

  Writes `<part>.jsonl` and `random-<part>.jsonl` (a control: the same documents, paired at random);
  packed rows of both for unique and validation; and the rows that measure the conditioning gap,
  `gap-true` and `gap-random`, which hold the same held-out d2's in the same order, after their
  nearest neighbor and after another document.
  """
  tokenizer = open_tokenizer(context.inputs["tokenizer"])
  summary: dict[str, Any] = {"counts": {}, "recall": {}}
  for part in PARTS:
    documents = {r["id"]: r for r in paired_documents(context.inputs["tokens"], part)}
    store = embedding.open_embeddings(context.inputs["embeddings"].path(f"{part}.zarr"))
    embeddings_CE = np.asarray(store[:].read().result())
    nearest, random, counts, recall = _pair(list(documents.values()), embeddings_CE, config)
    summary["counts"][part] = counts
    summary["recall"][part] = {"value": recall[0], "stderr": recall[1], "unit": "share"}
    context.writer.write_jsonl(f"{part}.jsonl", nearest)
    context.writer.write_jsonl(f"random-{part}.jsonl", random)
    if part == "test":
      # Both lists have the same d2's, so sorting by d2 aligns them.
      stride = -(-len(nearest) // config.max_gap_pairs)
      by_name = {"gap-true": nearest, "gap-random": random}
      by_name = {
        name: sorted(chosen, key=lambda pair: pair["d2"])[::stride]
        for name, chosen in by_name.items()
      }
    else:
      by_name = {f"nearest-{part}": nearest, f"random-{part}": random}
    for name, chosen in by_name.items():
      summary[name] = write_packed(
        context,
        name,
        _pair_examples(chosen, documents, tokenizer),
        config.pair_tokens,
        tokenizer.pad_id,
        keep_order=part == "test",
      )
  return summary


def _pair(
  documents: list[Record], embeddings_CE: np.ndarray, config: PairsStageConfig
) -> tuple[list[pairing.Pair], list[pairing.Pair], dict[str, int], tuple[float, float]]:
  """Returns nearest pairs, random pairs, counts of what was filtered, and the search's recall."""
  num_neighbors = min(config.search.num_neighbors + 1, len(documents))  # each finds itself
  search = dataclasses.replace(config.search, num_neighbors=num_neighbors)
  neighbors = ann.find_neighbors(embeddings_CE, embeddings_CE, search)
  recall = ann.measure_recall(
    embeddings_CE, embeddings_CE, neighbors, sample_size=config.recall_sample, seed=config.seed
  )
  nearest, counts = pairing.make_pairs(
    neighbors,
    documents,
    documents,
    config.filters,
    shingle_size=config.shingle_size,
    max_pair_tokens=config.pair_tokens,
  )
  random = pairing.random_pairs(
    nearest,
    lengths={r["id"]: r["num_tokens"] for r in documents},
    max_pair_tokens=config.pair_tokens,
    seed=config.seed,
  )
  return nearest, random, counts, recall


def _pair_examples(
  chosen: Sequence[pairing.Pair], documents: dict[str, Record], tokenizer: Tokenizer
) -> Iterator[packing.Example]:
  for pair in chosen:
    d1_ids, d2_ids = (tokenizer.encode(documents[pair[d]]["text"]) for d in ("d1", "d2"))
    yield packing.pair_example(d1_ids, d2_ids, tokenizer)


@section
class SynthesizerConfig:
  """Tunes a synthesizer.

  Attributes:
    passes: most passes over the pairs.
    gate: conditioning gap, in nats per token, that the synthesizer should exceed.
  """

  training: TrainingConfig
  passes: Annotated[float, Field(gt=0)]
  weight_decay: Annotated[float, Field(ge=0)]
  dropout_rate: Annotated[float, Field(ge=0, lt=1)]
  gate: Annotated[float, Field(ge=0)]


@section
class SynthesizerStageConfig(SynthesizerConfig):
  """Configures `synthesizer`.

  Attributes:
    pairs: "random" is the control.
  """

  pairs: Literal["nearest", "random"]
  mesh: MeshConfig
  evaluation: models.EvaluationConfig
  seq_len: int
  seed: int


def synthesizer(context: Context, config: SynthesizerStageConfig) -> dict[str, Any]:
  """Tunes the seed model to p(d2 | d1), and measures how much of d1 it uses (SBP, section 3.1).

  The loss is on d2 and its end only. Tuning stops early when the loss on held-out pairs no longer
  falls, and keeps the best parameters.
  """
  mesh = config.mesh.make()
  seed_model, params = models.load_model(context.inputs["seed"], mesh)
  model_config = dataclasses.replace(seed_model.c, dropout_rate=config.dropout_rate)

  def open_rows(prefix: str) -> rows.RowSource:
    return rows.open_rows(context.inputs["pairs"], seq_len=config.seq_len, prefix=prefix)

  source = open_rows(f"{config.pairs}-unique.")
  summary, params = models.train(
    context,
    model_config=model_config,
    mesh=mesh,
    training=config.training,
    seq_len=config.seq_len,
    num_steps=max(1, math.ceil(config.passes * len(source) / config.training.batch_rows)),
    components=[mixture.Component("pairs", source, 1.0, repeat=True)],
    validation=open_rows(f"{config.pairs}-validation."),
    weight_decay=config.weight_decay,
    evaluation=config.evaluation,
    seed=config.seed,
    initial_params=params,
  )
  true, random = (
    models.document_losses(
      context, model_config, mesh, params, open_rows(f"gap-{d1}."), config.evaluation
    )
    for d1 in ("true", "random")
  )
  gap = conditioning_gap(true.nll_sums, random.nll_sums, true.token_counts, gate=config.gate)
  return {**summary, "conditioning": gap}


@section
class SynthesisConfig:
  """Samples synthetic documents.

  Attributes:
    target_tokens: sampling ends with the shard that reaches it.
    max_shards: fewer than `target_tokens` in this many shards is an error.
    mesh: over the devices of one process; each process samples shards of its own.
    num_slots: documents that a process samples at the same time.
    prompt_buckets: prompt lengths to compile for; the last one is the longest prompt.
  """

  target_tokens: Count
  documents_per_shard: Count
  max_shards: Count
  sampling: SamplingConfig
  mesh: LocalMeshConfig
  num_slots: Count
  prompt_buckets: Annotated[tuple[Count, ...], Field(min_length=1)]
  max_new_tokens: Count

  @property
  def max_length(self) -> int:
    """The longest prompt and its completion, in tokens."""
    return max(self.prompt_buckets) + self.max_new_tokens


@section
class SamplesStageConfig(SynthesisConfig):
  """Configures `samples`.

  Attributes:
    conditional: sample after `BOS d1 SEP`, with d1 uniform over the unique documents, instead of
      after `BOS`.
  """

  conditional: bool
  seed: int


def samples(context: Context, config: SamplesStageConfig) -> dict[str, Any]:
  """Samples documents until they hold `target_tokens` tokens.

  The seed document of a sample and its random numbers depend on `seed` and the sample's number
  alone, so the number of processes and of shards does not change its text.

  Raises:
    ValueError: `max_shards` shards hold fewer tokens than `target_tokens`.
  """
  tokenizer = open_tokenizer(context.inputs["tokenizer"])
  documents = paired_documents(context.inputs["tokens"], "unique")

  def seed_document(number: int) -> Record | None:
    if not config.conditional:
      return None
    return documents[sbp.seed_index(number, num_documents=len(documents), seed=config.seed)]

  def make_record(request: Request, completion: Completion) -> Record:
    return sbp.synthetic_record(
      request.record_id,
      source=context.folder.name,
      seed_document=seed_document(request.record_id),
      prompt=request.prompt,
      completion=completion,
      tokenizer=tokenizer,
    )

  def requests(shard: int) -> list[Request]:
    first = shard * config.documents_per_shard
    numbers = range(first, first + config.documents_per_shard)
    prompts = [sbp.unconditional_prompt(tokenizer)] * len(numbers)
    if config.conditional:
      ids = tokenizer.encode_batch([seed_document(number)["text"] for number in numbers])
      prompts = [sbp.conditional_prompt(d1_ids, tokenizer) for d1_ids in ids]
    return [
      Request(
        prompt=prompt,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        record_id=number,
        sampling=config.sampling,
      )
      for number, prompt in zip(numbers, prompts, strict=True)
    ]

  target = config.target_tokens
  with context.progress.track(target, label=context.name, unit="tokens") as bar:
    shards = context.shards(
      config.max_shards,
      count=_count_sample,
      enough=lambda totals: totals["tokens"] >= target,
      on_made_elsewhere=lambda counts: bar.update(counts["tokens"]),
    )
    make_engine = functools.partial(_make_engine, context, config, tokenizer)
    sampled = _sample_shards(
      shards, requests, make_engine, bar, shard_size=config.documents_per_shard
    )
    with contextlib.closing(sampled):
      for index, completions in zip(shards, sampled, strict=False):
        shards.write_jsonl(index, (make_record(*pair) for pair in completions))
  totals = shards.totals
  if totals["tokens"] < target:
    raise ValueError(
      f"{config.max_shards} shards ({totals['records']} documents) hold {totals['tokens']} tokens, "
      f"fewer than target_tokens={target}; raise max_shards"
    )
  model = parse(LlamaConfig, context.inputs["model"].summary["model"])
  finish = "finish/"
  return {
    "documents": totals["records"],
    "tokens": totals["tokens"],
    "prompt_tokens": totals["prompt_tokens"],
    "finish_reasons": {
      name.removeprefix(finish): totals[name] for name in sorted(totals) if name.startswith(finish)
    },
    "flops": (totals["tokens"] + totals["prompt_tokens"])
    * model.forward_flops_per_token(config.max_length),
  }


def _count_sample(record: Record) -> dict[str, int]:
  return {
    "tokens": record["num_tokens"],
    "prompt_tokens": record["num_prompt_tokens"],
    f"finish/{record['finish_reason']}": 1,
  }


def _make_engine(context: Context, config: SamplesStageConfig, tokenizer: Tokenizer) -> Engine:
  mesh = config.mesh.make()
  model, params = models.load_model(context.inputs["model"], mesh)
  return Engine(
    model,
    params,
    mesh,
    eos_ids=(tokenizer.eos_id,),
    pad_id=tokenizer.pad_id,
    num_slots=config.num_slots,
    max_length=config.max_length,
    prompt_buckets=config.prompt_buckets,
  )


def _sample_shards(
  shards: ShardLoop,
  requests: Callable[[int], list[Request]],
  make_engine: Callable[[], Engine],
  bar: Bar,
  *,
  shard_size: int,
) -> Iterator[list[tuple[Request, Completion]]]:
  """Yields the requests of each shard of this process with their completions, in order.

  The engine reads requests ahead of the shard that is being finished: while the last texts of one
  shard are sampled, slots that become free take prompts of the next, so none is idle.
  """
  engine = make_engine()  # runs at the first `next`: a finished artifact loads no model
  asked: collections.deque[list[Request]] = collections.deque()

  def all_requests() -> Iterator[Request]:
    for index in shards.upcoming():
      asked.append(requests(index))
      yield from asked[-1]

  def on_tokens(num_tokens: int) -> None:
    counts = engine.stats()
    bar.update(num_tokens, **{r: counts[r] for r in ("stop", "length", "error") if r in counts})
    shards.check_preemption()

  # Completions come in the order in which they end, each with its request's place in the stream.
  done: collections.defaultdict[int, dict[int, Completion]] = collections.defaultdict(dict)
  oldest = 0
  with contextlib.closing(engine.stream(all_requests(), on_tokens=on_tokens)) as stream:
    for number, completion in stream:
      done[number // shard_size][number % shard_size] = completion
      while len(done[oldest]) == shard_size:
        completions = done.pop(oldest)
        yield [(request, completions[i]) for i, request in enumerate(asked.popleft())]
        oldest += 1


@section
class SyntheticRowsConfig:
  """Filters and measures sampled documents."""

  filter: filters.DocumentFilterConfig
  quality: data_quality.QualityConfig


@section
class SyntheticRowsStageConfig(SyntheticRowsConfig):
  """Configures `synthetic_rows`."""

  seq_len: int
  shingle_size: int
  seed: int


def synthetic_rows(context: Context, config: SyntheticRowsStageConfig) -> dict[str, Any]:
  """Filters sampled documents, packs those that pass, and measures the quality of all of them.

  `_dropped.jsonl` holds the others, each with the reason.
  """
  tokenizer = open_tokenizer(context.inputs["tokenizer"])
  unique = [r["text"] for r in paired_documents(context.inputs["tokens"], "unique")]
  records = list(context.inputs["samples"].records())
  kept, dropped, counts = filters.filter_documents(
    records, config.filter, shingle_size=config.shingle_size, references=unique
  )
  if not kept:
    raise ValueError(
      f"the filters dropped all {len(records)} documents of {context.inputs['samples'].folder}: "
      f"{counts}; the model is too weak or the thresholds are too strict"
    )
  context.writer.write_jsonl("documents.jsonl", kept)
  context.writer.write_jsonl("_dropped.jsonl", dropped)
  examples = (packing.document_example(tokenizer.encode(r["text"]), tokenizer) for r in kept)
  packed = write_packed(context, "rows", examples, config.seq_len, tokenizer.pad_id)
  quality = _measure_quality(records, unique, config)
  return {
    "counts": counts,
    "rows": packed,
    "quality": {name: estimate.to_dict() for name, estimate in quality.items()},
  }


def _measure_quality(
  records: Sequence[Record], unique: Sequence[str], config: SyntheticRowsStageConfig
) -> dict[str, statistics.Estimate]:
  texts = [r["text"] for r in records if r["text"].strip()]
  near_duplicate = {
    "max_jaccard": config.filter.max_jaccard,
    "shingle_size": config.shingle_size,
  }
  looping = data_quality.looping(texts, max_repetition=config.filter.max_repetition)
  duplicates = data_quality.duplicates(
    texts, sample_size=config.quality.sample_size, seed=config.seed, **near_duplicate
  )
  quality = {
    "repetition": statistics.share(looping),
    "duplicates": statistics.share(duplicates),
    "copied_8_word_runs": statistics.ratio(*data_quality.copied_runs(texts, unique), "share"),
  }
  with_seed = [r for r in records if r["seed_text"]]
  if with_seed:
    copies = data_quality.copies_of_seed(
      [r["seed_text"] for r in with_seed], [r["text"] for r in with_seed], **near_duplicate
    )
    quality["pair_copying"] = statistics.share(copies)
  return quality


@section
class RelevanceStageConfig(data_quality.RelevanceConfig):
  """Configures `relevance`."""

  seed: int


def relevance(context: Context, config: RelevanceStageConfig) -> dict[str, Any]:
  """Compares how similar synthetic documents are to their seeds with the similarity of real pairs.

  Similarity is that of TF-IDF embeddings, which are fitted on the unique and the test documents.
  The real pairs are those of the test documents.
  """
  tokens = context.inputs["tokens"]
  by_id = {r["id"]: r["text"] for r in paired_documents(tokens, "test")}
  texts = [r["text"] for r in paired_documents(tokens, "unique")] + list(by_id.values())
  real = [
    (by_id[pair["d1"]], by_id[pair["d2"]])
    for pair in context.inputs["pairs"].read_jsonl("test.jsonl")
  ]
  documents = list(context.inputs["synthetic"].read_jsonl("documents.jsonl"))
  documents = documents[: config.sample_size]
  found = data_quality.similarities(
    [r["seed_text"] for r in documents],
    [r["text"] for r in documents],
    real_pairs=real[: config.sample_size],
    embed=embedding.TfidfSvd.fit(texts, dim=config.dim, seed=config.seed),
    seed=config.seed,
  )
  own, random, real_pairs = (
    statistics.mean(values, "cosine similarity")
    for values in (found.own_N, found.random_N, found.real_P)
  )
  share = statistics.retained_share(found.own_N, found.random_N, found.real_P)
  return {
    "own": own.to_dict(),
    "random": random.to_dict(),
    "real": real_pairs.to_dict(),
    "retained_share": None if share is None else share.value,
  }
