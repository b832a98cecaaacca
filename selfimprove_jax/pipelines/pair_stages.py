"""Stages from unique documents to pairs of neighbours: embeddings, pairs."""

import functools
from typing import Any

import numpy as np

from selfimprove_jax import artifacts
from selfimprove_jax.data import packing
from selfimprove_jax.pipelines.stages import Context
from selfimprove_jax.pipelines.text_stages import open_tokenizer, write_packed
from selfimprove_jax.retrieval import ann, embedding, pairs

ROLES = ("unique", "validation", "test")


def paired_documents(tokens: artifacts.Artifact, role: str) -> list[dict[str, Any]]:
  """The documents of a role that are short enough to pair, with `num_tokens`."""
  return list(tokens.read_jsonl(f"{role}.jsonl"))


def embeddings(context: Context, *, method: str, **options: Any) -> dict[str, Any]:
  """Embeds the unique and the held-out documents.

  Args:
    method: "tfidf_svd" (fitted on the unique documents; options dim, seed), or "seed_model" (mean
      hidden state of the seed model; options mesh, batch_size, seq_len).
  """
  tokens = context.inputs["tokens"]
  texts = {role: [r["text"] for r in paired_documents(tokens, role)] for role in ROLES}
  function, flops_per_token = EMBEDDINGS[method](context, texts["unique"], **options)
  num_tokens = 0
  for role in ROLES:
    shard = f"{role}.zarr"
    num_tokens += sum(r["num_tokens"] for r in paired_documents(tokens, role))
    if not context.writer.has(shard):
      embeddings_CE = function(texts[role])
      with context.writer.shard(shard) as (path, counts):
        embedding.write_embeddings(path, embeddings_CE)
        counts["records"] = len(embeddings_CE)
  return {"method": method, "tokens": num_tokens, "flops": flops_per_token * num_tokens}


def _tfidf_svd(context, texts, *, dim, seed):
  return embedding.TfidfSvd.fit(texts, dim=dim, seed=seed), 0.0


def _seed_model(context, texts, *, mesh, batch_size, seq_len):
  import jax

  from selfimprove_jax import partitioning
  from selfimprove_jax.pipelines import model_stages

  mesh = partitioning.make_mesh(**mesh)
  model, params = model_stages.load_model(context.inputs["seed"], mesh)
  tokenizer = open_tokenizer(context.inputs["tokenizer"])

  @functools.partial(jax.jit, out_shardings=partitioning.replicated(mesh))
  def hidden(params, tokens_BT, positions_BT, segment_ids_BT):
    with partitioning.axis_rules():
      hidden_BTD, _ = model.apply(
        {"params": params}, tokens_BT, positions_BT, segment_ids_BT, logits=False
      )
    return hidden_BTD

  def embed(batch):
    with jax.set_mesh(mesh):
      return embedding.mean_pooled(
        functools.partial(hidden, params),
        [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(batch)],
        seq_len=seq_len,
        batch_size=batch_size,
        pad_id=tokenizer.pad_id,
      )

  return embed, model.c.forward_flops_per_token(seq_len)


# Method -> function of (context, unique texts, options), giving (texts -> embeddings, FLOPs/token).
EMBEDDINGS = {"tfidf_svd": _tfidf_svd, "seed_model": _seed_model}


def make_pairs(
  context: Context,
  *,
  seq_len: int,
  seed: int,
  search: dict[str, Any],
  recall_sample: int,
  max_gap_pairs: int,
  filters: dict[str, Any],
) -> dict[str, Any]:
  """Pairs the documents of each role with each other, and packs what the synthesizer reads.

  Writes `<role>.jsonl` and `random-<role>.jsonl` (the control: the same documents, joined at
  random), packed rows of both for unique and validation, and, in the order of the pairs, the rows
  from which the conditioning gap is measured: `gap-true` and `gap-random`, in which each held-out
  d2 stands after its neighbour and after another document.

  Args:
    search: `ann.find_neighbors`' method, exact_below and num_neighbors.
    recall_sample: queries whose neighbours are compared with exact search.
    max_gap_pairs: held-out pairs, evenly spread, that the gap is measured on.
    filters: thresholds of `pairs.make_pairs`.
  """
  tokenizer = open_tokenizer(context.inputs["tokenizer"])
  summary: dict[str, Any] = {"counts": {}, "recall": {}}
  for role in ROLES:
    documents = {r["id"]: r for r in paired_documents(context.inputs["tokens"], role)}
    store = embedding.open_embeddings(context.inputs["embeddings"].path(f"{role}.zarr"))
    true, random, counts, recall = _pair_role(
      documents, np.asarray(store[:].read().result()), seed, search, recall_sample, filters
    )
    summary["counts"][role] = counts
    summary["recall"][role] = {"value": recall[0], "stderr": recall[1], "unit": "share"}
    context.writer.write_jsonl(f"{role}.jsonl", true)
    context.writer.write_jsonl(f"random-{role}.jsonl", random)

    def examples(chosen, documents=documents):
      for pair in chosen:
        d1, d2 = (tokenizer.encode(documents[pair[d]]["text"]) for d in ("d1", "d2"))
        yield packing.pair_example(d1, d2, tokenizer)

    def pack(name, chosen, *, keep_order=False, examples=examples):
      summary[name] = write_packed(
        context, name, examples(chosen), seq_len, tokenizer.pad_id, keep_order=keep_order
      )

    if role == "test":
      # Sorted by d2, the two lists hold the same d2 at every place.
      stride = -(-len(true) // max_gap_pairs)
      pack("gap-true", sorted(true, key=_d2)[::stride], keep_order=True)
      pack("gap-random", sorted(random, key=_d2)[::stride], keep_order=True)
    else:
      pack(f"nearest-{role}", true)
      pack(f"random-{role}", random)
  return summary


def _d2(pair):
  return pair["d2"]


def _pair_role(documents, embeddings_CE, seed, search, recall_sample, filters):
  search = {**search, "num_neighbors": min(search["num_neighbors"] + 1, len(documents))}  # + itself
  neighbors = ann.find_neighbors(embeddings_CE, embeddings_CE, **search)
  recall = ann.measure_recall(
    embeddings_CE, embeddings_CE, neighbors, sample_size=recall_sample, seed=seed
  )
  ids = list(documents)
  texts = [documents[i]["text"] for i in ids]
  lengths = [documents[i]["num_tokens"] for i in ids]
  found, counts = pairs.make_pairs(
    neighbors,
    seed_ids=ids,
    target_ids=ids,
    seed_texts=texts,
    target_texts=texts,
    seed_lengths=lengths,
    target_lengths=lengths,
    **filters,
  )
  random = pairs.random_pairs(
    found,
    lengths=dict(zip(ids, lengths)),
    max_pair_tokens=filters["max_pair_tokens"],
    seed=seed,
  )
  return found, random, counts, recall
