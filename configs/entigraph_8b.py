"""EntiGraph, continued pretraining of Llama-3-8B on synthetic text (arXiv 2409.07431, 4.1 and D).

  python -m selfimprove_jax.main --config=configs/entigraph_8b.py --workdir=runs/entigraph_8b \
      --config.initial.path=/models/Meta-Llama-3-8B \
      --config.new_text.options.paths='/data/entigraph/*.jsonl' \
      --config.replay.options.paths='/data/redpajama_sample/*.jsonl'

New text: JSON lines with a field `text`, the synthesis itself being done before. Replay: the 1T
sample of RedPajama, as JSON lines. The tuned model is `export/model` in the workdir, a Hugging Face
folder. `--dry_run` needs none of the files. configs/cpt_quick.py is the same pipeline on a laptop.

We differ from the paper in this: no token sees another document (there blocks of 2048 are cut from
one concatenation, unmasked); replay takes exactly a tenth of the rows, without replacement, instead
of each row with that probability; and some documents of both corpora are held out, to measure what
is learnt and what is forgotten. Held-out new text is about the same articles as the rest of it.
Parameters and moments are float32, what is computed with them is bfloat16. Never run at this size.
"""

import ml_collections as mlc

from configs import parts


def _whole_documents(paths: str, *, held_out: float) -> dict:
  return dict(
    source="jsonl",
    options=dict(paths=paths, text_field="text", id_field=None),
    on_error="raise",
    split=dict(
      num_shards=8,
      seed=0,
      validation_fraction=held_out,
      test_fraction=held_out,
      max_passage_chars=10**9,  # nothing is cut here; packing cuts what is longer than a row
      min_passage_chars=1,
      order="document",
      # Texts about one article share its title and names; 20 words are more than those.
      shingle_size=20,
    ),
  )


def get_config(variant: str = "paper") -> mlc.ConfigDict:
  if variant != "paper":
    raise ValueError(f"variant {variant!r} is unknown; there is 'paper'")
  c = mlc.ConfigDict()
  c.pipeline = "continued_pretraining"
  c.title = "EntiGraph: continued pretraining of Llama-3-8B"
  c.seed = 0
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  c.initial = dict(
    kind="checkpoint",
    path="Meta-Llama-3-8B",
    special_tokens=dict(
      bos_token="<|begin_of_text|>",  # 128000
      eos_token="<|end_of_text|>",  # 128001
      sep_token="<|reserved_special_token_0|>",  # not used here
      pad_token="<|end_of_text|>",  # never seen or predicted
    ),
  )
  c.new_text = _whole_documents("entigraph/*.jsonl", held_out=0.002)
  c.replay = _whole_documents("redpajama_sample/*.jsonl", held_out=0.002)
  c.tokens = dict(
    seq_len=2048,
    new_text_tokens=455_000_000,
    replay_tokens=1_000_000_000,
    batch_documents=1000,
  )
  c.model = parts.llama(
    "llama3_8b",
    vocab_size=128_256,
    dtype="bfloat16",
    rope_theta=500_000.0,
    qk_norm=False,
    tie_embeddings=False,
    norm_eps=1e-5,
    attention="auto",
    remat="qkv_context",
  )
  c.training = parts.training(
    batch_rows=16,
    seq_len=2048,
    peak_lr=5e-6,
    final_lr=0.0,
    warmup_fraction=0.05,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    clip_norm=1.0,
    num_evaluations=20,
    num_checkpoints=20,
  )
  c.tuning = dict(epochs=2.0, replay_share=0.1, weight_decay=0.01, dropout_rate=0.0)
  c.evaluation = dict(batch_rows=16, max_validation_rows=256)
  c.export = dict(dtype="bfloat16")
  c.runtime = dict(parallel_stages=1)
  return c
