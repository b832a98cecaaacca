"""Rephrasing: a document told again in a style, the baseline of EntiGraph (2409.07431, 4.1).

The styles easy, medium and hard follow WRAP (arXiv 2401.16380); qa turns a document into questions
and answers, as the paper's ablation does (its appendix E).
"""

from typing import Any

from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.language_models.protocol import TextRequest
from selfimprove_jax.synthesis import records
from selfimprove_jax.synthesis.prompts import PromptSet
from selfimprove_jax.synthesis.records import GenerationConfig, Origin
from selfimprove_jax.synthesis.units import Unit


def make_request(
  unit: Unit,
  source: SourceDocument,
  prompts: PromptSet,
  generation: GenerationConfig,
  attempt: int,
) -> TextRequest:
  """Returns the call of a unit of a kind `rephrase/STYLE`; `attempt` counts from 0."""
  max_tokens = generation.max_tokens.rephrase
  return records.text_request(unit, source, prompts, generation, attempt, max_tokens=max_tokens)


def read(origin: Origin, source: SourceDocument) -> dict[str, Any]:
  """Returns the record of a reply."""
  del source  # all kinds of units are read alike
  return records.read_text(origin)
