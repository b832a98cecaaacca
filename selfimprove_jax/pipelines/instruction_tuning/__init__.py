"""Instruction tuning on conversations or reasoning traces (EntiGraph, appendix D; s1)."""

from selfimprove_jax.pipelines.instruction_tuning.config import Config
from selfimprove_jax.pipelines.instruction_tuning.pipeline import stages
from selfimprove_jax.pipelines.instruction_tuning.report import report

__all__ = ["Config", "report", "stages"]
