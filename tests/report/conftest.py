"""A report of a run that never was: every number is invented."""

from typing import Any

import numpy as np
import pytest

from selfimprove_jax.evaluation import comparison
from selfimprove_jax.evaluation.statistics import Estimate

_ARMS = {
  # name: (label, held-out loss, weight decay, dropout, steps, FLOPs spent before the arm)
  "oracle": ("Oracle", 3.362, 0.1, 0.0, 1540, {}),
  "baseline": ("Baseline", 4.061, 2.0, 0.1, 1540, {}),
  "sbp": ("SBP", 3.992, 1.0, 0.0, 1540, {"embedding": 2e9, "tuning": 2.9e12, "sampling": 3.4e12}),
  "unconditional": ("Unconditional", 3.981, 1.0, 0.0, 1540, {"sampling": 1.9e12}),
  "baseline_all_in": ("Baseline, all-in FLOPs", 4.028, 2.0, 0.1, 4075, {}),
}
_TOKENS_PER_STEP = 1024
_FLOPS_PER_STEP = 4.9e12 / 1540

_SEED_TEXT = """\
numpy.linalg.lstsq: Return the least-squares solution to a linear equation.

Computes the vector `x` that approximately solves the equation ``a @ x = b``.
The equation may be under-, well-, or over-determined (i.e., the number of
linearly independent rows of `a` can be less than, equal to, or greater than
its number of linearly independent columns)."""
_SYNTHESIS = """\
Solve the least-squares problem for a triangular matrix. The solution of the
equation is the vector that minimises the norm of the array, if <a> & "b" are
given; otherwise a ValueError is raised and the ranks are returned."""


def make_results() -> list[comparison.ArmResult]:
  random = np.random.default_rng(0)
  token_counts = random.integers(60, 250, size=240)
  byte_counts = (token_counts * 3.1).astype(np.int64)
  hardness = random.normal(0, 0.55, size=240)
  results = []
  for name, (label, loss, weight_decay, dropout, steps, before) in _ARMS.items():
    nll = (loss + hardness + random.normal(0, 0.08, size=240)) * token_counts
    results.append(
      comparison.ArmResult(
        name=name,
        label=label,
        nll_sums=nll,
        token_counts=token_counts,
        byte_counts=byte_counts,
        train_tokens=steps * _TOKENS_PER_STEP,
        steps=steps,
        schedule={"peak_lr": 3e-3, "warmup_share": 0.05, "batch_size": 4, "seed": 0},
        train_flops=steps * _FLOPS_PER_STEP,
        all_in_flops=steps * _FLOPS_PER_STEP + sum(before.values()) + _seed_flops(before),
        weight_decay=weight_decay,
        dropout=dropout,
        best_validation=loss + 0.02,
        final_validation=loss + (0.05 if name == "baseline" else 0.02),
      )
    )
  return results


def _seed_flops(before: dict[str, float]) -> float:
  return 1.77e12 if before else 0.0


def _curve(result: comparison.ArmResult) -> list[dict[str, Any]]:
  points = []
  for index in range(31):
    share = index / 30
    step = round(share * result.steps)
    validation = result.final_validation + 2.6 * np.exp(-5.5 * share) * (1 - share**4)
    gap = {"oracle": 0.15, "baseline": 1.4}.get(result.name, 1.1)
    points.append(
      {
        "step": step,
        "tokens": step * _TOKENS_PER_STEP,
        "train_loss": None if index == 0 else float(validation - gap * share**1.5),
        "validation_loss": float(validation),
      }
    )
  return points


def make_report() -> dict[str, Any]:
  results = make_results()
  random = np.random.default_rng(1)
  gap = Estimate(0.018, 0.0031, "nats per token")
  arms = {}
  for result in results:
    before = _ARMS[result.name][5]
    arms[result.name] = {
      "label": result.label,
      "train_tokens": result.train_tokens,
      "steps": result.steps,
      "train_flops": result.train_flops,
      "all_in_flops": result.all_in_flops,
      "flops_parts": {
        "seed": _seed_flops(before),
        "embedding": 0.0,
        "tuning": 0.0,
        "sampling": 0.0,
        **before,
        "arm": result.train_flops,
      },
      "seconds": result.steps * 0.061,
      "weight_decay": result.weight_decay,
      "dropout_rate": result.dropout,
      "passes": {
        "oracle": {"unique": 0.47},
        "sbp": {"unique": 10.2, "sbp": 0.97},
        "unconditional": {"unique": 10.2, "unconditional": 0.98},
        "baseline": {"unique": 20.3},
        "baseline_all_in": {"unique": 53.7},
      }[result.name],
      "evals": comparison.evals(result),
      "best_validation": result.best_validation,
      "final_validation": result.final_validation,
      "curve": _curve(result),
    }
  return {
    "title": "SBP, quick run (sample: every number is invented)",
    "command": "python -m selfimprove_jax.main --config=configs/sbp_quick.py --workdir=runs/quick",
    "config": {
      "seed": 0,
      "model": {"dim": 96, "num_layers": 4, "num_heads": 4, "vocab_size": 1024},
      "pairs": {"num_neighbors": 4, "min_similarity": 0.3, "max_jaccard": 0.3},
      "sampling": {"temperature": 1.0, "top_p": None, "filters": ["short", "looping"]},
    },
    "versions": {"python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8", "selfimprove_jax": "0.1.0"},
    "hardware": {"platform": "cpu", "devices": 2, "processor": "x86_64", "memory_gib": 7.7},
    "commit": "71da988",
    "stages": [
      {"name": "corpus", "seconds": 6.1, "tokens": None, "flops": None},
      {"name": "tokenizer", "seconds": 1.3, "tokens": None, "flops": None},
      {"name": "seed", "seconds": 51.2, "tokens": 788_480, "flops": 1.77e12},
      {"name": "pairs", "seconds": 13.4, "tokens": 77_700, "flops": 2e9},
      {"name": "synthesizer", "seconds": 51.0, "tokens": 763_904, "flops": 2.9e12},
      {"name": "synthesis", "seconds": 71.8, "tokens": 810_112, "flops": 3.4e12},
      {"name": "arms", "seconds": 402.9, "tokens": 10_480_640, "flops": 3.25e13},
    ],
    "corpus": {
      "documents": 22_780,
      "groups": 1_912,
      "num_train_documents": 20_414,
      "num_unique_tokens": 77_700,
      "num_oracle_tokens": 3_350_000,
      "num_heldout_documents": 1_458,
      "dropped_by_leakage": 693,
      "leakage_share": 0.322,
    },
    "tokenizer": {"kind": "byte-level BPE", "vocab_size": 1024, "bytes_per_token": 3.1},
    "arms": arms,
    "comparison": comparison.compare(results, seed_noise=0.03, conditioning_gap=gap),
    "conditioning": {
      "true_nll": 4.121,
      "random_nll": 4.139,
      "gap": {"value": gap.value, "stderr": gap.stderr, "unit": gap.unit},
      "gate": 0.05,
      "num_pairs": 212,
    },
    "relevance": {
      "own": {"value": 0.033, "stderr": 0.004, "unit": "cosine"},
      "random": {"value": 0.017, "stderr": 0.002, "unit": "cosine"},
      "real": {"value": 0.230, "stderr": 0.009, "unit": "cosine"},
      "retained_share": 0.075,
    },
    "pairs": {
      "counts": {"candidates": 4_312, "kept": 2_216, "near_duplicates": 873, "too_long": 301},
      "recall": {"value": 0.984, "stderr": 0.004},
      "similarities": [float(x) for x in np.clip(random.beta(2, 3, size=2216) + 0.3, 0.3, 0.98)],
    },
    "synthesis": {
      source: {
        "counts": {"sampled": 8_120, "kept": 7_894, "too_short": 201, "looping": 25},
        "finish_reasons": {"eos": 7_644, "length": 476},
        "quality": {
          "repeated_3grams": {"value": 0.009, "stderr": 0.0006, "unit": "share"},
          "copied_8_tokens": {"value": 0.015, "stderr": 0.0011, "unit": "share"},
          "factual_density": {"value": 1.31, "stderr": 0.02, "unit": "per sentence"},
        },
      }
      for source in ("sbp", "unconditional")
    },
    "examples": [
      {
        "source": source,
        "seed_id": "numpy/linalg#lstsq",
        "seed_text": _SEED_TEXT if source == "sbp" else None,
        "text": _SYNTHESIS,
        "finish_reason": "eos",
        "similarity": 0.21 if source == "sbp" else None,
      }
      for source in ("sbp", "unconditional")
    ],
    "pair_examples": [
      {
        "d1": "numpy/linalg#lstsq",
        "d2": "scipy/linalg#lstsq",
        "d1_text": _SEED_TEXT,
        "d2_text": _SEED_TEXT.replace("numpy.linalg", "scipy.linalg"),
        "similarity": 0.83,
      }
    ],
  }


@pytest.fixture
def sample_report() -> dict[str, Any]:
  return make_report()
