"""SBP as the paper has it, but for the size of the model: what sbp_3b.py and sbp_6b.py share.

"Paper" below is a value that notes on the paper (arXiv 2509.15248) give; "recalled" is one from
memory that no text at hand confirms; "ours" is our choice. Where the paper embeds documents with
Qwen3-Embedding-0.6B, these runs take the mean hidden state of their own seed model.
"""

import ml_collections as mlc

from configs import parts


def sbp(*, size: str, variant: str, synthetic_tokens: int, fsdp: int) -> mlc.ConfigDict:
  """The whole run.

  Args:
    size: of `parts.llama`.
    variant: `200b` or `1t`: tokens that each arm trains on.
    fsdp: parts that the parameters are in.
  """
  if variant not in ("200b", "1t"):
    raise ValueError(f"variant {variant!r} is unknown; there are '200b' and '1t'")
  is_1t = variant == "1t"
  total_tokens = 1_000_000_000_000 if is_1t else 200_000_000_000  # paper
  unique_tokens = 50_000_000_000 if is_1t else 10_000_000_000  # paper
  oracle_tokens = 482_000_000_000 if is_1t else 200_000_000_000  # paper: at 1T, all there are
  synthetic_share = synthetic_tokens / total_tokens
  seq_len = 4096  # paper
  pair_tokens = 8192  # recalled

  c = mlc.ConfigDict()
  c.pipeline = "sbp"
  c.title = f"Synthetic bootstrapped pretraining, {size.upper()}, {variant.upper()} tokens"
  c.seed = 0
  # Shards hold whole tiles of 128 lanes of the width: of slivers XLA gathers padding. On another
  # number of chips `data` takes what is left; on several slices set dcn.
  c.mesh = dict(dcn=1, data=-1, fsdp=fsdp, tensor=1)
  c.corpus = dict(
    # The whole of DCLM-baseline; which 582 M documents of it the paper took is not published. The
    # split's hash order makes any prefix of it a random sample.
    source="huggingface",
    options=dict(name="mlfoundations/dclm-baseline-1.0"),
    on_error="skip",
    split=dict(
      num_shards=4096,
      seed=0,
      validation_fraction=1e-5,  # ours
      test_fraction=1e-5,  # ours
      max_passage_chars=1_000_000_000,  # nothing is cut here; packing cuts to rows
      min_passage_chars=1,
      order="document",
      shingle_size=13,  # ours
      num_buckets=4096,
    ),
  )
  # The paper's tokenizer is in-house; its vocabulary of 49,152 is recalled.
  c.tokenizer = dict(path=None, special_tokens={}, vocab_size=49_152, train_chars=2_000_000_000)
  c.tokens = dict(
    seq_len=seq_len,
    unique_tokens=unique_tokens,
    oracle_tokens=oracle_tokens,
    max_document_tokens=pair_tokens // 2 - 2,
    batch_documents=10_000,
  )
  c.model = parts.llama(  # Llama 3 with QK-norm: paper; the tied head is ours
    size,
    vocab_size=49_152,
    dtype="bfloat16",
    rope_theta=500_000.0,  # recalled
    attention="auto",
    remat="qkv_context",
  )
  c.training = parts.training(
    batch_rows=2048,  # paper
    seq_len=seq_len,
    peak_lr=1e-2,  # paper; far above what AdamW usually takes: see that the seed model's loss falls
    final_lr=5e-5,  # paper
    warmup_fraction=0.05,  # paper
    num_evaluations=100,
    num_checkpoints=200,
    keep=3,
  )
  c.total_tokens = total_tokens
  c.seed_model = dict(  # paper: the baseline's own checkpoint, which is this run under another name
    total_tokens=total_tokens, mixture={"unique": 1.0}, weight_decay=0.1, dropout_rate=0.0
  )
  c.embeddings = dict(method="seed_model", mesh=c.mesh, batch_size=2048, seq_len=seq_len)  # ours
  c.pairs = dict(
    seq_len=pair_tokens,
    seed=0,
    search=dict(method="scann", num_neighbors=200),  # ScaNN: paper; 200: recalled
    recall_sample=1000,
    max_gap_pairs=2048,
    filters=dict(
      min_similarity=0.75,  # recalled, for the paper's embeddings; ours need their own
      max_jaccard=0.5,  # ours
      shingle_size=13,  # recalled
      max_uses_per_target=8,  # ours
      max_pairs_per_seed=4,  # ours
      max_pair_tokens=pair_tokens,
    ),
  )
  c.synthesizer = dict(
    training=parts.training(
      batch_rows=1024,  # ours: as many tokens as in pretraining
      seq_len=pair_tokens,
      peak_lr=5e-6,  # recalled, and constant
      final_lr=5e-6,
      patience=2,
      keep=1,
    ),
    passes=1.0,  # ours
    weight_decay=0.1,  # ours
    dropout_rate=0.0,
    gate=0.05,  # ours
    seed=0,
  )
  c.synthesis = dict(
    target_tokens=synthetic_tokens * 115 // 100,  # ours: the filters shall leave enough
    documents_per_shard=65_536,
    max_shards=100_000,
    sampling=dict(temperature=1.0, top_k=0, top_p=1.0),  # temperature: paper; top_p recalled as 0.9
    mesh=dict(data=-1, fsdp=1, tensor=1),  # ours; of one host
    num_slots=128,  # ours
    prompt_buckets=[512, 1024, 2048, 4096],
    max_new_tokens=4096,  # recalled
    seed=0,
  )
  c.synthetic_rows = dict(
    seq_len=seq_len,
    filter=dict(min_tokens=32, max_repetition=0.3, max_jaccard=0.5, shingle_size=13),  # ours
    quality=dict(sample_size=1_000_000),  # paper: Duplicate@1M
    seed=0,
  )
  c.relevance = dict(dim=512, sample_size=10_000, seed=0)
  # One setting for all arms, as in the paper; its weight decay is unknown, 0.1 is usual.
  regularisation = dict(weight_decay=0.1, dropout_rate=0.0)
  c.arms = dict(
    baseline=parts.arm("repeated", {"unique": 1.0}, **regularisation),
    sbp=parts.arm("SBP", {"unique": 1 - synthetic_share, "sbp": synthetic_share}, **regularisation),
    oracle=parts.arm("oracle", {"oracle": 1.0}, **regularisation),
  )
  c.evaluation = dict(batch_rows=2048, max_validation_rows=8192)
  c.comparison = dict(seed_noise=0.003)  # ours, a guess
  c.runtime = dict(parallel_stages=1)
  return c
