"""SBP on a laptop: baseline, SBP, controls and oracle on documentation strings (arXiv 2509.15248).

  python -m selfimprove_jax.main --config=configs/sbp_quick.py --workdir=runs/sbp_quick

quick: 10 minutes on 2 CPU cores.  smoke: the same job in a minute, too small to mean a thing.
What came out: experiments/sbp_quick/README.md.
"""

import ml_collections as mlc

from configs import parts


def get_config(variant: str = "quick") -> mlc.ConfigDict:
  quick = {"quick": True, "smoke": False}[variant]
  seq_len = 256 if quick else 128
  unique_tokens = 64_000 if quick else 12_000
  max_document_tokens = 126 if quick else 60
  total_tokens = 16 * unique_tokens if quick else 4 * unique_tokens

  c = mlc.ConfigDict()
  c.pipeline = "sbp"
  c.title = "Synthetic bootstrapped pretraining, quick run" + ("" if quick else " (smoke)")
  c.seed = 0
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  c.corpus = dict(
    source="docstrings",
    options=dict(
      packages=["jax", "numpy", "scipy", "sklearn"] if quick else ["numpy"], min_chars=400
    ),
    on_error="raise",
    split=dict(
      num_shards=1,
      seed=0,
      validation_fraction=0.05 if quick else 0.1,
      test_fraction=0.05 if quick else 0.1,
      max_passage_chars=360 if quick else 160,
      min_passage_chars=150 if quick else 60,
      order="group",
      shingle_size=10,
    ),
  )
  c.tokenizer = dict(path=None, special_tokens={}, vocab_size=1024, train_chars=200_000)
  c.tokens = dict(
    seq_len=seq_len,
    unique_tokens=unique_tokens,
    oracle_tokens=total_tokens,
    max_document_tokens=max_document_tokens,
    batch_documents=1000,
  )
  c.model = parts.llama(
    "0.5m" if quick else "tiny", vocab_size=1024, dtype="float32", rope_theta=10_000.0
  )
  c.training = parts.training(batch_rows=4, seq_len=seq_len, peak_lr=3e-3, final_lr=3e-4)
  c.total_tokens = total_tokens
  c.seed_model = dict(
    total_tokens=total_tokens // 2, mixture={"unique": 1.0}, weight_decay=2.0, dropout_rate=0.1
  )
  c.embeddings = dict(method="tfidf_svd", dim=128 if quick else 32, seed=0)
  c.pairs = dict(
    seq_len=seq_len,
    seed=0,
    search=dict(method="auto", exact_below=20_000, num_neighbors=4),
    recall_sample=200,
    max_gap_pairs=300,
    filters=dict(
      min_similarity=0.5 if quick else 0.3,
      max_jaccard=0.5 if quick else 0.3,
      shingle_size=5,
      max_uses_per_target=8,
      max_pairs_per_seed=4,
      max_pair_tokens=seq_len,
    ),
  )
  c.synthesizer = dict(
    training=parts.training(
      batch_rows=4, seq_len=seq_len, peak_lr=1e-3, final_lr=1e-4, patience=2, keep=1
    ),
    passes=2.0,
    weight_decay=1.0,
    dropout_rate=0.1,
    gate=0.05,
    seed=0,
  )
  c.synthesis = dict(
    target_tokens=total_tokens * 43 // 100,
    documents_per_shard=512 if quick else 128,
    max_shards=100,
    sampling=dict(temperature=1.0, top_k=0, top_p=1.0),
    mesh=dict(data=-1, fsdp=1, tensor=1),
    num_slots=64,
    prompt_buckets=[max_document_tokens // 2, max_document_tokens + 2],
    max_new_tokens=max_document_tokens + 1,
    seed=0,
  )
  c.synthetic_rows = dict(
    seq_len=seq_len,
    filter=dict(min_tokens=16, max_repetition=0.3, max_jaccard=0.5, shingle_size=5),
    quality=dict(sample_size=1000),
    seed=0,
  )
  c.relevance = dict(dim=128 if quick else 32, sample_size=500, seed=0)
  c.arms = dict(
    baseline=parts.arm("repeated", {"unique": 1.0}, weight_decay=2.0, dropout_rate=0.1),
    sbp=parts.arm("SBP", {"unique": 0.625, "sbp": 0.375}, weight_decay=1.0, dropout_rate=0.0),
    unconditional=parts.arm(
      "unconditional samples",
      {"unique": 0.625, "unconditional": 0.375},
      weight_decay=1.0,
      dropout_rate=0.0,
    ),
    oracle=parts.arm("oracle", {"oracle": 1.0}, weight_decay=0.1, dropout_rate=0.0),
    baseline_all_in=parts.arm(
      "repeated, SBP's all-in FLOPs",
      {"unique": 1.0},
      weight_decay=2.0,
      dropout_rate=0.1,
      all_in_of="sbp",
    ),
  )
  c.evaluation = dict(batch_rows=8, max_validation_rows=40)
  c.comparison = dict(seed_noise=0.03)
  c.runtime = dict(parallel_stages=2)
  return c
