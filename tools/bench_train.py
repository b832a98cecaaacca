"""Measures training speed against PyTorch with transformers, in one run, alternating.

  python tools/bench_train.py                                  # CPU, float32: 7m, 36m, 135m
  python tools/bench_train.py --models=135m,1b,3b --rows=8     # GPU, bfloat16

Both train the same model from the same weights (the first losses are compared) on the same tokens,
with AdamW and clipping: ours with the library's train step, packed segments included; the peer with
transformers' fastest attention, fused AdamW and, on a GPU, `torch.compile` and autocast. The floor
is the speed at which the model's FLOPs would take no longer than a large matmul's on this machine.
Prints a table; the last line is a JSON object whose `ratio` is our speed over the peer's.
"""

import argparse
import gc
import json
import os
import pathlib
import tempfile
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both sides share one GPU

import bench_common
import jax
import numpy as np

from selfimprove_jax.models.checkpoints import hf_export
from selfimprove_jax.models.llama import Llama, LlamaConfig
from selfimprove_jax.runtime import allocator, hardware, partitioning, xla_options
from selfimprove_jax.training import losses, train_step
from selfimprove_jax.training.config import TrainingConfig

_QWEN = dict(qk_norm=True, tie_embeddings=True, head_dim=64, rope_theta=10_000.0)
# Name -> shape, and rows and tokens per row of a batch on CPU. 135m has the shape of SmolLM2.
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
  "7m": (
    dict(vocab_size=8192, num_layers=6, embed_dim=256, mlp_dim=768, num_heads=4, num_kv_heads=2)
    | _QWEN,
    8,
    256,
  ),
  "36m": (
    dict(vocab_size=16_384, num_layers=8, embed_dim=512, mlp_dim=1664, num_heads=8, num_kv_heads=4)
    | _QWEN,
    4,
    512,
  ),
  "135m": (
    dict(vocab_size=49_152, num_layers=30, embed_dim=576, mlp_dim=1536, num_heads=9, num_kv_heads=3)
    | _QWEN
    | dict(qk_norm=False, rope_theta=100_000.0, norm_eps=1e-5),
    2,
    512,
  ),
  "1b": (
    dict(vocab_size=49_152, num_layers=24, embed_dim=2048, mlp_dim=5632, num_heads=16)
    | dict(num_kv_heads=8, qk_norm=True, head_dim=128, rope_theta=500_000.0),
    1,
    4096,
  ),
  "3b": (
    dict(vocab_size=49_152, num_layers=26, embed_dim=3072, mlp_dim=8064, num_heads=24)
    | dict(num_kv_heads=8, qk_norm=True, head_dim=128, rope_theta=500_000.0),
    1,
    4096,
  ),
}
_TRAINING = TrainingConfig(batch_rows=1, peak_lr=1e-4, final_lr=1e-4, warmup_fraction=0.0)
_WEIGHT_DECAY = 0.1


class Ours:
  """The library's train step on one device."""

  def __init__(self, config: LlamaConfig, tokens_BT: np.ndarray):
    model = Llama(config)
    rate = _TRAINING.learning_rate(1_000_000)
    tx = _TRAINING.make_optimizer(rate, weight_decay=_WEIGHT_DECAY)
    self._mesh = mesh = partitioning.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    self._state = train_step.init_state(model, tx, mesh, key=jax.random.key(0))
    self._step = train_step.make_train_step(losses.next_token_loss(model), model, tx, rate, mesh)
    B, T = tokens_BT.shape
    loss_mask = np.ones((B, T), bool)
    loss_mask[:, 0] = False
    self._batch = partitioning.global_batch(
      {
        "tokens": tokens_BT,
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "segment_ids": np.ones((B, T), np.int32),
        "loss_mask": loss_mask,
      },
      mesh,
    )
    self._key = jax.random.key(1)

  def save(self, folder: str, config: LlamaConfig, seq_len: int) -> None:
    """Writes the weights as a folder for transformers."""
    hf_export.save_pretrained(
      folder,
      self._state.params,
      config,
      tokenizer=None,
      generation=None,
      max_positions=seq_len,
      dtype="float32",
    )

  def steps(self, number: int) -> float:
    """Makes steps; returns the last loss, which exists only when they have ended."""
    with jax.set_mesh(self._mesh):
      for _ in range(number):
        self._state, metrics = self._step(self._state, self._batch, self._key)
    return float(metrics["loss"])


class Peer:
  """PyTorch with transformers."""

  def __init__(self, folder: str, tokens_BT: np.ndarray, *, num_threads: int, on_gpu: bool):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads)
    self._torch = torch
    self._device = torch.device("cuda" if on_gpu else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
      folder, trust_remote_code=False, dtype=torch.float32
    )
    self._model = model.to(self._device).train()
    self._optimizer = torch.optim.AdamW(
      self._model.parameters(),
      lr=_TRAINING.peak_lr,
      betas=(_TRAINING.b1, _TRAINING.b2),
      eps=_TRAINING.eps,
      weight_decay=_WEIGHT_DECAY,
      fused=True,
    )
    self._forward = torch.compile(self._model) if on_gpu else self._model
    self._tokens_BT = torch.tensor(tokens_BT, dtype=torch.int64, device=self._device)

  def steps(self, number: int) -> float:
    torch = self._torch
    for _ in range(number):
      with torch.autocast(self._device.type, torch.bfloat16, self._device.type == "cuda"):
        out = self._forward(input_ids=self._tokens_BT, labels=self._tokens_BT, use_cache=False)
      out.loss.backward()
      torch.nn.utils.clip_grad_norm_(self._model.parameters(), _TRAINING.clip_norm)
      self._optimizer.step()
      self._optimizer.zero_grad(set_to_none=True)
    return out.loss.item()

  def peak_bytes(self) -> int | None:
    cuda = self._torch.cuda
    return cuda.max_memory_allocated() if self._device.type == "cuda" else None


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
  """Alternates turns of both sides for one model; returns speeds and their ratio."""
  on_gpu = jax.default_backend() == "gpu"
  shape, rows, seq_len = MODELS[name]
  rows, seq_len = arguments.rows or rows, arguments.seq_len or seq_len
  config = LlamaConfig(
    **shape,
    dtype=arguments.dtype or ("bfloat16" if on_gpu else "float32"),
    remat=arguments.remat,
    attention="auto",
    scan_unroll=1 if on_gpu else shape["num_layers"],
  )
  tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (rows, seq_len))
  bench_common.note(f"{name}: compiling")
  ours = Ours(config, tokens_BT.astype(np.int32))
  with tempfile.TemporaryDirectory() as folder:
    ours.save(folder, config, seq_len)
    peer = Peer(folder, tokens_BT, num_threads=arguments.threads, on_gpu=on_gpu)
  first = ours.steps(1), peer.steps(1)
  tolerance = 1e-2 if on_gpu else 1e-4
  if abs(first[0] - first[1]) > tolerance * abs(first[1]):
    raise RuntimeError(f"{name} is not the same model on both sides: first losses {first}")
  ours.steps(1), peer.steps(1)

  def seconds(side: Ours | Peer) -> float:
    time.sleep(0.5)  # the other side's threads spin for a while after their last work
    began = time.perf_counter()
    side.steps(arguments.steps)
    return (time.perf_counter() - began) / arguments.steps

  turns = []
  with bench_common.Others() as others:
    for turn in range(arguments.turns):
      bench_common.note(f"{name}: turn {turn + 1} of {arguments.turns}")
      turns.append((seconds(ours), seconds(peer)))
  others.warn()
  peak, peak_name = hardware.peak(jax.devices()[:1], config.dtype)
  flops = rows * seq_len * config.train_flops_per_token(seq_len)
  rates = rows * seq_len / np.array(turns)
  stats = jax.devices()[0].memory_stats() or {}
  return {
    "model": name,
    "parameters": config.num_parameters,
    "rows": rows,
    "seq_len": seq_len,
    "dtype": config.dtype,
    "first_losses": first,
    "tokens_per_second": [float(x) for x in np.median(rates, axis=0)],
    "mfu": [float(x) for x in np.median(rates, axis=0) * flops / (rows * seq_len) / peak],
    "peak": {"flops_per_second": peak, "name": peak_name},
    "floor_tokens_per_second": rows * seq_len * peak / flops,
    "ratio": spread(rates[:, 0] / rates[:, 1]),
    "others_cpus": others.cpus,
    "peak_bytes": [stats.get("peak_bytes_in_use"), peer.peak_bytes()],
  }


def spread(values: np.ndarray) -> dict[str, float]:
  low, middle, high = np.percentile(values, [10, 50, 90])
  return {"p10": float(low), "median": float(middle), "p90": float(high)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--models", default="7m,36m,135m", help=f"comma-separated, from {', '.join(MODELS)}"
  )
  parser.add_argument("--turns", type=int, default=9, help="turns of each side")
  parser.add_argument("--steps", type=int, default=1, help="steps per turn")
  parser.add_argument("--rows", type=int, help="rows per batch; each model has a default for CPU")
  parser.add_argument("--seq_len", type=int)
  parser.add_argument("--dtype", help="default: float32 on CPU, bfloat16 on GPU")
  parser.add_argument("--remat", default="none")
  parser.add_argument(
    "--threads", type=int, default=os.cpu_count(), help="threads of PyTorch on CPU"
  )
  parser.add_argument(
    "--xla_options",
    help="NAME=VALUE,... instead of those of runtime/xla_options.py, to try out; '' for none",
  )
  bench_common.add_flag(parser)
  arguments = parser.parse_args()
  if unknown := set(arguments.models.split(",")) - MODELS.keys():
    parser.error(f"unknown models {sorted(unknown)}; there are {sorted(MODELS)}")
  if arguments.xla_options is not None:
    options = dict(pair.split("=") for pair in arguments.xla_options.split(",") if pair)
    xla_options.OPTIONS |= {"cpu": options, "cpu_avx512": {}, "gpu": options}
  found = []
  machine = bench_common.begin(arguments.wait_seconds)
  used = xla_options.for_platform(jax.devices()[0].platform)
  print(f"XLA options: {used or 'none'}")
  print(
    f"{'model':>6} {'ours tok/s':>11} {'MFU':>6} {'peer tok/s':>11} {'MFU':>6} {'floor':>9}  ratio"
  )
  for name in arguments.models.split(","):
    found.append(measure(name, arguments))
    gc.collect()
    f, r = found[-1], found[-1]["ratio"]
    (ours, peer), (mfu, peer_mfu) = f["tokens_per_second"], f["mfu"]
    ratio = f"{r['median']:.2f} ({r['p10']:.2f} to {r['p90']:.2f})"
    print(
      f"{name:>6} {ours:>11,.0f} {mfu:>6.1%} {peer:>11,.0f} {peer_mfu:>6.1%} "
      f"{f['floor_tokens_per_second']:>9,.0f}  {ratio}",
      flush=True,
    )
  import torch
  import transformers

  versions = {m.__name__: m.__version__ for m in (jax, torch, transformers)}
  worst = min(found, key=lambda f: f["ratio"]["median"])
  print(f"the reported ratio is the lowest of all models: {worst['model']}")
  summary = {
    "ratio": worst["ratio"]["median"],
    "spread": worst["ratio"],
    "what": "training tokens/s",
  }
  print(
    json.dumps(
      summary | {"xla_options": used, "models": found, "versions": versions, "machine": machine}
    )
  )


if __name__ == "__main__":
  if not pathlib.Path("/dev/nvidia0").exists():
    allocator.restart_with_it()  # the faster allocator, for both sides
  main()
