"""Stages of synthetic bootstrapped pretraining, each after the config sections that it reads."""

import collections
import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from pydantic import Field

from selfimprove_jax.data import mixture, packing, rows, split
from selfimprove_jax.data.decontamination import DecontaminationConfig, Findings, open_benchmarks
from selfimprove_jax.data.tokenizer import Tokenizer
from selfimprove_jax.evaluation import statistics
from selfimprove_jax.models.llama import LlamaConfig
from selfimprove_jax.pipelines.common import models
from selfimprove_jax.pipelines.common.text import CONTAMINATED, open_tokenizer, write_packed
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
  """Embeds documents by TF-IDF and an SVD, both fitted on the unique documents."""
  texts = [r["text"] for r in paired_documents(context.inputs["tokens"], "unique")]
  embed = embedding.TfidfSvd.fit(texts, dim=config.dim, seed=config.seed)
  return _write_embeddings(context, embed, "tfidf_svd", lambda num_tokens: 0)


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

  def flops(num_tokens: int) -> int:
    return _forward_flops(model.c, min(num_tokens + 1, config.seq_len))  # with BOS

  return _write_embeddings(context, embed, "seed_model", flops)


def _write_embeddings(
  context: Context,
  embed: Callable[[Sequence[str]], np.ndarray],
  method: str,
  flops_of: Callable[[int], int],
) -> dict[str, Any]:
  """Writes the embeddings of each part; `flops_of` maps the tokens of a document to its cost."""
  num_tokens = flops = 0
  for part in PARTS:
    documents = paired_documents(context.inputs["tokens"], part)
    num_tokens += sum(r["num_tokens"] for r in documents)
    flops += sum(flops_of(r["num_tokens"]) for r in documents)
    shard = f"{part}.zarr"
    if not context.writer.has(shard):
      embeddings_CE = embed([r["text"] for r in documents])
      with context.writer.shard(shard) as (path, counts):
        embedding.write_embeddings(path, embeddings_CE)
        counts["records"] = len(embeddings_CE)
  return {"method": method, "tokens": num_tokens, "flops": flops}


def _forward_flops(model: LlamaConfig, num_tokens: int) -> int:
  """Counts one forward pass over a text, in which a token attends to those before it."""
  return num_tokens * model.forward_flops_per_token(num_tokens)


@section
class PairsConfig:
  """Configures the selection of pairs of related documents.

  Attributes:
    recall_sample: number of queries that estimate recall against exact search.
    max_gap_pairs: number of held-out pairs, evenly spaced, that measure the conditioning gap.
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
  nearest neighbor and after another document. The summary holds for each part the counts of the
  filters, how the neighbors were found and with what recall, and the share of pairs that join
  passages of one group.
  """
  tokenizer = open_tokenizer(context.inputs["tokenizer"])
  summary: dict[str, Any] = {"counts": {}, "method": {}, "recall": {}, "same_group_share": {}}
  for part in PARTS:
    documents = {r["id"]: r for r in paired_documents(context.inputs["tokens"], part)}
    store = embedding.open_embeddings(context.inputs["embeddings"].path(f"{part}.zarr"))
    embeddings_CE = np.asarray(store[:].read().result())
    nearest, random, found = _pair(documents, embeddings_CE, config)
    for name, value in found.items():
      summary[name][part] = value
    context.writer.write_jsonl(f"{part}.jsonl", nearest)
    context.writer.write_jsonl(f"random-{part}.jsonl", random)
    packed = {f"nearest-{part}": nearest, f"random-{part}": random}
    if part == "test":
      # Both lists have the same d2's, so sorting by d2 aligns them.
      stride = -(-len(nearest) // config.max_gap_pairs)
      true, other = (sorted(p, key=operator.itemgetter("d2"))[::stride] for p in (nearest, random))
      packed = {"gap-true": true, "gap-random": other}
    for name, chosen in packed.items():
      summary[name] = write_packed(
        context,
        name,
        _pair_examples(chosen, documents, tokenizer),
        config.pair_tokens,
        tokenizer.pad_id,
        keep_order=part == "test",
        is_scored=part in split.HELD_OUT,
      )
  return summary


def _pair(
  documents: dict[str, Record], embeddings_CE: np.ndarray, config: PairsStageConfig
) -> tuple[list[pairing.Pair], list[pairing.Pair], dict[str, Any]]:
  """Returns nearest pairs, random pairs, and what the summary tells of them."""
  num_neighbors = min(config.search.num_neighbors + 1, len(documents))  # each finds itself
  search = dataclasses.replace(config.search, num_neighbors=num_neighbors)
  neighbors = ann.find_neighbors(embeddings_CE, embeddings_CE, search)
  sampled, recall_S = ann.measure_recall(
    embeddings_CE, embeddings_CE, neighbors, sample_size=config.recall_sample, seed=config.seed
  )
  nearest, counts = pairing.make_pairs(
    neighbors,
    list(documents.values()),
    list(documents.values()),
    config.filters,
    shingle_size=config.shingle_size,
    max_pair_tokens=config.pair_tokens,
  )
  random = pairing.random_pairs(
    nearest, documents, config.filters, max_pair_tokens=config.pair_tokens, seed=config.seed
  )
  groups = [{documents[pair[d]]["group"] for d in ("d1", "d2")} for pair in nearest]
  group_C = np.array([record["group"] for record in documents.values()])
  return (
    nearest,
    random,
    {
      "counts": counts,
      "method": neighbors.method,
      "recall": statistics.mean(recall_S, "share", groups=group_C[sampled]).to_dict(),
      "same_group_share": sum(len(both) == 1 for both in groups) / len(groups),
    },
  )


def _pair_examples(
  chosen: Sequence[pairing.Pair], documents: dict[str, Record], tokenizer: Tokenizer
) -> Iterator[packing.Example]:
  for pair in chosen:
    d1_ids, d2_ids = (tokenizer.encode(documents[pair[d]]["text"]) for d in ("d1", "d2"))
    d2 = documents[pair["d2"]]
    label = packing.Label(pair["id"], d2["group"], len(d2["text"].encode()))
    yield packing.pair_example(d1_ids, d2_ids, tokenizer, label=label)


@section
class SynthesizerConfig:
  """Configures the tuning of a synthesizer.

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
  """Tunes the seed model to p(d2 | d1), and measures how much it uses d1 (SBP, section 3.1).

  The loss covers d2 and its end token only. Tuning stops early when the loss on held-out pairs no
  longer falls, and keeps the best parameters, which may be those of the seed model. `untuned` in
  the summary holds what the seed model itself has.
  """
  mesh = config.mesh.make()
  seed_model, params = models.load_model(context.inputs["seed"], mesh)
  model_config = dataclasses.replace(seed_model.c, dropout_rate=config.dropout_rate)

  def open_labeled(name: str) -> rows.LabeledRows:
    return rows.open_labeled(context.inputs["pairs"], seq_len=config.seq_len, name=name)

  def conditioning(params: Any) -> dict[str, Any]:
    true, random = (
      models.document_losses(
        model_config, mesh, params, open_labeled(f"gap-{d1}"), config.evaluation
      )
      for d1 in ("true", "random")
    )
    return conditioning_gap(true, random, gate=config.gate)

  untuned = conditioning(params)
  source = rows.open_rows(
    context.inputs["pairs"], seq_len=config.seq_len, prefix=f"{config.pairs}-unique."
  )
  summary, params = models.train(
    context,
    model_config=model_config,
    mesh=mesh,
    training=config.training,
    seq_len=config.seq_len,
    num_steps=max(1, math.ceil(config.passes * len(source) / config.training.batch_rows)),
    components=[mixture.Component("pairs", source, 1.0, repeat=True)],
    validation=open_labeled(f"{config.pairs}-validation"),
    weight_decay=config.weight_decay,
    evaluation=config.evaluation,
    seed=config.seed,
    initial_params=params,
  )
  return {
    **summary,
    "conditioning": conditioning(params),
    "untuned": {"validation": summary["first_validation"], "conditioning": untuned},
  }


@section
class SynthesisConfig:
  """Configures the sampling of synthetic documents.

  Attributes:
    target_tokens: sampling ends with the shard that reaches it.
    max_shards: fewer than `target_tokens` in this many shards is an error.
    mesh: over the devices of one process; each process samples its own shards.
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

  A sample's seed document and random numbers depend only on `seed` and the sample's number, so the
  number of processes and of shards does not change its text.
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
    options = {"max_new_tokens": config.max_new_tokens, "sampling": config.sampling}
    return [
      Request(prompt=prompt, seed=config.seed, record_id=number, **options)
      for number, prompt in zip(numbers, prompts, strict=True)
    ]

  model = parse(LlamaConfig, context.inputs["model"].summary["model"])

  def count(record: Record) -> dict[str, int]:
    tokens, prompt_tokens = record["num_tokens"], record["num_prompt_tokens"]
    return {
      "tokens": tokens,
      "prompt_tokens": prompt_tokens,
      "flops": _forward_flops(model, prompt_tokens + tokens),
      f"finish/{record['finish_reason']}": 1,
    }

  target = config.target_tokens
  with context.progress.track(target, label=context.name, unit="tokens") as bar:
    shards = context.shards(
      config.max_shards,
      count=count,
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
  reasons = {
    n.removeprefix("finish/"): totals[n] for n in sorted(totals) if n.startswith("finish/")
  }
  return {
    "documents": totals["records"],
    "tokens": totals["tokens"],
    "prompt_tokens": totals["prompt_tokens"],
    "finish_reasons": reasons,
    "flops": totals["flops"],
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

  The engine reads requests ahead: while a shard's last texts are sampled, free slots already take
  prompts of the next shard, so none is idle.
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

  # Completions arrive as they end, each with the position of its request in the stream.
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
  """Configures the filters and quality measures of sampled documents.

  Attributes:
    cut_documents: what is done with documents that ended at `max_new_tokens`: "without_end" trains
      on them without an end token behind the cut, "drop" does not train on them.
  """

  filter: filters.DocumentFilterConfig
  quality: data_quality.QualityConfig
  cut_documents: Literal["without_end", "drop"] = "without_end"


@section
class SyntheticRowsStageConfig(SyntheticRowsConfig):
  """Configures `synthetic_rows`."""

  seq_len: int
  shingle_size: int
  seed: int


@section
class CheckedSyntheticRowsStageConfig(SyntheticRowsStageConfig):
  """Configures `synthetic_rows` with a search for items of benchmarks."""

  decontamination: DecontaminationConfig


def checked_synthetic_rows(
  context: Context, config: CheckedSyntheticRowsStageConfig
) -> dict[str, Any]:
  """Does what `synthetic_rows` does, and drops or marks samples that contain benchmark items.

  Only samples that pass the filters are checked.
  """
  findings = Findings(open_benchmarks(config.decontamination), config.decontamination)
  summary = synthetic_rows(context, config, findings)
  return {**summary, "decontamination": findings.summary()}


def synthetic_rows(
  context: Context, config: SyntheticRowsStageConfig, findings: Findings | None = None
) -> dict[str, Any]:
  """Filters sampled documents, packs those that pass, and measures the quality of all of them.

  `_dropped.jsonl` holds the others, each with the reason. The count "cut" is of the documents that
  passed the filters and were cut off at their greatest length.
  """
  tokenizer = open_tokenizer(context.inputs["tokenizer"])
  unique = {r["id"]: r for r in paired_documents(context.inputs["tokens"], "unique")}
  texts = [r["text"] for r in unique.values()]
  records = list(context.inputs["samples"].records())
  kept, dropped, counts = filters.filter_documents(
    records, config.filter, shingle_size=config.shingle_size, references=texts
  )
  if findings is not None:
    found = [findings.check(record["id"], record["text"]) for record in kept]
    context.writer.write_jsonl(CONTAMINATED, filter(None, found))
    counts["benchmark"] = findings.num_contaminated
    if findings.drops:
      dropped += [{**r, "reason": "benchmark"} for r, items in zip(kept, found) if items]
      kept = [r for r, items in zip(kept, found) if not items]
      counts["kept"] = len(kept)
  cut = [_is_cut(record) for record in kept]
  counts["cut"] = sum(cut)
  if config.cut_documents == "drop":
    dropped += [{**r, "reason": "cut"} for r, is_cut in zip(kept, cut, strict=True) if is_cut]
    kept = [r for r, is_cut in zip(kept, cut, strict=True) if not is_cut]
    counts["kept"] = len(kept)
  if not kept:
    raise ValueError(
      f"the filters dropped all {len(records)} documents of {context.inputs['samples'].folder}: "
      f"{counts}; the model is too weak or the thresholds are too strict"
    )
  context.writer.write_jsonl("documents.jsonl", kept)
  context.writer.write_jsonl("_dropped.jsonl", dropped)
  examples = (
    packing.document_example(tokenizer.encode(r["text"]), tokenizer, is_whole=not _is_cut(r))
    for r in kept
  )
  packed = write_packed(context, "rows", examples, config.seq_len, tokenizer.pad_id)
  quality = {k: v.to_dict() for k, v in _measure_quality(records, unique, config).items()}
  return {"counts": counts, "rows": packed, "quality": quality}


def _is_cut(record: Record) -> bool:
  return record["finish_reason"] == "length"


def _measure_quality(
  records: Sequence[Record], unique: Mapping[str, Record], config: SyntheticRowsStageConfig
) -> dict[str, statistics.Estimate]:
  """Measures samples; those whose seeds are of one group count as one group."""

  def group(record: Record) -> str:
    return unique[record["seed_id"]]["group"] if record["seed_id"] else record["id"]

  records = [r for r in records if r["text"].strip()]
  texts, groups = [r["text"] for r in records], np.array([group(r) for r in records])
  near_duplicate = {"max_jaccard": config.filter.max_jaccard, "shingle_size": config.shingle_size}
  looping = data_quality.looping(texts, max_repetition=config.filter.max_repetition)
  sampled, duplicates = data_quality.duplicates(
    texts, sample_size=config.quality.sample_size, seed=config.seed, **near_duplicate
  )
  quality = {
    "repetition": statistics.share(looping, groups=groups),
    "duplicates": statistics.share(duplicates, groups=groups[sampled]),
    "copied_8_word_runs": statistics.ratio(
      *data_quality.copied_runs(texts, [r["text"] for r in unique.values()]),
      "share",
      groups=groups,
    ),
  }
  with_seed = [r for r in records if r["seed_text"]]
  if with_seed:
    copies = data_quality.copies_of_seed(
      [r["seed_text"] for r in with_seed], [r["text"] for r in with_seed], **near_duplicate
    )
    quality["pair_copying"] = statistics.share(copies, groups=[group(r) for r in with_seed])
  return quality


@section
class RelevanceStageConfig(data_quality.RelevanceConfig):
  """Configures `relevance`."""

  seed: int


def relevance(context: Context, config: RelevanceStageConfig) -> dict[str, Any]:
  """Compares the similarity of synthetic documents to their seeds with that of related passages.

  Similarity is the cosine of TF-IDF vectors, fitted on the unique and the test documents. Real
  pairs are test documents that are related by something else than this similarity (`real_pairs` in
  the summary names it), and `unrelated` are test documents of different groups. Without real pairs
  there is nothing to compare with: both are None.
  """
  tokens = context.inputs["tokens"]
  unique = {r["id"]: r for r in paired_documents(tokens, "unique")}
  texts = [r["text"] for r in (*unique.values(), *paired_documents(tokens, "test"))]
  how, real = _real_pairs(context, config)
  documents = list(context.inputs["synthetic"].read_jsonl("documents.jsonl"))
  documents = documents[: config.sample_size]
  found = data_quality.similarities(
    [r["seed_text"] for r in documents],
    [r["text"] for r in documents],
    real=[tuple(record["text"] for record in records) for records in real],
    embed=embedding.TfidfSvd.fit(texts, dim=config.dim, seed=config.seed),
    seed=config.seed,
  )
  groups = [unique[r["seed_id"]]["group"] for r in documents]
  estimates = {
    name: statistics.mean(values, "cosine similarity", groups=groups).to_dict()
    for name, values in (("own", found.own_N), ("random", found.random_N))
  }
  if not how:
    none = dict.fromkeys(("real", "unrelated", "real_pairs", "retained_share"))
    return {**estimates, **none}
  real_groups = [records[0]["group"] for records in real]
  for name, values in (("real", found.real_P), ("unrelated", found.unrelated_P)):
    estimates[name] = statistics.mean(values, "cosine similarity", groups=real_groups).to_dict()
  share = statistics.retained_share(
    found.own_N,
    found.random_N,
    found.real_P,
    found.unrelated_P,
    groups_N=groups,
    groups_P=real_groups,
  )
  return {**estimates, "real_pairs": how, "retained_share": share and share.to_dict()}


def _real_pairs(
  context: Context, config: RelevanceStageConfig
) -> tuple[str | None, list[tuple[Record, Record, Record]]]:
  """Returns how test documents are known to be related, and (one, a related, an unrelated one).

  Passages of one group are related whatever any embedding says. Neighbors are taken if there are
  none and another embedding than TF-IDF has found them: TF-IDF's own would look most similar.
  """
  documents = paired_documents(context.inputs["tokens"], "test")
  by_group = collections.defaultdict(list)
  for record in documents:
    by_group[record["group"]].append(record)
  rng = np.random.default_rng(config.seed)

  def unrelated(record: Record) -> Record:
    while (other := documents[rng.integers(len(documents))])["group"] == record["group"]:
      pass
    return other

  if len(by_group) < 2:
    return None, []
  found = []
  for row in rng.permutation(len(documents)):
    d1 = documents[row]
    others = [r for r in by_group[d1["group"]] if r["document"] != d1["document"]]
    if others and len(found) < config.sample_size:
      found.append((d1, others[rng.integers(len(others))], unrelated(d1)))
  if len(found) > 1:
    return "two documents of one group", found
  by_id = {record["id"]: record for record in documents}
  neighbors = list(context.inputs["pairs"].read_jsonl("test.jsonl"))
  if context.inputs["embeddings"].summary["method"] == "tfidf_svd" or len(neighbors) < 2:
    return None, []
  chosen = (neighbors[i] for i in rng.permutation(len(neighbors))[: config.sample_size])
  return "neighbors in the run's own embedding", [
    (by_id[pair["d1"]], by_id[pair["d2"]], unrelated(by_id[pair["d1"]])) for pair in chosen
  ]
