"""Sequential and parallel test-time compute on math questions (s1; arXiv 2501.19393)."""

from selfimprove_jax.pipelines.budget_forcing.config import Config
from selfimprove_jax.pipelines.budget_forcing.pipeline import stages
from selfimprove_jax.pipelines.budget_forcing.report import report

__all__ = ["Config", "report", "stages"]
