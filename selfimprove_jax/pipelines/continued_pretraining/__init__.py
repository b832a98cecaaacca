"""Continued pretraining on new text with replay (EntiGraph; arXiv 2409.07431)."""

from selfimprove_jax.pipelines.continued_pretraining.config import Config
from selfimprove_jax.pipelines.continued_pretraining.pipeline import stages
from selfimprove_jax.pipelines.continued_pretraining.report import report

__all__ = ["Config", "report", "stages"]
