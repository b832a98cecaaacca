"""Language models as their consumers see them; each kind has a file of its own."""

from selfimprove_jax.language_models.protocol import LanguageModel, Reply, TextRequest, Usage

__all__ = ["LanguageModel", "Reply", "TextRequest", "Usage"]
