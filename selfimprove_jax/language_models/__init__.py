"""Language models behind one protocol; each kind of model has its own module."""

from selfimprove_jax.language_models.protocol import (
  LanguageModel,
  Reply,
  Score,
  ScoreRequest,
  TextRequest,
  TokenLogprob,
  Usage,
)

__all__ = [
  "LanguageModel",
  "Reply",
  "Score",
  "ScoreRequest",
  "TextRequest",
  "TokenLogprob",
  "Usage",
]
