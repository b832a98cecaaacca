"""The toy model of EntiGraph against cases counted by hand, its bounds, and the published fit."""

import itertools
import json
import sys

import numpy as np
import pytest

from experiments.entigraph_theory import published, run, theory


def _graph(num_entities, *edges):
  edges_VV = np.zeros((num_entities, num_entities), bool)
  edges_VV[tuple(zip(*edges, strict=True))] = True
  return theory.SourceGraph(edges_VV)


# 0 -> 1 -> 2: the pair (0, 2) is the only one to learn, by one of six draws.
CHAIN = _graph(3, (0, 1), (1, 2))
# Two shortest paths from 0 to 3; the search keeps the one through 1.
DIAMOND = _graph(5, (0, 2), (0, 1), (1, 3), (2, 3), (3, 4))


def _expected_by_enumeration(graph, num_steps):
  """Averages over all sequences of draws; searches for each draw by trying paths by length."""
  num_entities = len(graph.edges_VV)
  pairs = list(itertools.permutations(range(num_entities), 2))

  def first_path(x, y):
    for length in range(num_entities - 1):
      for between in itertools.permutations(set(range(num_entities)) - {x, y}, length):
        path = (x, *between, y)
        if all(graph.edges_VV[a, b] for a, b in itertools.pairwise(path)):
          return path
    return (x,)

  added = [{(x, z) for z in first_path(x, y)[1:]} for x, y in pairs]
  source = set(zip(*np.nonzero(graph.edges_VV), strict=True))
  known = [
    len(source.union(*(added[i] for i in drawn)))
    for drawn in itertools.product(range(len(pairs)), repeat=num_steps)
  ]
  return np.mean(known) / len(pairs)


def test_a_chain_is_learned_as_counted_by_hand():
  np.testing.assert_allclose(
    theory.exact_accuracy(CHAIN, [0, 1, 2]), [2 / 6, (2 + 1 / 6) / 6, (2 + 11 / 36) / 6]
  )


def test_a_pair_is_covered_by_itself_and_by_its_descendants():
  np.testing.assert_array_equal(DIAMOND.covering[0], [0, 3, 1, 2, 1])
  np.testing.assert_array_equal(DIAMOND.parents[0], [-1, 0, 0, 1, 3])
  np.testing.assert_array_equal(DIAMOND.covering[4], 0)


@pytest.mark.parametrize("graph", [CHAIN, DIAMOND, theory.SourceGraph.random(4, 0.4, seed=3)])
def test_the_formula_is_the_mean_over_all_sequences_of_draws(graph):
  for num_steps in range(3):
    [exact] = theory.exact_accuracy(graph, [num_steps])
    assert exact == pytest.approx(_expected_by_enumeration(graph, num_steps), abs=1e-12)


def test_a_run_learns_the_path_of_its_draw_at_its_step():
  learned_VV = theory.simulate(CHAIN, num_steps=400, seed=0)
  draws = np.random.default_rng(0).integers(6, size=400)
  assert learned_VV[0, 2] == 1 + draws.tolist().index(1)  # pairs are (0, 1), (0, 2), (1, 0), ...
  assert learned_VV[0, 1] == learned_VV[1, 2] == 0
  assert (learned_VV == theory.NEVER).sum() == 6
  at = int(learned_VV[0, 2])
  np.testing.assert_allclose(theory.accuracy_of(learned_VV, [at - 1, at]), [2 / 6, 3 / 6])


def test_simulations_have_the_exact_mean_within_their_error():
  graph = theory.SourceGraph.random(60, 3 / 60, seed=1)
  steps_S = np.geomspace(0.05, 2, 12).astype(float) * graph.num_pairs
  runs = [theory.simulate(graph, int(steps_S[-1]), seed) for seed in range(40)]
  accuracy_RS = np.stack([theory.accuracy_of(learned_VV, steps_S) for learned_VV in runs])
  error_S = accuracy_RS.std(0, ddof=1) / 40**0.5
  difference_S = accuracy_RS.mean(0) - theory.exact_accuracy(graph, np.floor(steps_S))
  assert (error_S < 0.004).all()
  assert (np.abs(difference_S) < 3.5 * error_S).all()


def test_accuracy_grows_to_what_paths_reach_and_is_concave():
  graph = theory.SourceGraph.random(60, 3 / 60, seed=1)
  accuracy_S = theory.exact_accuracy(graph, np.arange(0, 400_000, 1000))
  assert accuracy_S[0] == graph.source_accuracy
  assert accuracy_S[-1] == pytest.approx(graph.reachable_share)
  assert (np.diff(accuracy_S) > -1e-12).all() and (np.diff(accuracy_S, n=2) < 1e-12).all()


def test_the_limit_solves_the_equation_of_extinction():
  rho = theory.extinction_probability(3.0)
  assert rho == pytest.approx(np.exp(3 * (rho - 1))) and 0 < rho < 0.1
  assert theory.reachable_limit(3.0) == pytest.approx(0.8845, abs=5e-5)
  assert theory.extinction_probability(0.7) == 1
  shares = [theory.SourceGraph.random(300, 0.01, seed).reachable_share for seed in range(4)]
  assert np.mean(shares) == pytest.approx(theory.reachable_limit(3.0), abs=0.03)


def test_both_bounds_hold_with_an_epsilon_that_falls_with_size():
  steps_S = np.geomspace(1, 10 * 400**2, 60)
  needed = []
  for num_entities in (50, 400):
    found = []
    for seed in range(3):
      graph = theory.SourceGraph.random(num_entities, 3 / num_entities, seed)
      accuracy_S = theory.exact_accuracy(graph, steps_S)
      epsilon = max(theory.smallest_epsilons(num_entities, 3.0, steps_S, accuracy_S))
      lower, upper = theory.bounds(num_entities, 3.0, steps_S, epsilon + 1e-9)
      assert (lower <= accuracy_S).all() and (accuracy_S <= upper).all()
      found.append(epsilon)
    needed.append(np.mean(found))
  assert needed[1] < needed[0] / 2 and needed[1] < 0.05


def test_a_smaller_epsilon_than_the_smallest_breaks_a_bound():
  steps_S = np.geomspace(1, 1e5, 60)
  accuracy_S = np.linspace(0.02, 0.99, 60)
  below, above = theory.smallest_epsilons(100, 3.0, steps_S, accuracy_S)
  assert below > 0 and above > 0
  assert not (theory.bounds(100, 3.0, steps_S, below - 1e-6)[0] <= accuracy_S).all()
  assert not (accuracy_S <= theory.bounds(100, 3.0, steps_S, above - 1e-6)[1]).all()


def test_bounds_need_a_mean_degree_above_1():
  with pytest.raises(ValueError, match=r"mean_degree=1\.0 must be above 1"):
    theory.bounds(100, 1.0, [1], 0.1)


def test_the_branching_approximation_is_near_the_exact_accuracy_of_a_large_graph():
  graph = theory.SourceGraph.random(500, 3 / 500, seed=0)
  steps_S = np.geomspace(0.01, 1, 9) * graph.num_pairs
  approximate_S = theory.branching_accuracy(500, 3.0, steps_S)
  np.testing.assert_allclose(approximate_S, theory.exact_accuracy(graph, steps_S), atol=0.06)


def test_the_regimes_are_in_order():
  regimes = theory.find_regimes(theory.SourceGraph.random(100, 0.03, seed=0))
  assert 0.01 < regimes.linear_until < 0.05 < 1 < regimes.flat_from < 3
  assert regimes.log_r2 > 0.95


def test_the_fit_finds_the_published_coefficients_from_the_published_points():
  found = theory.fit_exponentials(*zip(*published.POINTS, strict=True))
  assert found.a == pytest.approx(published.FIT.a, abs=1e-3)
  np.testing.assert_allclose(found.b, published.FIT.b, atol=1e-3)
  np.testing.assert_allclose(found.r, published.FIT.r, atol=1e-4)
  x, y = np.array(published.POINTS).T
  assert np.abs(found(x) - y).max() < 0.7
  assert published.FIT([0.182, 22.75, 450.45]) == pytest.approx([40.09, 50.35, 56.12], abs=0.005)


def test_the_program_writes_its_numbers_and_a_plot(tmp_path, monkeypatch, capsys):
  flags = ["--num_entities=20", "--num_graphs=1", "--num_runs=3", "--bound_sizes", "20"]
  monkeypatch.setattr(sys, "argv", ["run", f"--workdir={tmp_path / 'out'}", *flags])
  run.main()
  result = json.loads((tmp_path / "out/result.json").read_text())
  assert [row["num_entities"] for row in result["epsilons"]] == [20, 20, 20]
  assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")
  assert "result.json and curves.png" in capsys.readouterr().out
