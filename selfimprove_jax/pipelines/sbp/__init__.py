"""Synthetic bootstrapped pretraining (SBP; arXiv 2509.15248)."""

from selfimprove_jax.pipelines.sbp.config import Config
from selfimprove_jax.pipelines.sbp.pipeline import stages
from selfimprove_jax.pipelines.sbp.report import report

__all__ = ["Config", "report", "stages"]
