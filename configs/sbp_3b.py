"""SBP at the paper's scale, 3B: baseline, SBP and oracle on DCLM (arXiv 2509.15248).

  python -m selfimprove_jax.main --config=configs/sbp_3b.py:1t --workdir=gs://bucket/sbp_3b
  python -m selfimprove_jax.main --config=configs/sbp_3b.py:1t --dry_run --device=v5p
  python tools/compile_for.py --config=configs/sbp_3b.py:1t --topology=v5p:8x8x8

The paper's nine benchmarks are scored at the end of each arm and kept out of the training text.
Their files are in `evals` (`--config.benchmarks.data_dir`); `--config.benchmarks.tasks=` scores
nothing.

200b: 10 B unique tokens, which the baseline repeats 20 times.  1t: 50 B, also 20 times.
Compiled for v5p and v6e pods (benchmarks/compile.md), never run.

paper_scale.py holds what both sizes share, and says which values are unverified.
"""

import ml_collections as mlc

from configs import paper_scale, parts


def get_config(variant: str = "200b") -> mlc.ConfigDict:
  parts.check_variant(variant, ("200b", "1t"))
  return paper_scale.sbp(
    size="3b",  # its shape is recalled
    variant=variant,
    synthetic_tokens=125_000_000_000 if variant == "1t" else 75_000_000_000,  # paper
    fsdp=8,
  )
