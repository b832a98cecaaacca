"""Hugging Face's tensors <-> our parameters: names, layers, and the order of the axes.

Axes are written by their letters. Ours are those of the parameter's name, without the layers that
it is stacked on. A Hugging Face axis may hold several of ours: the rows of `q_proj.weight`, whose
shape is (N * H, D), are "NH". Names and shapes are those of transformers' Llama, Qwen2 and Qwen3,
all of whose q and k are in the rotate-half order that our RoPE has too.
"""

import dataclasses
import math
from collections.abc import Callable

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


@dataclasses.dataclass(frozen=True)
class HfTensor:
  """One tensor of a Hugging Face checkpoint, and the part of our parameters that it is.

  Attributes:
    name: in full, `model.layers.3.self_attn.q_proj.weight`.
    path: keys of our parameter.
    layer: its place on the parameter's leading axis; None for a parameter outside the layers.
    ours: axes of our parameter, without the layers.
    axes: our axes that each axis of this tensor holds.
    sizes: of each axis letter.
  """

  name: str
  path: tuple[str, ...]
  layer: int | None
  ours: str
  axes: tuple[str, ...]
  sizes: dict[str, int]

  @property
  def shape(self) -> tuple[int, ...]:
    """As Hugging Face has it."""
    return tuple(math.prod(self.sizes[letter] for letter in letters) for letters in self.axes)

  def to_hf(self, array: np.ndarray) -> np.ndarray:
    """One layer of our parameter in Hugging Face's order of axes."""
    order = [self.ours.index(letter) for letter in "".join(self.axes)]
    return np.ascontiguousarray(array.transpose(order).reshape(self.shape))

  def read_ours(
    self,
    read: Callable[[tuple[slice, ...]], np.ndarray],
    ranges: tuple[slice, ...],
  ) -> np.ndarray:
    """A block of our parameter, of which only what it needs is read.

    Args:
      read: gives the slices of this tensor's axes that it is called with.
      ranges: start and stop on each of our axes, without the layers.
    """
    wanted = dict(zip(self.ours, ranges))
    slices, block_shape = [], []
    for first, *rest in self.axes:
      # Head widths are read whole: heads, not parts of them, are what a mesh shards.
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
  """Every tensor of such a model, in the order in which transformers' modules hold them.

  Args:
    prefix: before all names but that of the head; "" for checkpoints of the bare decoder
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

  def make(table, before, index=None):
    return [
      HfTensor(before + name, tuple(path.split("/")), index, ours, axes, sizes)
      for path, (ours, name, axes) in table.items()
    ]

  tensors = make(_EMBEDDING, prefix)
  for index in range(c.num_layers):
    tensors += make(layer, f"{prefix}layers.{index}.", index)
  tensors += make(_NORM, prefix)
  return tensors if c.tie_embeddings else tensors + make(_HEAD, "")
