"""EntiGraph, continued pretraining of Llama-3-8B on synthetic text (arXiv 2409.07431, 4.1 and D).

  python -m selfimprove_jax.main --config=configs/entigraph_8b.py --workdir=runs/entigraph_8b \
      --config.initial.path=/models/Meta-Llama-3-8B \
      --config.new_text.source.paths='/data/entigraph/*.jsonl' \
      --config.replay.source.paths='/data/redpajama_sample/*.jsonl'

QuALITY's questions are scored before and after, without their articles: `evals/quality.jsonl.gz`
(`--config.benchmarks.data_dir`; `--config.benchmarks.tasks=` scores nothing).

New text: JSON lines with a field `text`, which are synthesized beforehand. Replay: the 1T sample of
RedPajama, as JSON lines. The tuned model is `export/model` in the workdir, a Hugging Face folder.
`--dry_run` needs none of the files. configs/cpt_quick.py is the same pipeline on a laptop.

Differs from the paper: no token sees another document (the paper cuts blocks of 2048 from one
concatenation, without a mask); replay is exactly a tenth of the rows, without replacement, instead
of each row with that probability; and some documents of both corpora are held out, to measure what
is learned and what is forgotten. Held-out new text is about the same articles as the rest of it.
Parameters and moments are float32, and the computation is bfloat16. Never run at this size.
"""

from typing import Any

import ml_collections as mlc

from configs import parts
from selfimprove_jax.pipelines import continued_pretraining
from selfimprove_jax.runtime.config import page


def _whole_documents(paths: str) -> dict[str, Any]:
  return dict(
    source=dict(kind="jsonl", paths=(paths,), text_field="text", id_field=None),
    split=dict(
      num_shards=8,
      validation_fraction=0.002,
      test_fraction=0.002,
      max_passage_chars=10**9,  # nothing is cut here; packing cuts documents longer than a row
      min_passage_chars=1,
      order="document",
      # Texts about one article share its title and its names, which are shorter than 20 words.
      shingle_size=20,
    ),
  )


def get_config(variant: str = "paper") -> mlc.ConfigDict:
  parts.check_variant(variant, ("paper",))
  return page(
    continued_pretraining.Config,
    pipeline="continued_pretraining",
    title="EntiGraph: continued pretraining of Llama-3-8B",
    runtime=dict(parallel_stages=1),
    seed=0,
    split_seed=0,
    seq_len=2048,
    mesh=dict(data=1, fsdp=-1),
    initial=dict(
      kind="checkpoint",
      path="Meta-Llama-3-8B",
      special_tokens=dict(
        bos_token="<|begin_of_text|>",  # 128000
        eos_token="<|end_of_text|>",  # 128001
        sep_token="<|reserved_special_token_0|>",  # not used here
        pad_token="<|end_of_text|>",  # never seen or predicted
      ),
    ),
    new_text=_whole_documents("entigraph/*.jsonl"),
    replay=_whole_documents("redpajama_sample/*.jsonl"),
    tokens=dict(new_text_tokens=455_000_000, replay_tokens=1_000_000_000, batch_documents=1000),
    model=parts.llama(
      "llama3_8b",
      vocab_size=128_256,
      dtype="bfloat16",
      rope_theta=500_000.0,
      qk_norm=False,
      tie_embeddings=False,
      norm_eps=1e-5,
      remat="qkv_context",
    ),
    training=dict(
      batch_rows=16,
      peak_lr=5e-6,
      final_lr=0.0,
      warmup_fraction=0.05,
      b1=0.9,
      b2=0.999,
      eps=1e-8,
      clip_norm=1.0,
      num_evaluations=20,
      num_checkpoints=20,
    ),
    tuning=dict(epochs=2.0, replay_share=0.1, weight_decay=0.01, dropout_rate=0.0),
    evaluation=dict(batch_rows=16, max_validation_rows=256),
    benchmarks=dict(tasks="quality", data_dir="evals"),
    export=dict(dtype="bfloat16"),
  )
