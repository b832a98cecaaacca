"""Reads the metadata and tensors of GGUF files, llama.cpp's format; needs the extra `gguf`.

The package gguf decodes the tensors. Its own reader of files is not used: it makes several Python
objects of every byte of an array, which takes seconds for a vocabulary, and trusts the lengths that
a damaged file claims.
"""

import dataclasses
import functools
import math
import pathlib
import struct
from typing import Any

import numpy as np

_SCALARS = dict(enumerate("BbHhIif?")) | dict(enumerate("Qqd", start=10))  # struct's letters
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_AXES = 4
# Above any vocabulary, and small enough that a short file can't ask for much memory.
_MAX_ARRAY = 1 << 22


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor is; the shape has the outermost axis first, GGUF stores it reversed."""

  shape: tuple[int, ...]
  type: Any  # gguf.GGMLQuantizationType
  start: int
  num_bytes: int


class GgufFile:
  """A whole GGUF file: what it says was checked against its size.

  Attributes:
    fields: the metadata as Python's values.
    tensors: by name.
  """

  def __init__(self, path: pathlib.Path):
    """Reads everything but the tensors' values; raises ValueError for a damaged file."""
    try:
      import gguf
    except ImportError:
      raise ImportError(
        "reading a .gguf file needs the package gguf: pip install 'selfimprove_jax[gguf]'"
      ) from None
    self.path = path
    self.fields: dict[str, Any] = {}
    self.tensors: dict[str, Tensor] = {}
    self._at = 0
    try:
      self._data = np.memmap(path, mode="r")
      self._bytes = memoryview(self._data)  # cut faster than an array
      self._read_all(gguf)
    except ValueError as error:  # also UnicodeDecodeError, and np.memmap for an empty file
      raise ValueError(f"{path} is not a whole GGUF file: {error}") from error

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor in float32."""
    import gguf

    tensor = self.tensors[name]
    data = self._data[tensor.start : tensor.start + tensor.num_bytes]
    rows = data.reshape(math.prod(tensor.shape[:-1]), -1)
    with np.errstate(all="ignore"):  # a scale may be infinite
      return gguf.dequantize(rows, tensor.type).reshape(tensor.shape)

  def _read_all(self, gguf: Any) -> None:
    magic, version = self._take(4).tobytes(), self._scalar("I")
    if magic != b"GGUF" or version not in _VERSIONS:
      raise ValueError(
        f"it begins with {magic!r} and version {version}, not with b'GGUF' and one of {_VERSIONS}"
      )
    num_tensors, num_fields = self._scalar("Q"), self._scalar("Q")
    for _ in range(num_fields):
      name = self._string()
      if name in self.fields:
        raise ValueError(f"it has {name} twice")
      self.fields[name] = self._value(name, self._scalar("I"))
    found = [self._tensor_info(gguf) for _ in range(self._possible(num_tensors, 24))]
    alignment = self.fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
      raise ValueError(f"general.alignment={alignment!r} must be a power of two")
    data_start = -(-self._at // alignment) * alignment
    for name, tensor in found:
      start = data_start + tensor.start
      if start + tensor.num_bytes > len(self._data):
        raise ValueError(
          f"{name} of {tensor.num_bytes} bytes begins at byte {start} of {len(self._data)}"
        )
      if name in self.tensors:
        raise ValueError(f"it has two tensors named {name}")
      self.tensors[name] = dataclasses.replace(tensor, start=start)

  def _tensor_info(self, gguf: Any) -> tuple[str, Tensor]:
    name, num_axes = self._string(), self._scalar("I")
    if not 1 <= num_axes <= _MAX_AXES:
      raise ValueError(f"{name} has {num_axes} axes; at most {_MAX_AXES} are possible")
    shape = tuple(self._scalar("Q") for _ in range(num_axes))[::-1]
    kind = gguf.GGMLQuantizationType(self._scalar("I"))
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if not all(shape) or shape[-1] % block:
      raise ValueError(
        f"{name} has shape {shape}; the last axis must be a multiple of {block} in {kind.name}"
      )
    num_bytes = math.prod(shape) // block * block_bytes
    return name, Tensor(shape, kind, start=self._scalar("Q"), num_bytes=num_bytes)

  def _value(self, name: str, kind: int) -> Any:
    if kind == _STRING:
      return self._string()
    if kind in _SCALARS:
      return self._scalar(_SCALARS[kind])
    if kind != _ARRAY:
      raise ValueError(f"{name} has the unknown type {kind}")
    kind, length = self._scalar("I"), self._scalar("Q")
    if length > _MAX_ARRAY:
      raise ValueError(f"{name} is an array of {length}; at most {_MAX_ARRAY} are read")
    if kind == _STRING:
      return [self._string() for _ in range(self._possible(length, 8))]
    if kind not in _SCALARS:
      raise ValueError(f"{name} is an array of the type {kind}, which is not supported")
    dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
    return np.frombuffer(self._take(length * dtype.itemsize), dtype).tolist()

  def _string(self) -> str:
    return self._take(self._scalar("Q")).tobytes().decode("utf-8")

  def _scalar(self, letter: str) -> Any:
    return struct.unpack(f"<{letter}", self._take(struct.calcsize(f"<{letter}")))[0]

  def _possible(self, count: int, least_bytes: int) -> int:
    """Returns a count of things that take at least so many bytes, if the rest can hold them."""
    if count * least_bytes > len(self._data) - self._at:
      raise ValueError(f"it claims {count} items at byte {self._at} of {len(self._data)}")
    return count

  def _take(self, count: int) -> memoryview:
    if count > len(self._data) - self._at:
      raise ValueError(f"it ends at byte {len(self._data)}, before {count} bytes at {self._at}")
    self._at += count
    return self._bytes[self._at - count : self._at]


@functools.lru_cache(maxsize=1)
def open_file(path: pathlib.Path, modified: int) -> GgufFile:
  """Returns a file, and the same object until another one was opened.

  Args:
    modified: when it was, in nanoseconds, so that a replaced file is read again.
  """
  del modified
  return GgufFile(path)
