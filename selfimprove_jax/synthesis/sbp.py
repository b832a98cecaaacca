"""Turns seed documents into prompts, and samples into records (SBP; arXiv 2509.15248, 3.1)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from selfimprove_jax.data.tokenizer import Tokenizer
from selfimprove_jax.sampling.requests import Completion


def seed_index(record: int, *, num_documents: int, seed: int) -> int:
  """Draws the seed document of a record number, uniformly and deterministically."""
  return int(np.random.default_rng([seed, record]).integers(num_documents))


def conditional_prompt(d1_ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
  """Returns `BOS d1 SEP`, which the synthesizer continues with d2."""
  return [tokenizer.bos_id, *d1_ids, tokenizer.sep_id]


def unconditional_prompt(tokenizer: Tokenizer) -> list[int]:
  """Returns `BOS`, which a language model continues with any document (a control; not in SBP)."""
  return [tokenizer.bos_id]


def synthetic_record(
  index: int,
  *,
  source: str,
  seed_document: dict[str, Any] | None,
  prompt: Sequence[int],
  completion: Completion,
  tokenizer: Tokenizer,
) -> dict[str, Any]:
  """Returns the record of one sampled document, which can be traced to its seed."""
  text = tokenizer.decode(completion.tokens)
  if completion.finish_reason == "length":
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the cut may have split a character
  return {
    "id": f"{source}-{index:09d}",
    "seed_id": seed_document["id"] if seed_document else None,
    "seed_text": seed_document["text"] if seed_document else None,
    "text": text,
    "finish_reason": completion.finish_reason,
    "error": completion.error,
    "num_prompt_tokens": len(prompt),
    "num_tokens": len(completion.tokens),
  }
