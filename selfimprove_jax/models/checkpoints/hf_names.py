"""Maps Hugging Face's tensors to our parameters: names, layers, and the order of the axes.

Letters name the axes: those of our parameter's name, without the leading axis of the layers. A
Hugging Face axis may hold several of ours: the rows of `q_proj.weight`, whose shape is (N * H, D),
are "NH". Names and shapes are those of transformers' Llama, Qwen2 and Qwen3, whose query and key
dimensions are in rotate-half order, as in our RoPE.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from selfimprove_jax.models.llama import Llama, LlamaConfig, abstract_params
from selfimprove_jax.runtime.progress import Progress

Reader = Callable[[tuple[slice, ...]], np.ndarray]
"""Reads a block of an array."""

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
_LAYER_NUMBER = re.compile(r"(?:(?:model\.)?layers|blk)\.(\d{1,9})\.")
_LISTED = 8  # tensors listed in an error


@dataclasses.dataclass(frozen=True)
class HfTensor:
  """A tensor of a Hugging Face checkpoint, and its place in our parameters.

  Attributes:
    name: the full name, `model.layers.3.self_attn.q_proj.weight`.
    path: keys of our parameter.
    layer: index on the parameter's leading axis; None for a parameter outside the layers.
    ours: axes of our parameter, without the layers.
    axes: our axes in each axis of this tensor.
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

  def read_ours(self, read: Reader, ranges: tuple[slice, ...]) -> np.ndarray:
    """Reads a block of one layer of our parameter, and no more of the tensor than it needs.

    Args:
      read: reads slices of this tensor's axes.
      ranges: start and stop on each of our axes, without the layers.
    """
    wanted = dict(zip(self.ours, ranges))
    slices, block_shape = [], []
    for first, *rest in self.axes:
      # Reads whole heads, since a slice of H is not contiguous in an axis "NH". It costs nothing:
      # a mesh shards heads, never the dimensions of a head.
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
    prefix: precedes all names but the head's; "" for a bare decoder (`Qwen3Model`).
  """
  sizes = dict(V=c.vocab_size, D=c.embed_dim, F=c.mlp_dim)
  sizes |= dict(N=c.num_heads, K=c.num_kv_heads, H=c.head_dim)
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


def place_params(
  config: LlamaConfig,
  mesh: Mesh,
  tensors: Sequence[HfTensor],
  make_reader: Callable[[list[HfTensor], jax.ShapeDtypeStruct], Reader],
  progress: Progress,
) -> Any:
  """Loads our parameters onto a mesh, one at a time; reads the blocks that local devices hold.

  Args:
    make_reader: (a parameter's tensors in order of layer, its shape and dtype) -> its reader.
  """
  by_path: dict[tuple[str, ...], list[HfTensor]] = {}
  for tensor in tensors:
    by_path.setdefault(tensor.path, []).append(tensor)

  def load(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    read = make_reader(by_path[tuple(entry.key for entry in path)], leaf)
    array = jax.make_array_from_callback(leaf.shape, leaf.sharding, read, dtype=leaf.dtype)
    # Transfers are asynchronous: without this, the host would hold several parameters at a time.
    array = jax.block_until_ready(array)
    bar.update(array.nbytes)
    return array

  abstract = abstract_params(Llama(config), mesh)
  total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
  with progress.track(total, "reading", "bytes") as bar:
    return jax.tree.map_with_path(load, abstract)


def check_layers(where: str | os.PathLike, names: Iterable[str], config: LlamaConfig) -> None:
  """Raises ValueError if tensors have other layers than a config; call it before `hf_tensors`.

  A config may claim any number of layers, and each one costs memory.

  Args:
    names: tensors of Hugging Face or GGUF.
  """
  found = {int(match[1]) for match in map(_LAYER_NUMBER.match, names) if match}
  if len(found) < config.num_layers:
    raise ValueError(
      f"{where} lacks layers: it holds tensors of {len(found)}, and its config has "
      f"{config.num_layers}"
    )


def check_shapes(
  where: str | os.PathLike,
  found: Mapping[str, tuple[int, ...]],
  expected: Mapping[str, tuple[int, ...]],
) -> None:
  """Raises ValueError if tensors are missing, extra or of another shape."""
  if missing := [name for name in expected if name not in found]:
    raise ValueError(f"{where} lacks {some(missing)}")
  if extra := sorted(found.keys() - expected.keys()):
    raise ValueError(f"{where} has tensors that the model lacks: {some(extra)}")
  if wrong := [f"{n} {found[n]} instead of {s}" for n, s in expected.items() if found[n] != s]:
    raise ValueError(f"{where} has tensors of another shape: {some(wrong)}")


def some(items: Sequence[str]) -> str:
  """Lists the first items and counts the rest, for an error message."""
  rest = len(items) - _LISTED
  return ", ".join(items[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
