"""Evaluates a checkpoint on the benchmarks of `evaluation.tasks`."""

from selfimprove_jax.pipelines.evaluation.config import Config
from selfimprove_jax.pipelines.evaluation.pipeline import stages
from selfimprove_jax.pipelines.evaluation.preview import preview
from selfimprove_jax.pipelines.evaluation.report import report

__all__ = ["Config", "preview", "report", "stages"]
