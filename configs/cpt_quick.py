"""Continued pretraining on new text with replay, on a laptop, with nothing to download.

  python -m selfimprove_jax.main --config=configs/cpt_quick.py --workdir=runs/cpt_quick

A small model is pretrained on the documentation strings of some packages, then trained on those of
another package (the new text: written by people, nothing here is synthesized) and a tenth of
replay.

quick: under 3 minutes on 2 CPU cores.  smoke: the same job in one, too small to mean anything.
A real checkpoint: `initial.kind=checkpoint`. With a generator that writes the new text:
configs/entigraph_quick.py.
"""

from typing import Any

import ml_collections as mlc

from configs import parts
from selfimprove_jax.pipelines import continued_pretraining
from selfimprove_jax.runtime.config import page


def _docstrings(*packages: str, max_passage_chars: int) -> dict[str, Any]:
  return dict(
    source=dict(kind="docstrings", packages=packages, min_chars=400),
    split=dict(
      num_shards=1,
      validation_fraction=0.1,
      test_fraction=0.1,
      max_passage_chars=max_passage_chars,
      min_passage_chars=60,
      order="group",
      shingle_size=10,
    ),
  )


def get_config(variant: str = "quick") -> mlc.ConfigDict:
  parts.check_variant(variant, ("quick", "smoke"))
  quick = variant == "quick"
  max_passage_chars = 600 if quick else 160
  new_text = ("sklearn",) if quick else ("optax",)
  replay = ("jax", "numpy", "scipy") if quick else ("numpy",)
  replay_tokens = 200_000 if quick else 12_000

  return page(
    continued_pretraining.Config,
    pipeline="continued_pretraining",
    title="Continued pretraining with replay, quick run" + ("" if quick else " (smoke)"),
    runtime=dict(parallel_stages=2),
    seed=0,
    split_seed=0,
    seq_len=256 if quick else 128,
    mesh=dict(data=1, fsdp=-1),
    initial=dict(
      kind="pretrain",
      tokenizer=dict(vocab_size=1024, train_chars=200_000),
      training=dict(batch_rows=4, peak_lr=3e-3, final_lr=3e-4),
      total_tokens=3 * replay_tokens,
      weight_decay=0.1,
      dropout_rate=0.0,
    ),
    new_text=_docstrings(*new_text, max_passage_chars=max_passage_chars),
    replay=_docstrings(*replay, max_passage_chars=max_passage_chars),
    tokens=dict(
      new_text_tokens=100_000 if quick else 12_000,
      replay_tokens=replay_tokens,
      batch_documents=1000,
    ),
    model=parts.llama(
      "0.5m" if quick else "tiny", vocab_size=1024, dtype="float32", rope_theta=10_000.0
    ),
    training=dict(batch_rows=4, peak_lr=1e-3, final_lr=0.0, b2=0.999, num_evaluations=5),
    tuning=dict(epochs=2.0, replay_share=0.1, weight_decay=0.01, dropout_rate=0.0),
    evaluation=dict(batch_rows=8, max_validation_rows=40),
    export=dict(dtype="float32"),
  )
