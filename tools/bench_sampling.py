"""Sampling speed against transformers' `generate`, in one run, taking turns.

  python tools/bench_sampling.py                                      # CPU, float32: 135m
  python tools/bench_sampling.py --models=135m,3b --prompt_tokens=512 --new_tokens=256  # GPU

Both sides continue the same prompts with the same weights, greedily, and never stop early. `fixed`
is one batch of equal lengths. `ragged` is a queue of several batches of requests, whose lengths are
log-uniform: prompts from a quarter of `--prompt_tokens` to all of it, completions from a quarter of
`--new_tokens` to four times it. Here the engine refills its slots, while `generate` runs padded
batches, in the order of the queue, to their longest request. Only requested tokens count. The floor
of a decode step is the time to read its memory (all weights once, and the filled part of the cache)
at the copy rate measured here, or the time for its FLOPs at the peak rate of `hardware.py`,
whichever is longer. Prints a table; the last line is a JSON object whose `ratio` is our tokens/s
over those of the faster of `generate`'s caches.
"""

import argparse
import dataclasses
import functools
import gc
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both share one GPU

import bench_common
import bench_train
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from selfimprove_jax.models.checkpoints import hf_export
from selfimprove_jax.models.llama import Llama, LlamaConfig, init_params
from selfimprove_jax.runtime import allocator, hardware, partitioning
from selfimprove_jax.sampling.engine import Engine
from selfimprove_jax.sampling.requests import Request, SamplingConfig

MODELS = bench_train.MODELS | {
  "tiny": (  # for the test of this program
    dict(vocab_size=512, num_layers=2, embed_dim=64, mlp_dim=128, num_heads=4, num_kv_heads=2)
    | dict(qk_norm=True, tie_embeddings=True, head_dim=16, rope_theta=10_000.0),
    1,
    64,
  ),
}
CACHES = ("dynamic", "static")
LENGTHS = ("fixed", "ragged")
# Prompt tokens, new tokens, and batches in the queue of ragged requests; at a batch of 64 fewer,
# because `generate` takes minutes on two cores.
_CPU, _CPU_LARGE, _GPU = (32, 32, 3), (32, 12, 2), (512, 256, 3)
_CPU_LARGE_FROM = 64
# Minimum share of requests whose first tokens agree. In bfloat16 the two largest logits of random
# weights are often equal to within rounding.
_AGREEMENT = {"float32": 0.98, "bfloat16": 0.7}
_REST_SECONDS = 0.5  # the other side's threads spin for a while after their work


@dataclasses.dataclass(frozen=True)
class Case:
  """Requests: prompts, and the number of new tokens of each."""

  batch: int
  lengths: str
  prompts: list[list[int]]
  new_tokens: list[int]

  @property
  def num_tokens(self) -> int:
    return sum(self.new_tokens)


def make_case(
  batch: int,
  lengths: str,
  *,
  vocab_size: int,
  prompt_tokens: int,
  new_tokens: int,
  rounds: int,
) -> Case:
  """Makes random prompts, and the lengths of their completions."""
  rng = np.random.default_rng(0)
  prompt_lengths, new_lengths = [prompt_tokens] * batch, [new_tokens] * batch
  if lengths == "ragged":

    def drawn(low: int, high: int) -> list[int]:
      logs = rng.uniform(np.log(max(low, 1)), np.log(high), batch * rounds)
      return [int(length) for length in np.exp(logs).round()]

    prompt_lengths = drawn(prompt_tokens // 4, prompt_tokens)
    new_lengths = drawn(new_tokens // 4, new_tokens * 4)
  prompts = [rng.integers(0, vocab_size, length).tolist() for length in prompt_lengths]
  return Case(batch, lengths, prompts, new_lengths)


class Ours:
  """Our engine on one device."""

  def __init__(self, model: Llama, params: Any, mesh: jax.sharding.Mesh, case: Case):
    self._engine = Engine(
      model,
      params,
      mesh,
      eos_ids=[],
      pad_id=0,
      num_slots=case.batch,
      max_length=max(p + n for p, n in zip(map(len, case.prompts), case.new_tokens)),
      batch_invariant=False,  # nor is `generate`
    )

  def generate(self, case: Case) -> list[list[int]]:
    completions = self._engine.generate(_requests(case))
    return [completion.tokens for completion in completions]

  def first_tokens(self, case: Case) -> None:
    """Runs until each request of the first batch has streamed its first token."""
    waiting = set(range(case.batch))
    tickets = [
      self._engine.submit(request, lambda update, i=i: waiting.discard(i))
      for i, request in enumerate(_requests(case)[: case.batch])
    ]
    while waiting:
      self._engine.step()
    for ticket in tickets:
      self._engine.cancel(ticket)


def _requests(case: Case) -> list[Request]:
  greedy = SamplingConfig(temperature=0.0)
  return [
    Request(prompt=prompt, max_new_tokens=number, sampling=greedy)
    for prompt, number in zip(case.prompts, case.new_tokens)
  ]


class Peer:
  """transformers' `generate`, on PyTorch."""

  def __init__(self, folder: str, *, dtype: str, num_threads: int, on_gpu: bool):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads)
    self._torch = torch
    self._device = torch.device("cuda" if on_gpu else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
      folder, trust_remote_code=False, dtype=getattr(torch, dtype)
    )
    self._model = model.to(self._device).eval()
    # `generate` takes settings that its config leaves out from here.
    self._model.generation_config.eos_token_id = None
    self._model.generation_config.bos_token_id = None

  def generate(self, case: Case, cache: str) -> list[list[int]]:
    found = []
    for start in range(0, len(case.prompts), case.batch):
      at = slice(start, start + case.batch)
      rows = self._batch(case.prompts[at], max(case.new_tokens[at]), cache)
      found += [row[:number] for row, number in zip(rows, case.new_tokens[at])]
    return found

  def first_tokens(self, case: Case, cache: str) -> None:
    self._batch(case.prompts[: case.batch], 1, cache)

  def _batch(self, prompts: list[list[int]], new_tokens: int, cache: str) -> list[list[int]]:
    from transformers import GenerationConfig

    torch = self._torch
    length = max(map(len, prompts))
    tokens_BT = torch.zeros((len(prompts), length), dtype=torch.int64)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, prompt in enumerate(prompts):
      tokens_BT[row, length - len(prompt) :] = torch.tensor(prompt)
      mask_BT[row, length - len(prompt) :] = 1
    config = GenerationConfig(
      max_new_tokens=new_tokens,
      do_sample=False,
      pad_token_id=0,
      cache_implementation=cache,
    )
    with torch.inference_mode():
      out_BT = self._model.generate(
        tokens_BT.to(self._device),
        attention_mask=mask_BT.to(self._device),
        generation_config=config,
      )
    new_BN = out_BT[:, length:].tolist()
    if len(new_BN[0]) != new_tokens:
      raise RuntimeError(f"asked generate for {new_tokens} tokens, it gave {len(new_BN[0])}")
    return new_BN


def agreement(ours: Sequence[Sequence[int]], peers: Sequence[Sequence[int]]) -> dict[str, float]:
  """Measures how far the completions of both sides agree.

  Returns:
    `first`: the share of requests whose first tokens agree; `tokens`: the share of all tokens that
    precede the first difference within their request.
  """
  same = []
  for ours_N, peers_N in zip(ours, peers, strict=True):
    if len(ours_N) != len(peers_N):
      raise RuntimeError(
        f"a request got {len(ours_N)} tokens from us and {len(peers_N)} from the peer"
      )
    differs = (i for i, (a, b) in enumerate(zip(ours_N, peers_N)) if a != b)
    same.append(next(differs, len(ours_N)))
  return {"first": float(np.mean(np.array(same) > 0)), "tokens": sum(same) / sum(map(len, ours))}


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
  """Times a call, after a rest."""
  time.sleep(_REST_SECONDS)
  began = time.perf_counter()
  work(*arguments)
  return time.perf_counter() - began


def measure(
  case: Case, ours: Ours, peer: Peer, c: LlamaConfig, copy_rate: float, arguments: Any
) -> dict[str, Any]:
  """Times both sides in turns on one case."""
  label = f"{case.lengths} batch of {case.batch}"
  bench_common.note(f"{label}: compiling")
  began = time.perf_counter()
  own_tokens = ours.generate(case)
  ours.first_tokens(case)
  compile_seconds = time.perf_counter() - began
  caches = arguments.caches.split(",")
  for cache in caches:
    bench_common.note(f"{label}: the peer with its {cache} cache")
    # On a GPU `generate` compiles the static cache, for each size.
    if jax.default_backend() == "gpu":
      peer.generate(case, cache)
    else:
      peer.first_tokens(case, cache)
  peer_tokens = []
  by_cache = {
    cache: seconds(lambda cache=cache: peer_tokens.append(peer.generate(case, cache)))
    for cache in caches
  }
  agreed = agreement(own_tokens, peer_tokens[0])
  if agreed["first"] < _AGREEMENT[c.dtype]:
    raise RuntimeError(f"{case.lengths} {case.batch}: the completions differ: {agreed}")
  cache = min(by_cache, key=by_cache.get)

  turns, firsts = [], []
  with bench_common.Others() as others:
    for turn in range(arguments.turns):
      bench_common.note(f"{label}: turn {turn + 1} of {arguments.turns}")
      turns.append((seconds(ours.generate, case), seconds(peer.generate, case, cache)))
      firsts.append((seconds(ours.first_tokens, case), seconds(peer.first_tokens, case, cache)))
  others.warn()
  rates = case.num_tokens / np.array(turns)
  found = {
    "batch": case.batch,
    "lengths": case.lengths,
    "requests": len(case.prompts),
    "tokens": case.num_tokens,
    "cache": cache,
    "cache_tokens_per_second": {name: case.num_tokens / by_cache[name] for name in by_cache},
    "tokens_per_second": [float(x) for x in np.median(rates, axis=0)],
    "first_token_seconds": [float(x) for x in np.median(firsts, axis=0)],
    "agreement": agreed,
    "compile_seconds": compile_seconds,
    "others_cpus": others.cpus,
    "ratio": bench_train.spread(rates[:, 0] / rates[:, 1]),
  }
  if case.lengths == "fixed" and case.new_tokens[0] > 1:
    # In ragged batches the rows of a step fill the cache differently.
    steps = case.new_tokens[0] - 1
    step_seconds = np.maximum(np.median(np.array(turns) - np.array(firsts), axis=0), 1e-9) / steps
    found |= step_report(case, c, step_seconds, copy_rate)
  return found


def step_report(
  case: Case, c: LlamaConfig, step_seconds: np.ndarray, copy_rate: float
) -> dict[str, Any]:
  """Compares a decode step with the memory it must read and the FLOPs it must compute."""
  # On average over the completion, half of its tokens are in the cache.
  filled = len(case.prompts[0]) + case.new_tokens[0] / 2
  lookup = 0 if c.tie_embeddings else c.vocab_size * c.embed_dim
  cached = 2 * c.num_layers * c.num_kv_heads * c.head_dim * filled
  num_bytes = (c.num_parameters - lookup + case.batch * cached) * jnp.dtype(c.dtype).itemsize
  # The function counts a token's attention as to half of the length.
  flops = case.batch * c.forward_flops_per_token(int(2 * filled))
  reading, computing = num_bytes / copy_rate, 0.0
  if found := hardware.peak(jax.devices()[:1], c.dtype):
    computing = flops / found[0]
  floor = max(reading, computing)
  return {
    "step_seconds": step_seconds.tolist(),
    "step_bytes": num_bytes,
    "bandwidth_utilization": (num_bytes / step_seconds / copy_rate).tolist(),
    "floor": {"seconds": floor, "bound": "reading" if reading >= computing else "computing"},
    "of_floor": (floor / step_seconds).tolist(),
  }


def measured_copy_rate() -> float:
  """Returns the bytes per second of a memory copy much larger than the CPU's caches."""
  size = 2**28 if jax.default_backend() == "gpu" else 2**26
  copy = jax.jit(lambda x: x + 1)
  x = copy(jnp.zeros(size, jnp.float32)).block_until_ready()
  least = float("inf")
  for _ in range(7):
    began = time.perf_counter()
    copy(x).block_until_ready()
    least = min(least, time.perf_counter() - began)
  return 2 * x.nbytes / least


def largest_batch(make_ours: Callable[[Case], Ours], make: Callable[[int], Case]) -> dict[str, Any]:
  """Measures our tokens/s at the largest power of two of slots that fits in memory."""
  found, batch = {}, 64
  while True:
    try:
      case = make(batch)
      ours = make_ours(case)
      ours.generate(case)
      rate = case.num_tokens / seconds(ours.generate, case)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return found
    found = {"batch": batch, "tokens_per_second": rate}
    del ours
    gc.collect()
    batch *= 2


def measure_model(name: str, arguments: Any, copy_rate: float) -> list[dict[str, Any]]:
  """Measures and prints all cases of a model."""
  on_gpu = jax.default_backend() == "gpu"
  dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
  c = LlamaConfig(**MODELS[name][0], dtype=dtype, param_dtype=dtype, attention="auto")
  model = Llama(c)
  mesh = partitioning.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  params = nn.unbox(jax.jit(lambda key: init_params(model, key))(jax.random.key(0)))

  def make(batch: int, lengths: str = "fixed") -> Case:
    defaults = _GPU if on_gpu else _CPU_LARGE if batch >= _CPU_LARGE_FROM else _CPU
    return make_case(
      batch,
      lengths,
      vocab_size=c.vocab_size,
      prompt_tokens=arguments.prompt_tokens or defaults[0],
      new_tokens=arguments.new_tokens or defaults[1],
      rounds=arguments.rounds or defaults[2],
    )

  make_ours = functools.partial(Ours, model, params, mesh)
  batches = arguments.batches.split(",")
  cases = [
    make(int(batch), lengths)
    for batch in batches
    if batch != "largest"
    for lengths in arguments.lengths.split(",")
  ]
  longest = max((len(p) + n for case in cases for p, n in zip(case.prompts, case.new_tokens)))
  with tempfile.TemporaryDirectory() as folder:
    hf_export.save_pretrained(
      folder, params, c, tokenizer=None, generation=None, max_positions=2 * longest, dtype=dtype
    )
    peer = Peer(folder, dtype=dtype, num_threads=arguments.threads, on_gpu=on_gpu)
  found = []
  for case in cases:
    shape = {"model": name, "parameters": c.num_parameters, "dtype": dtype}
    found.append(shape | measure(case, make_ours(case), peer, c, copy_rate, arguments))
    gc.collect()
    print_case(found[-1])
  if "largest" in batches:
    largest = {"model": name, "lengths": "largest"} | largest_batch(make_ours, make)
    print(f"{name:>6} largest batch: {largest}", flush=True)
    found.append(largest)
  return found


def print_case(f: dict[str, Any]) -> None:
  (ours, peer), firsts, r = f["tokens_per_second"], f["first_token_seconds"], f["ratio"]
  step = " " * 22
  if "step_seconds" in f:
    ms, used = f["step_seconds"][0] * 1e3, f["bandwidth_utilization"][0]
    step = f"{ms:>7.1f} {used:>6.0%} {f['of_floor'][0]:>7.0%}"
  print(
    f"{f['model']:>6} {f['batch']:>5} {f['lengths']:>7} {ours:>10,.1f} {peer:>10,.1f} "
    f"{f['cache']:>8} {step} {firsts[0] * 1e3:>8.0f} {firsts[1] * 1e3:>8.0f} "
    f"{f['agreement']['tokens']:>6.0%}  {r['median']:.2f} ({r['p10']:.2f} to {r['p90']:.2f})",
    flush=True,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--models", default="135m", help=f"comma-separated; any of {', '.join(MODELS)}"
  )
  parser.add_argument(
    "--batches",
    default="1,16,64",
    help="comma-separated; `largest` is found by doubling, for us alone (GPU)",
  )
  parser.add_argument("--lengths", default=",".join(LENGTHS), help=f"any of {', '.join(LENGTHS)}")
  parser.add_argument("--caches", default=",".join(CACHES), help=f"any of {', '.join(CACHES)}")
  parser.add_argument("--turns", type=int, default=3, help="turns of each side")
  parser.add_argument("--prompt_tokens", type=int, help="length of prompts; the maximum, if ragged")
  parser.add_argument(
    "--new_tokens", type=int, help="length of completions; if ragged, a quarter to four times it"
  )
  parser.add_argument("--rounds", type=int, help="batches in the ragged queue")
  parser.add_argument("--dtype", help="float32 on CPU, bfloat16 on GPU")
  parser.add_argument(
    "--threads", type=int, default=os.cpu_count(), help="PyTorch's threads on CPU"
  )
  bench_common.add_flag(parser)
  arguments = parser.parse_args()
  for flag, known in (("models", MODELS), ("lengths", LENGTHS), ("caches", CACHES)):
    if unknown := set(getattr(arguments, flag).split(",")) - set(known):
      parser.error(f"unknown {flag} {sorted(unknown)}; there are {sorted(known)}")
  machine = bench_common.begin(arguments.wait_seconds)
  copy_rate = measured_copy_rate()
  print(f"copies {copy_rate / 1e9:.1f} GB/s (read and written)")
  print(
    f"{'model':>6} {'batch':>5} {'lengths':>7} {'ours tok/s':>10} {'peer tok/s':>10} {'cache':>8} "
    f"{'step ms':>7} {'MBU':>6} {'floor':>7} {'first ms':>8} {'peer':>8} {'agree':>6}  ratio"
  )
  found = []
  for name in arguments.models.split(","):
    found += measure_model(name, arguments, copy_rate)
    gc.collect()
  import torch
  import transformers

  versions = {m.__name__: m.__version__ for m in (jax, torch, transformers)}
  compared = [f for f in found if "ratio" in f]
  least = min(compared, key=lambda f: f["ratio"]["median"])
  headline = [f for f in compared if (f["batch"], f["lengths"]) == (16, "ragged")]
  shown = min(headline, key=lambda f: f["ratio"]["median"]) if headline else least
  print(
    f"the ratio is for {shown['model']} at batch {shown['batch']}, {shown['lengths']}; the "
    f"least is {least['ratio']['median']:.2f}, at batch {least['batch']}, {least['lengths']}"
  )
  summary = {
    "ratio": shown["ratio"]["median"],
    "spread": shown["ratio"],
    "least": least["ratio"]["median"],
    "what": f"sampling tokens/s, batch {shown['batch']}, {shown['lengths']} lengths",
  }
  machine |= {"device": jax.devices()[0].device_kind, "copy_bytes_per_second": copy_rate}
  print(json.dumps(summary | {"cases": found, "versions": versions, "machine": machine}))


if __name__ == "__main__":
  if not pathlib.Path("/dev/nvidia0").exists():
    allocator.restart_with_it()  # for both sides
  main()
