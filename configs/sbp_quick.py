"""SBP on a laptop: baseline, SBP, controls and oracle on documentation strings (arXiv 2509.15248).

  python -m selfimprove_jax.main --config=configs/sbp_quick.py --workdir=runs/sbp_quick

quick: 10 minutes on 2 CPU cores.  smoke: the same job in a minute, too small to mean anything.
Result: experiments/sbp_quick/README.md.
"""

import ml_collections as mlc

from configs import parts
from selfimprove_jax.pipelines import sbp
from selfimprove_jax.runtime.config import page


def get_config(variant: str = "quick") -> mlc.ConfigDict:
  parts.check_variant(variant, ("quick", "smoke"))
  quick = variant == "quick"
  seq_len = 256 if quick else 128
  unique_tokens = 32_000 if quick else 12_000
  max_document_tokens = 126 if quick else 60
  total_tokens = 16 * unique_tokens if quick else 4 * unique_tokens
  held_out = 0.05 if quick else 0.1
  # Weight decay and dropout for data that is repeated many times, and for a mixture with synthetic
  # data, which is not.
  repeated = dict(weight_decay=2.0, dropout_rate=0.1)
  mixed = dict(weight_decay=1.0, dropout_rate=0.0)

  return page(
    sbp.Config,
    pipeline="sbp",
    title="Synthetic bootstrapped pretraining, quick run" + ("" if quick else " (smoke)"),
    runtime=dict(parallel_stages=2),
    seed=0,
    split_seed=0,
    seq_len=seq_len,
    pair_tokens=seq_len,
    shingle_size=5,
    total_tokens=total_tokens,
    draws_anew=True,
    mesh=dict(data=1, fsdp=-1),
    corpus=dict(
      source=dict(
        kind="docstrings",
        packages=("jax", "numpy", "scipy", "sklearn") if quick else ("numpy",),
        min_chars=400,
      ),
      split=dict(
        num_shards=1,
        validation_fraction=held_out,
        test_fraction=held_out,
        max_passage_chars=360 if quick else 160,
        min_passage_chars=150 if quick else 60,
        order="document",  # the unique data are passages of many files
        shingle_size=10,
      ),
    ),
    tokenizer=dict(vocab_size=1024, train_chars=80_000 if quick else 25_000),
    tokens=dict(
      unique_tokens=unique_tokens,
      oracle_tokens=total_tokens * 21 // 20,  # all that it learns from is new
      max_document_tokens=max_document_tokens,
      batch_documents=1000,
    ),
    model=parts.llama(
      "0.5m" if quick else "tiny", vocab_size=1024, dtype="float32", rope_theta=10_000.0
    ),
    training=dict(batch_rows=4, peak_lr=3e-3, final_lr=3e-4),
    seed_model=dict(total_tokens=total_tokens // 2, mixture={"unique": 1.0}, **repeated),
    embeddings=dict(method="tfidf_svd", dim=128 if quick else 32),
    pairs=dict(
      search=dict(num_neighbors=20),
      filters=dict(
        min_similarity=0.4 if quick else 0.3,
        max_jaccard=0.5 if quick else 0.3,
        max_uses_per_target=8,
        max_pairs_per_seed=4,
      ),
      recall_sample=200,
      max_gap_pairs=300,
    ),
    synthesizer=dict(
      training=dict(batch_rows=4, peak_lr=1e-3, final_lr=1e-4, patience=2, keep=1),
      passes=2.0,
      weight_decay=1.0,
      dropout_rate=0.1,
      gate=0.05,
    ),
    synthesis=dict(
      target_tokens=total_tokens * 43 // 100,
      documents_per_shard=512 if quick else 128,
      max_shards=100,
      sampling=dict(temperature=1.0),
      mesh=dict(data=-1),
      num_slots=64,
      prompt_buckets=(max_document_tokens // 2, max_document_tokens + 2),
      max_new_tokens=max_document_tokens + 1,
    ),
    synthetic_rows=dict(
      filter=dict(min_tokens=16, max_repetition=0.3, max_jaccard=0.5),
      quality=dict(sample_size=1000),
    ),
    relevance=dict(dim=128 if quick else 32, sample_size=500),
    arms=dict(
      baseline=dict(label="repeated", mixture={"unique": 1.0}, num_seeds=2, **repeated),
      sbp=dict(label="SBP", mixture={"unique": 0.625, "sbp": 0.375}, num_seeds=2, **mixed),
      unconditional=dict(
        label="unconditional samples",
        mixture={"unique": 0.625, "unconditional": 0.375},
        num_seeds=2 if quick else 1,
        **mixed,
      ),
      oracle=dict(label="oracle", mixture={"oracle": 1.0}, weight_decay=0.1, dropout_rate=0.0),
      baseline_all_in=dict(
        label="repeated, SBP's all-in FLOPs", mixture={"unique": 1.0}, all_in_of="sbp", **repeated
      ),
    ),
    evaluation=dict(batch_rows=8, max_validation_rows=40),
    comparison=dict(),
  )
