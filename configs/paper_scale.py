"""SBP as in the paper except for the model's size: what sbp_3b.py and sbp_6b.py share.

"Paper" below is a value that notes on the paper (arXiv 2509.15248) give; "recalled" is one from
memory that no text at hand confirms; "ours" is our choice. The paper embeds documents with
Qwen3-Embedding-0.6B; these runs use the mean hidden state of their own seed model.
"""

import ml_collections as mlc

from configs import parts
from selfimprove_jax.pipelines import sbp as pipeline
from selfimprove_jax.runtime.config import page


def sbp(*, size: str, variant: str, synthetic_tokens: int, fsdp: int) -> mlc.ConfigDict:
  """Returns the page of one run.

  Args:
    size: a shape of `parts.llama`.
    variant: `200b` or `1t`: tokens that each arm trains on.
    synthetic_tokens: how many of them are synthetic, in the arm `sbp`.
    fsdp: number of shards of the parameters.
  """
  is_1t = variant == "1t"
  total_tokens = 1_000_000_000_000 if is_1t else 200_000_000_000  # paper
  unique_tokens = 50_000_000_000 if is_1t else 10_000_000_000  # paper
  oracle_tokens = 482_000_000_000 if is_1t else 200_000_000_000  # paper: at 1T, the whole corpus
  synthetic_share = synthetic_tokens / total_tokens
  pair_tokens = 8192  # recalled
  # One setting for all arms, as in the paper; its weight decay is unknown, 0.1 is usual.
  regularization = dict(weight_decay=0.1, dropout_rate=0.0)

  return page(
    pipeline.Config,
    pipeline="sbp",
    title=f"Synthetic bootstrapped pretraining, {size.upper()}, {variant.upper()} tokens",
    runtime=dict(parallel_stages=1),
    seed=0,
    split_seed=0,
    seq_len=4096,  # paper
    pair_tokens=pair_tokens,
    shingle_size=13,  # recalled for pairs; ours for samples
    total_tokens=total_tokens,
    # Each shard holds whole tiles of 128 lanes: XLA pads narrower ones when it gathers them. On
    # another number of chips `data` takes the rest; on several slices set dcn.
    mesh=dict(dcn=1, data=-1, fsdp=fsdp, tensor=1),
    corpus=dict(
      # The whole of DCLM-baseline; which 582 M documents of it the paper used is not published. The
      # split's hash order makes any prefix of it a random sample.
      source=dict(kind="huggingface", name="mlfoundations/dclm-baseline-1.0"),
      on_error="skip",
      split=dict(
        num_shards=4096,
        validation_fraction=1e-5,  # ours
        test_fraction=1e-5,  # ours
        max_passage_chars=1_000_000_000,  # nothing is cut here; packing cuts to rows
        min_passage_chars=1,
        order="document",
        shingle_size=13,  # ours
        num_buckets=4096,
      ),
    ),
    # The paper's tokenizer is in-house; its vocabulary of 49,152 is recalled.
    tokenizer=dict(vocab_size=49_152, train_chars=2_000_000_000),
    tokens=dict(
      unique_tokens=unique_tokens,
      oracle_tokens=oracle_tokens,
      max_document_tokens=pair_tokens // 2 - 2,
      batch_documents=10_000,
    ),
    model=parts.llama(  # Llama 3 with QK-norm: paper; the tied head is ours
      size,
      vocab_size=49_152,
      dtype="bfloat16",
      rope_theta=500_000.0,  # recalled
      remat="qkv_context",
    ),
    training=dict(
      batch_rows=2048,  # paper
      peak_lr=1e-2,  # paper; far above the usual rates of AdamW: check that the seed's loss falls
      final_lr=5e-5,  # paper
      warmup_fraction=0.05,  # paper
      num_evaluations=100,
      num_checkpoints=200,
      keep=3,
    ),
    # Paper: the baseline's own checkpoint, which is this run under another name.
    seed_model=dict(total_tokens=total_tokens, mixture={"unique": 1.0}, **regularization),
    embeddings=dict(method="seed_model", batch_size=2048),  # ours
    pairs=dict(
      search=dict(method="scann", num_neighbors=200),  # ScaNN: paper; 200: recalled
      filters=dict(
        min_similarity=0.75,  # recalled, for the paper's embeddings; ours need their own
        max_jaccard=0.5,  # ours
        max_uses_per_target=8,  # ours
        max_pairs_per_seed=4,  # ours
      ),
      recall_sample=1000,
      max_gap_pairs=2048,
    ),
    synthesizer=dict(
      training=dict(
        batch_rows=1024,  # ours: as many tokens as in pretraining
        peak_lr=5e-6,  # recalled, and constant
        final_lr=5e-6,
        patience=2,
        keep=1,
      ),
      passes=1.0,  # ours
      weight_decay=0.1,  # ours
      dropout_rate=0.0,
      gate=0.05,  # ours
    ),
    synthesis=dict(
      target_tokens=synthetic_tokens * 115 // 100,  # ours: enough must pass the filters
      documents_per_shard=65_536,
      max_shards=100_000,
      sampling=dict(temperature=1.0),  # paper; top_p is recalled as 0.9
      mesh=dict(data=-1),  # ours
      num_slots=128,  # ours
      prompt_buckets=(512, 1024, 2048, 4096),
      max_new_tokens=4096,  # recalled
    ),
    synthetic_rows=dict(
      filter=dict(min_tokens=32, max_repetition=0.3, max_jaccard=0.5),  # ours
      quality=dict(sample_size=1_000_000),  # paper: Duplicate@1M
    ),
    relevance=dict(dim=512, sample_size=10_000),
    arms=dict(
      baseline=dict(label="repeated", mixture={"unique": 1.0}, **regularization),
      sbp=dict(
        label="SBP",
        mixture={"unique": 1 - synthetic_share, "sbp": synthetic_share},
        **regularization,
      ),
      oracle=dict(label="oracle", mixture={"oracle": 1.0}, **regularization),
    ),
    evaluation=dict(batch_rows=2048, max_validation_rows=8192),
    benchmarks=dict(tasks=parts.SBP_TASKS, data_dir="evals"),  # tasks: paper
    comparison=dict(assumed_seed_noise=0.002),  # ours, a guess: one training per arm
  )
