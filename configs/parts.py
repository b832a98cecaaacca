"""Parts that config pages share."""

from collections.abc import Iterable
from typing import Any

from selfimprove_jax.runtime.config import choices

# The nine benchmarks of SBP's paper (arXiv 2509.15248).
SBP_TASKS = "arc_challenge,arc_easy,sciq,winogrande,triviaqa,webqs,mmlu,openwebtext,lambada"

_SHAPES = {
  # name: layers, width, feed-forward, heads, kv heads, head width
  "tiny": (2, 32, 64, 2, 1, 16),
  "0.5m": (4, 96, 256, 4, 4, 24),
  "1m": (4, 128, 344, 4, 4, 32),
  "3b": (26, 3072, 8064, 24, 8, 128),  # SBP's; recalled, unverified
  "6b": (32, 4096, 11008, 32, 8, 128),  # SBP's; a guess of about the right size
  "smollm2_135m": (30, 576, 1536, 9, 3, 64),
  "llama3_8b": (32, 4096, 14336, 32, 8, 128),
  "qwen2_32b": (64, 5120, 27648, 40, 8, 128),
}


def llama(shape: str, **options: Any) -> dict[str, Any]:
  """Returns the fields of `LlamaConfig` for a named shape, with the other fields from `options`."""
  layers, width, mlp, heads, kv_heads, head_dim = _SHAPES[shape]
  return dict(
    num_layers=layers,
    embed_dim=width,
    mlp_dim=mlp,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    **options,
  )


def check_variant(variant: str, known: Iterable[str]) -> None:
  """Refuses a variant that a page does not have.

  Raises:
    ValueError: it is unknown; the message lists the variants and names the nearest one.
  """
  if variant not in known:
    raise ValueError(f"variant {variant!r} is unknown{choices(variant, known)}")
