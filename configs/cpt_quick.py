"""Continued pretraining on new text with replay, on a laptop, with nothing to download.

  python -m selfimprove_jax.main --config=configs/cpt_quick.py --workdir=runs/cpt_quick

A small model is pretrained on the documentation strings of some packages, then trained on with
those of another (the new text: written by people, nothing here is synthesized) and a tenth of
replay.

quick: under 3 minutes on 2 CPU cores.  smoke: the same job in one, too small to mean a thing.
The same pipeline with a real checkpoint is configs/entigraph_8b.py.
"""

import ml_collections as mlc

from configs import parts


def _docstrings(packages: list[str], *, quick: bool) -> dict:
  return dict(
    source="docstrings",
    options=dict(packages=packages, min_chars=400),
    on_error="raise",
    split=dict(
      num_shards=1,
      seed=0,
      validation_fraction=0.1,
      test_fraction=0.1,
      max_passage_chars=600 if quick else 160,
      min_passage_chars=60,
      order="group",
      shingle_size=10,
    ),
  )


def get_config(variant: str = "quick") -> mlc.ConfigDict:
  quick = {"quick": True, "smoke": False}[variant]
  seq_len = 256 if quick else 128
  replay_tokens = 200_000 if quick else 12_000

  c = mlc.ConfigDict()
  c.pipeline = "continued_pretraining"
  c.title = "Continued pretraining with replay, quick run" + ("" if quick else " (smoke)")
  c.seed = 0
  c.mesh = dict(data=1, fsdp=-1, tensor=1)
  c.replay = _docstrings(["jax", "numpy", "scipy"] if quick else ["numpy"], quick=quick)
  c.new_text = _docstrings(["sklearn"] if quick else ["optax"], quick=quick)
  c.tokens = dict(
    seq_len=seq_len,
    new_text_tokens=100_000 if quick else 12_000,
    replay_tokens=replay_tokens,
    batch_documents=1000,
  )
  c.model = parts.llama(
    "0.5m" if quick else "tiny", vocab_size=1024, dtype="float32", rope_theta=10_000.0
  )
  c.initial = dict(
    kind="pretrain",
    tokenizer=dict(vocab_size=1024, train_chars=200_000),
    training=parts.training(batch_rows=4, seq_len=seq_len, peak_lr=3e-3, final_lr=3e-4),
    total_tokens=3 * replay_tokens,
    weight_decay=0.1,
    dropout_rate=0.0,
  )
  c.training = parts.training(
    batch_rows=4, seq_len=seq_len, peak_lr=1e-3, final_lr=0.0, b2=0.999, num_evaluations=5
  )
  c.tuning = dict(epochs=2.0, replay_share=0.1, weight_decay=0.01, dropout_rate=0.0)
  c.evaluation = dict(batch_rows=8, max_validation_rows=40)
  c.export = dict(dtype="float32")
  c.runtime = dict(parallel_stages=2)
  return c
