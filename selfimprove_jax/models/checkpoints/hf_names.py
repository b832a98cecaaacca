"""Maps Hugging Face's tensors to our parameters: names, layers, and the order of the axes.

Axes are named by letters. Our axes are those of the parameter's name, without the leading axis of
the layers. A Hugging Face axis may hold several of ours: the rows of `q_proj.weight`, whose shape
is (N * H, D), are "NH". Names and shapes are those of transformers' Llama, Qwen2 and Qwen3, which
have the query and key dimensions in rotate-half order, as our RoPE does.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from selfimprove_jax.models.llama import LlamaConfig

# Our path -> (our axes, Hugging Face's name, its axes).
_EMBEDDING = {"embedding_VD": ("VD", "embed_tokens.weight", ("V", "D"))}
_NORM = {"final_norm/scale": ("D", "norm.weight", ("D",))}
_HEAD = {"head_DV": ("DV", "lm_head.weight", ("V", "D"))}
_LAYER = {
  "layers/attention_norm/scale": ("D", "input_layernorm.weight", ("D",)),
  "layers/attention/wq_DNH": ("DNH", "self_attn.q_proj.weight", ("NH", "D")),
  "layers/attention/wk_DKH": ("DKH", "self_attn.k_proj.weight", ("KH", "D")),
  "layers/attention/wv_DKH": ("DKH", "self_attn.v_proj.weight", ("KH", "D")),
  "layers/attention/wo_NHD": ("NHD", "self_attn.o_proj.weight", ("D", "NH")),
  "layers/mlp_norm/scale": ("D", "post_attention_layernorm.weight", ("D",)),
  "layers/mlp/w_gate_DF": ("DF", "mlp.gate_proj.weight", ("F", "D")),
  "layers/mlp/w_up_DF": ("DF", "mlp.up_proj.weight", ("F", "D")),
  "layers/mlp/w_down_FD": ("FD", "mlp.down_proj.weight", ("D", "F")),
}
_BIASES = {
  "layers/attention/bq_NH": ("NH", "self_attn.q_proj.bias", ("NH",)),
  "layers/attention/bk_KH": ("KH", "self_attn.k_proj.bias", ("KH",)),
  "layers/attention/bv_KH": ("KH", "self_attn.v_proj.bias", ("KH",)),
}
_QK_NORM = {
  "layers/attention/q_norm/scale": ("H", "self_attn.q_norm.weight", ("H",)),
  "layers/attention/k_norm/scale": ("H", "self_attn.k_norm.weight", ("H",)),
}
_LISTED = 8  # tensors listed in an error


@dataclasses.dataclass(frozen=True)
class HfTensor:
  """A tensor of a Hugging Face checkpoint and the part of our parameters that it corresponds to.

  Attributes:
    name: the full name, `model.layers.3.self_attn.q_proj.weight`.
    path: keys of our parameter.
    layer: index on the parameter's leading axis; None for a parameter outside the layers.
    ours: axes of our parameter, without the layers.
    axes: for each axis of this tensor, our axes that it holds.
    sizes: the size of each axis letter.
  """

  name: str
  path: tuple[str, ...]
  layer: int | None
  ours: str
  axes: tuple[str, ...]
  sizes: dict[str, int]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape in the Hugging Face checkpoint."""
    return tuple(math.prod(self.sizes[letter] for letter in letters) for letters in self.axes)

  def to_hf(self, array: np.ndarray) -> np.ndarray:
    """Converts one layer of our parameter to Hugging Face's order of axes."""
    order = [self.ours.index(letter) for letter in "".join(self.axes)]
    return np.ascontiguousarray(array.transpose(order).reshape(self.shape))

  def read_ours(
    self,
    read: Callable[[tuple[slice, ...]], np.ndarray],
    ranges: tuple[slice, ...],
  ) -> np.ndarray:
    """Reads a block of one layer of our parameter, and no more of the tensor than it needs.

    Args:
      read: reads the given slices of this tensor's axes.
      ranges: start and stop on each of our axes, without the layers.
    """
    wanted = dict(zip(self.ours, ranges))
    slices, block_shape = [], []
    for first, *rest in self.axes:
      # Whole heads are read, since a slice of H is not contiguous in an axis "NH". It costs
      # nothing: a mesh shards heads, never the dimensions of a head.
      inner = math.prod(self.sizes[letter] for letter in rest)
      slices.append(slice(wanted[first].start * inner, wanted[first].stop * inner))
      block_shape += [wanted[first].stop - wanted[first].start]
      block_shape += [self.sizes[letter] for letter in rest]
    hf_order = "".join(self.axes)
    block = read(tuple(slices)).reshape(block_shape)
    block = block.transpose([hf_order.index(letter) for letter in self.ours])
    heads = {letter for _, *rest in self.axes for letter in rest}
    return block[tuple(r if x in heads else slice(None) for x, r in wanted.items())]


def hf_tensors(c: LlamaConfig, *, prefix: str = "model.") -> list[HfTensor]:
  """Returns the tensors of a model, in the order of transformers' modules.

  Args:
    prefix: precedes all names except that of the head; "" for a checkpoint of the bare decoder
      (`Qwen3Model`).
  """
  sizes = {
    "V": c.vocab_size,
    "D": c.embed_dim,
    "F": c.mlp_dim,
    "N": c.num_heads,
    "K": c.num_kv_heads,
    "H": c.head_dim,
  }
  layer = _LAYER | (_BIASES if c.qkv_bias else {}) | (_QK_NORM if c.qk_norm else {})

  def make(table: Mapping[str, tuple], before: str, index: int | None = None) -> list[HfTensor]:
    return [
      HfTensor(before + name, tuple(path.split("/")), index, ours, axes, sizes)
      for path, (ours, name, axes) in table.items()
    ]

  tensors = make(_EMBEDDING, prefix)
  for index in range(c.num_layers):
    tensors += make(layer, f"{prefix}layers.{index}.", index)
  tensors += make(_NORM, prefix)
  return tensors if c.tie_embeddings else tensors + make(_HEAD, "")


def tensors_by_path(tensors: Sequence[HfTensor]) -> dict[tuple[str, ...], list[HfTensor]]:
  """Groups tensors by our parameter; the layers of a parameter are in order."""
  by_path: dict[tuple[str, ...], list[HfTensor]] = {}
  for tensor in tensors:
    by_path.setdefault(tensor.path, []).append(tensor)
  return by_path


def check_shapes(
  where: str | os.PathLike,
  found: Mapping[str, tuple[int, ...]],
  expected: Mapping[str, tuple[int, ...]],
) -> None:
  """Raises ValueError if tensors are missing, superfluous or of another shape."""
  if missing := [name for name in expected if name not in found]:
    raise ValueError(f"{where} lacks {some(missing)}")
  if extra := sorted(found.keys() - expected.keys()):
    raise ValueError(f"{where} has tensors that the model lacks: {some(extra)}")
  wrong = [
    f"{name} {found[name]} instead of {shape}"
    for name, shape in expected.items()
    if found[name] != shape
  ]
  if wrong:
    raise ValueError(f"{where} has tensors of another shape: {some(wrong)}")


def some(items: Sequence[str]) -> str:
  """Lists the first items and counts the rest, for an error message."""
  rest = len(items) - _LISTED
  return ", ".join(items[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
