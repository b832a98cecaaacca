"""Synthetic continued pretraining: EntiGraph and its rivals (arXiv 2409.07431)."""

from selfimprove_jax.pipelines.entigraph.config import Config
from selfimprove_jax.pipelines.entigraph.pipeline import stages
from selfimprove_jax.pipelines.entigraph.preview import preview
from selfimprove_jax.pipelines.entigraph.report import report

__all__ = ["Config", "preview", "report", "stages"]
