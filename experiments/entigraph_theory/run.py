"""Simulates EntiGraph's toy model, compares it with its theory, and fits the published curve.

  python -m experiments.entigraph_theory.run --workdir=runs/entigraph_theory

Writes result.json and curves.png to the work directory.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from typing import Any

import numpy as np

from experiments.entigraph_theory import published, theory


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--num_entities", type=int, default=100)
  parser.add_argument("--mean_degree", type=float, default=3.0, help="V p, the paper's lambda")
  parser.add_argument("--num_graphs", type=int, default=5, help="source graphs, one per seed")
  parser.add_argument("--num_runs", type=int, default=30, help="simulations of each graph")
  parser.add_argument(
    "--bound_sizes",
    type=int,
    nargs="+",
    default=[100, 300, 1000],
    help="numbers of entities for which the exact accuracy is compared with the bounds",
  )
  flags = parser.parse_args()
  began = time.monotonic()
  flags.workdir.mkdir(parents=True, exist_ok=True)
  V, degree = flags.num_entities, flags.mean_degree
  steps_S = np.unique(np.geomspace(1, 10 * V * (V - 1), 60).astype(int))
  curves = [
    _one_graph(V, degree, steps_S, seed, flags.num_runs) for seed in range(flags.num_graphs)
  ]
  found = theory.fit_exponentials(*zip(*published.POINTS, strict=True))
  result = {
    "num_entities": V,
    "mean_degree": degree,
    "reachable_limit": theory.reachable_limit(degree),
    "graphs": [curve["summary"] for curve in curves],
    "epsilons": [row for size in flags.bound_sizes for row in _epsilons(size, degree, seeds=3)],
    "fit": _compare_fits(found),
  }
  _plot(flags.workdir / "curves.png", V, degree, steps_S, curves, found)
  text = json.dumps(result, indent=2) + "\n"
  (flags.workdir / "result.json").write_text(text, encoding="utf-8")
  print(text, end="")
  print(f"{flags.workdir}: result.json and curves.png, in {time.monotonic() - began:.1f} s")


def _one_graph(
  num_entities: int, mean_degree: float, steps_S: np.ndarray, seed: int, num_runs: int
) -> dict[str, Any]:
  graph = theory.SourceGraph.random(num_entities, mean_degree / num_entities, seed)
  exact_S = theory.exact_accuracy(graph, steps_S)
  runs = [theory.simulate(graph, int(steps_S[-1]), 1000 * seed + run) for run in range(num_runs)]
  simulated_RS = np.stack([theory.accuracy_of(learned_VV, steps_S) for learned_VV in runs])
  difference_S = simulated_RS.mean(0) - exact_S
  error_S = simulated_RS.std(0, ddof=1) / num_runs**0.5
  summary = {
    "seed": seed,
    "source_accuracy": graph.source_accuracy,
    "reachable_share": graph.reachable_share,
    "largest_difference": float(np.abs(difference_S).max()),
    "largest_error_of_mean": float(error_S.max()),
    # 1 is expected: the differences are as large as their standard errors.
    "rms_difference_in_errors": float(np.sqrt((difference_S**2).mean() / (error_S**2).mean())),
    "regimes": dataclasses.asdict(theory.find_regimes(graph)),
  }
  return {"summary": summary, "exact_S": exact_S, "simulated_RS": simulated_RS}


def _epsilons(num_entities: int, mean_degree: float, seeds: int) -> list[dict[str, Any]]:
  num_pairs = num_entities * (num_entities - 1)
  steps_S = np.geomspace(1, 10 * num_pairs, 200)
  rows = []
  for seed in range(seeds):
    graph = theory.SourceGraph.random(num_entities, mean_degree / num_entities, seed)
    accuracy_S = theory.exact_accuracy(graph, steps_S)
    lower, upper = theory.smallest_epsilons(num_entities, mean_degree, steps_S, accuracy_S)
    regimes = dataclasses.asdict(theory.find_regimes(graph))
    rows.append(dict(num_entities=num_entities, seed=seed, lower=lower, upper=upper, **regimes))
  return rows


def _compare_fits(found: theory.ExponentialFit) -> dict[str, Any]:
  x, y = np.array(published.POINTS).T
  fits = {"found": found, "published": published.FIT}
  compared = {
    name: {
      **dataclasses.asdict(fit),
      "rms_error": float(np.sqrt(np.mean((fit(x) - y) ** 2))),
      "largest_error": float(np.abs(fit(x) - y).max()),
    }
    for name, fit in fits.items()
  }
  return compared | {"largest_difference": float(np.abs(found(x) - published.FIT(x)).max())}


def _plot(
  path: pathlib.Path,
  num_entities: int,
  mean_degree: float,
  steps_S: np.ndarray,
  curves: list[dict[str, Any]],
  fit: theory.ExponentialFit,
) -> None:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 4), layout="constrained")
  toy, measured = figure.subplots(1, 2)
  scaled_S = steps_S / (num_entities * (num_entities - 1))
  for curve in curves:
    first = curve is curves[0]
    toy.plot(scaled_S, curve["exact_S"], "k-", lw=0.8, label="exact, per graph" if first else None)
    mean_S = curve["simulated_RS"].mean(0)
    toy.plot(scaled_S, mean_S, "o", ms=2.5, c="C0", label="simulated, mean" if first else None)
  lower, upper = theory.bounds(num_entities, mean_degree, steps_S, epsilon=0.05)
  toy.fill_between(scaled_S, lower, upper, color="C1", alpha=0.2, label="Theorem 1, epsilon = 0.05")
  approximation = theory.branching_accuracy(num_entities, mean_degree, steps_S)
  toy.plot(scaled_S, approximation, "--", c="C3", lw=1, label="branching processes")
  limit = theory.reachable_limit(mean_degree)
  toy.axhline(limit, color="gray", lw=0.8, ls=":", label=f"C_lambda = {limit:.3f}")
  regimes = curves[0]["summary"]["regimes"]
  edges = (scaled_S[0], regimes["linear_until"], regimes["flat_from"], scaled_S[-1])
  for name, left, right in zip(("linear", "log-like", "flat"), edges, edges[1:]):
    toy.axvline(left, color="gray", lw=0.5)
    toy.text((left * right) ** 0.5, 1.01, name, ha="center", fontsize=8)
  toy.set(xscale="log", ylim=(0, 1.07), xlabel="steps / (V (V - 1))", ylabel="accuracy")
  toy.legend(fontsize=7, loc="center left")
  x, y = np.array(published.POINTS).T
  grid = np.geomspace(x.min(), x.max(), 300)
  measured.plot(x, y, "o", ms=3, label="published points")
  measured.plot(grid, published.FIT(grid), "-", c="C1", lw=3, alpha=0.4, label="published fit")
  measured.plot(grid, fit(grid), "k-", lw=0.8, label="our fit")
  measured.set(xscale="log", xlabel="millions of synthetic tokens", ylabel="QuALITY accuracy, %")
  measured.legend(fontsize=8)
  figure.savefig(path, dpi=90)


if __name__ == "__main__":
  main()
