"""Speed and accuracy of the attention implementations on one GPU, beside PyTorch's.

  python tools/bench_attention.py
  python tools/bench_attention.py --rows=1 --seq_len=256 --implementations=xla,pallas_gpu   # CPU

Every implementation attends over the same bfloat16 rows, forward alone and with its gradients: rows
of one document, and rows packed from several. The peer is `scaled_dot_product_attention` of
PyTorch on rows of one document. The floor is the time for the causal half of the products' FLOPs at
the speed of an 8192 x 8192 matrix product measured here (1024 x 1024 on a CPU). Errors are
relative norms against plain attention in float32 with full precision. Prints a table; the last
line is a JSON object whose `ratio` is the peer's time over that of `auto`, with gradients.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both sides share one GPU

import bench_common
import jax
import jax.numpy as jnp
import numpy as np
from bench_train import spread

from selfimprove_jax.models import attention

IMPLEMENTATIONS = ("auto", "xla", "pallas_gpu", "cudnn")
_HEADS, _KV_HEADS, _HEAD_DIM = 16, 8, 128
_FORWARD, _GRADIENTS = "forward", "gradients"


def make_inputs(rows: int, seq_len: int, *, packed: bool) -> dict[str, Any]:
  """Makes random queries, keys, values, and the documents of each row."""
  rng = np.random.default_rng(0)
  at = {
    "q": (rows, seq_len, _HEADS, _HEAD_DIM),
    "k": (rows, _KV_HEADS, seq_len, _HEAD_DIM),
    "v": (rows, _KV_HEADS, seq_len, _HEAD_DIM),
    "g": (rows, seq_len, _HEADS, _HEAD_DIM),
  }
  inputs = {name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for name, shape in at.items()}
  starts = np.zeros((rows, seq_len), bool)
  starts[:, 0] = True
  if packed:  # documents of 512 tokens on average
    starts |= rng.random((rows, seq_len)) < 1 / 512
  segments = np.cumsum(starts, axis=1, dtype=np.int32)
  index = np.arange(seq_len, dtype=np.int32)
  positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1).astype(np.int32)
  return inputs | {"positions": positions, "segments": segments if packed else None}


def make_ours(inputs: dict[str, Any], implementation: str, what: str) -> Callable[[], Any]:
  """Returns a call of the compiled attention, or of it and its gradients."""
  positions, segments = inputs["positions"], inputs["segments"]

  def attend(q, k, v):
    return attention.attend(
      q,
      k,
      v,
      query_positions_BT=positions,
      key_positions_BS=positions,
      query_segments_BT=segments,
      key_segments_BS=segments,
      implementation=implementation,
    )

  def with_gradients(q, k, v, g):
    context, pull = jax.vjp(attend, q, k, v)
    return context, *pull(g.astype(context.dtype))

  arguments = [inputs[name] for name in ("q", "k", "v")]
  if what == _FORWARD:
    compiled = jax.jit(attend)
  else:
    compiled, arguments = jax.jit(with_gradients), [*arguments, inputs["g"]]
  return lambda: jax.block_until_ready(compiled(*arguments))


def reference(inputs: dict[str, Any], what: str) -> Any:
  exact = {
    name: value.astype(jnp.float32) if name in "qkvg" else value for name, value in inputs.items()
  }
  with jax.default_matmul_precision("highest"):
    return make_ours(exact, "xla", what)()


def make_peer(inputs: dict[str, Any], what: str) -> Callable[[], None]:
  import torch

  on_gpu = jax.default_backend() == "gpu"
  device = torch.device("cuda" if on_gpu else "cpu")

  def tensor(name: str) -> Any:
    x = inputs[name].swapaxes(1, 2) if name in "qg" else inputs[name]
    return torch.tensor(np.float32(x)).to(device, torch.bfloat16)

  q, k, v = (tensor(name).requires_grad_(what == _GRADIENTS) for name in "qkv")
  g = tensor("g")

  def run() -> None:
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if what == _GRADIENTS:
      torch.autograd.grad(out, (q, k, v), g)
    if on_gpu:
      torch.cuda.synchronize()

  return run


def seconds(run: Callable[[], Any], calls: int) -> list[float]:
  """Times a call several times, after one that is not counted."""
  run()
  found = []
  for _ in range(calls):
    began = time.perf_counter()
    run()
    found.append(time.perf_counter() - began)
  return found


def matmul_flops_per_second() -> float:
  size = 8192 if jax.default_backend() == "gpu" else 1024
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  product = jax.jit(lambda a: a @ a)
  return 2 * size**3 / min(seconds(lambda: product(x).block_until_ready(), 10))


def measure(arguments: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
  """Times every implementation; prints a row for each."""
  found = []
  pairs = arguments.rows * arguments.seq_len**2 / 2
  for packed in (False, True):
    inputs = make_inputs(arguments.rows, arguments.seq_len, packed=packed)
    for what in (_FORWARD, _GRADIENTS):
      flops = 4 * pairs * _HEADS * _HEAD_DIM * (1 if what == _FORWARD else 3.5)
      exact = jax.tree.leaves(reference(inputs, what))
      for name in (*arguments.implementations.split(","), *([] if packed else ["pytorch"])):
        row = {"rows": "packed" if packed else "one document", "what": what, "name": name}
        try:
          run = make_peer(inputs, what) if name == "pytorch" else make_ours(inputs, name, what)
          row["seconds"] = seconds(run, arguments.calls)
        except Exception as error:  # an implementation that cannot do it leaves a row that says so
          row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
          row["floor_seconds"] = flops / peak
          if name != "pytorch":
            row["relative_errors"] = [
              float(jnp.linalg.norm(jnp.float32(a) - b) / jnp.linalg.norm(b))
              for a, b in zip(jax.tree.leaves(run()), exact, strict=True)
            ]
        print_row(row)
        found.append(row)
  return found


def print_row(row: dict[str, Any]) -> None:
  label = f"{row['rows']:>12} {row['what']:>9} {row['name']:>10}"
  if "error" in row:
    print(f"{label}  {row['error']}")
    return
  times = spread(np.array(row["seconds"]) * 1e3)
  error = max(row["relative_errors"], default=0) if "relative_errors" in row else None
  print(
    f"{label} {times['median']:>9.3f} ({times['p10']:.3f} to {times['p90']:.3f}) "
    f"{row['floor_seconds'] / (times['median'] / 1e3):>6.0%} "
    f"{'' if error is None else format(error, '.1e')}"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=4)
  parser.add_argument("--seq_len", type=int, default=4096)
  parser.add_argument("--calls", type=int, default=20)
  parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
  bench_common.add_flag(parser)
  arguments = parser.parse_args()
  machine = bench_common.begin(arguments.wait_seconds)
  machine["device"] = jax.devices()[0].device_kind
  peak = matmul_flops_per_second()
  print(f"{machine['device']}, bfloat16 matrix product {peak / 1e12:.1f} TFLOP/s")
  print(f"{'rows':>12} {'what':>9} {'name':>10} {'ms':>9} (10% to 90%) {'floor':>6} error, at most")
  found = measure(arguments, peak)
  times = {
    row["name"]: np.array(row["seconds"])
    for row in found
    if row["rows"] == "one document" and row["what"] == _GRADIENTS and "seconds" in row
  }
  ratio = spread(times["pytorch"] / times["auto"])
  summary = {"ratio": ratio["median"], "spread": ratio, "what": "attention with gradients"}
  versions = {"jax": jax.__version__}
  print(json.dumps(summary | {"cases": found, "versions": versions, "machine": machine}))


if __name__ == "__main__":
  main()
