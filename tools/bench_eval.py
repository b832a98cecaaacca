"""Measures evaluation against lm-eval's Hugging Face backend, in one run, alternating.

  pip install -c constraints.txt -e '.[parity]' torch
  python tools/bench_eval.py --model=SmolLM2-135M --data_dir=evals

Both score the same pairs (context, continuation) of the same weights in float32, after one turn
that is not timed: choices with answer texts (arc_easy), letters behind five shots (one subject of
mmlu), last words (lambada), and whole documents (openwebtext). Log-likelihoods are compared. The
floor of a kind is its FLOPs: of all tokens of the requests, as lm-eval computes them (of requests
that differ in their last token, one), and of each shared part once, as ours does. Prints a table;
the last line is a JSON object whose `ratio` is lm-eval's time over ours.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import bench_common
import jax
import numpy as np

from selfimprove_jax.evaluation import scoring
from selfimprove_jax.evaluation.tasks import builtin
from selfimprove_jax.evaluation.tasks.items import Document, Example
from selfimprove_jax.language_models import local
from selfimprove_jax.language_models.protocol import ScoreRequest
from selfimprove_jax.pipelines.common.benchmarks import ExamplesConfig, read_examples
from selfimprove_jax.runtime import allocator, partitioning

KINDS = {
  "choices": "arc_easy",
  "letters": "mmlu",
  "words": "lambada",
  "documents": "openwebtext",
}
MAX_LENGTH = 1024


def examples_of(kind: str, arguments: argparse.Namespace) -> list[Example]:
  task = builtin.get(KINDS[kind])
  config = ExamplesConfig(
    task=task.name,
    version=task.version,
    definition=task.definition,
    data_dir=arguments.data_dir,
    hub=False,
    max_examples=None,
  )
  made = read_examples(config)
  if kind == "letters":
    made = (example for example in made if example.group == arguments.subject)
  number = max(arguments.rows // 10, 2) if kind == "documents" else arguments.rows
  return list(itertools.islice(made, number))


def make_peer(folder: str, batch_size: int) -> Callable[[list[Example]], list[list[float]]]:
  """Returns a function that scores examples with lm-eval."""
  import lm_eval.api.instance as instances
  from lm_eval.models.huggingface import HFLM

  model = HFLM(
    pretrained=folder, dtype="float32", device="cpu", batch_size=batch_size, max_length=MAX_LENGTH
  )

  def score(examples: list[Example]) -> list[list[float]]:
    if isinstance(examples[0].item, Document):
      asked = [
        instances.Instance("loglikelihood_rolling", {}, (example.item.text,), i)
        for i, example in enumerate(examples)
      ]
      return [[value] for value in model.loglikelihood_rolling(asked, disable_tqdm=True)]
    pairs = [(i, pair) for i, example in enumerate(examples) for pair in example.item.pairs()]
    asked = [instances.Instance("loglikelihood", {}, pair, i) for i, pair in pairs]
    found: list[list[float]] = [[] for _ in examples]
    for (i, _), (value, _) in zip(pairs, model.loglikelihood(asked, disable_tqdm=True)):
      found[i].append(value)
    return found

  return score


def measure(kind: str, model: Any, peer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
  examples = examples_of(kind, arguments)
  sides = {
    "ours": lambda: [record["logprobs"] for record in scoring.run(model, examples)],
    "peer": lambda: peer(examples),
  }
  forget_prefixes(model)
  before = model.engine.stats()
  scores = {name: side() for name, side in sides.items()}  # compiles
  after = model.engine.stats()
  names = ("prefilled_tokens", "scored_tokens")
  tokens = sum(after.get(name, 0) - before.get(name, 0) for name in names)
  pairs = [(np.concatenate(scores["ours"])), np.concatenate(scores["peer"])]
  seconds: dict[str, list[float]] = {"ours": [], "peer": []}
  with bench_common.Others() as others:
    for turn in range(arguments.turns):
      for name in ("ours", "peer") if turn % 2 else ("peer", "ours"):
        if name == "ours":
          forget_prefixes(model)
        began = time.perf_counter()
        sides[name]()
        seconds[name].append(time.perf_counter() - began)
      bench_common.note(f"{kind}: {seconds['ours'][-1]:.1f} s, {seconds['peer'][-1]:.1f} s")
  others.warn()
  ratios = np.array(seconds["peer"]) / np.array(seconds["ours"])
  return {
    "kind": kind,
    "examples": len(examples),
    "tokens": tokens,
    "peer_tokens": peer_tokens(model, examples),
    "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
    "ratio": {
      "median": float(np.median(ratios)),
      "lowest": float(ratios.min()),
      "highest": float(ratios.max()),
    },
    "max_difference": float(np.abs(np.subtract(*pairs)).max()),
    "others_cpus": others.cpus,
  }


def forget_prefixes(model: local.LocalModel) -> None:
  """Makes the engine forget the shared parts of the last turn, by others that take their place."""
  engine = model.engine
  # An entry of the engine's cache has at least 64 positions, and it holds half a slot for each.
  number = engine.num_slots * engine.max_length // 64
  asked = (
    ScoreRequest(context=[2 + first, 3, 4], continuation=[5, 6], shared=[2])
    for first in range(number)
  )
  for score in model.score(asked):
    assert score.error is None, score.error


def peer_tokens(model: Any, examples: list[Example]) -> int:
  """Counts the tokens that lm-eval computes, without its padding."""
  encode = model.tokenizer.encode
  if isinstance(examples[0].item, Document):
    return sum(len(encode(example.item.text)) for example in examples)
  inputs = {
    (i, tuple(encode(context + continuation)[:-1]))
    for i, example in enumerate(examples)
    for context, continuation in example.item.pairs()
  }
  return sum(len(tokens) for _, tokens in inputs)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--model", required=True, help="folder of Hugging Face weights")
  parser.add_argument("--data_dir", required=True)
  parser.add_argument("--kinds", default=",".join(KINDS))
  parser.add_argument("--subject", default="high_school_psychology")
  parser.add_argument("--rows", type=int, default=100, help="a tenth of them of documents")
  parser.add_argument("--turns", type=int, default=3)
  parser.add_argument("--batch_size", type=int, default=16)
  bench_common.add_flag(parser)
  arguments = parser.parse_args()
  machine = bench_common.begin(arguments.wait_seconds)
  import torch

  torch.set_num_threads(os.cpu_count())
  mesh = partitioning.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  model = local.load(arguments.model, mesh, num_slots=arguments.batch_size, max_length=MAX_LENGTH)
  peer = make_peer(arguments.model, arguments.batch_size)
  flops = model.config.forward_flops_per_token(MAX_LENGTH // 4)
  print("kind       examples  GFLOP ours  lm-eval  seconds ours  lm-eval  ratio  max difference")
  found = []
  for kind in arguments.kinds.split(","):
    found.append(measure(kind, model, peer, arguments))
    f, r = found[-1], found[-1]["ratio"]
    print(
      f"{kind:<10} {f['examples']:>8}  {f['tokens'] * flops / 1e9:>10,.0f} "
      f"{f['peer_tokens'] * flops / 1e9:>8,.0f}  {f['seconds']['ours']:>12.1f} "
      f"{f['seconds']['peer']:>8.1f}  {r['median']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f}) "
      f"{f['max_difference']:.1e}"
    )
  import lm_eval

  versions = {m.__name__: m.__version__ for m in (jax, torch, lm_eval)}
  worst = min(found, key=lambda f: f["ratio"]["median"])
  summary = {"ratio": worst["ratio"]["median"], "spread": worst["ratio"], "what": "evaluation time"}
  print(json.dumps(summary | {"kinds": found, "versions": versions, "machine": machine}))


if __name__ == "__main__":
  allocator.restart_with_it()  # the faster allocator, for both sides
  main()
