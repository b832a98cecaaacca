"""tools/compare_evaluations.py on two evaluations of tiny models, and on runs that differ."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from selfimprove_jax.evaluation import statistics
from selfimprove_jax.evaluation.tasks import metrics
from selfimprove_jax.runs import artifacts
from selfimprove_jax.runs.stage import Run

TOOL = pathlib.Path(__file__).parents[3] / "tools" / "compare_evaluations.py"


def compare(*arguments):
  return subprocess.run(
    [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, check=False
  )


@pytest.fixture(scope="module")
def other(config, checkpoint, run, data_dir, tmp_path_factory) -> pathlib.Path:
  """The evaluation of a model with other weights on three of the tasks."""
  folder = tmp_path_factory.mktemp("other")
  shutil.copytree(checkpoint, folder / "model")
  (file,) = (folder / "model").glob("*.safetensors")
  rng, weights = np.random.default_rng(0), safetensors.numpy.load_file(file)
  changed = {
    n: (3 * w.std() * rng.normal(size=w.shape) + w).astype(w.dtype) for n, w in weights.items()
  }
  safetensors.numpy.save_file(changed, file, metadata={"format": "pt"})
  tasks = f"arc_easy,openwebtext,{data_dir}/mine.yaml"
  run(dataclasses.replace(config, checkpoint=str(folder / "model"), tasks=tasks), folder / "run")
  return folder / "run"


def _records(folder, task):
  return list(Run(folder, None).artifact(f"scores/{task}").records())


def _cells(output):
  """Returns task/metric -> header -> cell."""
  header, *lines = (re.split(r"\s{2,}", line.strip()) for line in output.splitlines())
  return {line[0]: dict(zip(header, line)) for line in lines if len(line) == len(header)}


def test_metrics_are_compared_by_example(finished, other):
  found = compare(finished, other)
  assert found.returncode == 0, found.stderr
  cells = _cells(found.stdout)
  assert list(cells) == [
    *("arc_easy/acc", "arc_easy/acc_norm", "arc_easy/acc_bytes", "mine/acc"),
    *("openwebtext/ppl_token", "openwebtext/bits_per_byte"),
  ]
  assert f"only in {finished}: gsm8k, triviaqa" in found.stdout
  changes = []
  for task in ("arc_easy", "mine"):
    pairs = list(zip(_records(finished, task), _records(other, task), strict=True))
    right = np.array([[r["prediction"] in r["gold"] for r in pair] for pair in pairs], float)
    acc, change = cells[f"{task}/acc"], right[:, 1] - right[:, 0]
    shown = [int(acc[name]) for name in ("won", "lost", "tied")]
    assert shown == [(change > 0).sum(), (change < 0).sum(), (change == 0).sum()]
    assert acc["difference"] == f"{100 * change.mean():+.1f}%".replace("-", "\N{MINUS SIGN}")
    # A t interval: the questions are groups of their own.
    low, high = statistics.interval95(change.mean(), change.std(ddof=1) / len(pairs) ** 0.5, 6)
    ends = (f"{100 * x:+.1f}%".replace("-", "\N{MINUS SIGN}") for x in (low, high))
    assert acc["95% interval"] == " to ".join(ends)
    changes += [*change]
  assert np.any(changes)  # else nothing is tested


def test_perplexities_are_compared_by_nats_and_by_their_ratio(finished, other):
  cells = _cells(compare("--tasks", "openwebtext", finished, other).stdout)
  assert list(cells) == ["openwebtext/ppl_token", "openwebtext/bits_per_byte"]
  nats, counts = np.array(
    [
      [[-r["logprobs"][0], r["num_tokens"][0]] for r in _records(folder, "openwebtext")]
      for folder in (finished, other)
    ]
  ).transpose(2, 0, 1)
  change = (nats[1] - nats[0]).sum() / counts[0].sum()
  found = cells["openwebtext/ppl_token"]
  shown = found["difference"].replace("\N{MINUS SIGN}", "-")
  assert shown == f"{change:+.3f} nats"
  assert float(found["ratio"]) == pytest.approx(np.exp(change), rel=1e-3)
  assert int(found["won"]) == (nats[1] < nats[0]).sum()


def test_a_run_compared_with_itself_ties_everywhere(finished):
  for cells in _cells(compare("--tasks", "arc_easy,mine", finished, finished).stdout).values():
    assert (cells["won"], cells["lost"], cells["tied"]) == ("0", "0", "7")
    assert cells["difference"] == "+0.0%"


def test_errors_are_clustered_by_group_and_a_macro_mean_weighs_groups_alike():
  def records(right):
    return [
      {"id": str(i), "group": g, "logprobs": [0.0, float(r)], "choices": ["a", "b"], "gold": [1]}
      for i, (g, r) in enumerate(zip("aaab", right, strict=True))
    ]

  first, second = records([-1, -1, -1, 1]), records([1, 1, 1, 1])
  micro = metrics.compare("acc_micro", [first], [second])
  macro = metrics.compare("acc_macro", [first], [second])
  assert (micro.won, micro.lost, micro.tied) == (3, 0, 1)
  assert (micro.difference.value, macro.difference.value) == (0.75, 0.5)
  assert micro.difference.num_groups == 2
  assert macro.difference.stderr == pytest.approx(0.5)  # of the group means 1 and 0


def _doctored(finished, folder, *, config=None, edit=lambda records: records):
  """A copy of a run whose examples of arc_easy, or their config, were made differently."""
  shutil.copytree(finished, folder)
  artifact = artifacts.open_artifact(folder / "examples" / "arc_easy")
  records = edit(list(artifact.records()))
  made = json.loads((artifact.folder / "config.json").read_text())
  shutil.rmtree(artifact.folder)
  writer = artifacts.Writer(
    artifact.folder, config=made["config"] | (config or {}), inputs=made["inputs"]
  )
  writer.write_jsonl("examples.jsonl", records)
  writer.finish(artifact.summary)
  return folder


def _with_another_prompt(records):
  context = records[3]["item"]["contexts"][0]
  records[3]["item"]["contexts"] = [context.replace("Question:", "Q:")]
  return records


def _with_another_gold(records):
  records[2]["item"]["gold"] = [1 - records[2]["item"]["gold"][0]]
  return records


@pytest.mark.parametrize(
  ("changes", "told"),
  [
    ({"config": {"version": 2}}, "the task has version 1 in the first run and 2 in the second"),
    ({"edit": _with_another_prompt}, "the prompts of arc_easy:4 differ: .*Question: .* and .*Q: "),
    ({"edit": _with_another_gold}, r"the rows \(gold\) of arc_easy:3 differ: '\[0\]' and '\[1\]'"),
    (
      {"edit": lambda records: records[:5]},
      "the rows differ: 7 in the first run and 5 in the second; only the first has arc_easy:6",
    ),
    ({"edit": lambda records: records[::-1]}, "the rows are the same, in another order"),
  ],
)
def test_runs_of_other_versions_prompts_or_rows_are_refused(changes, told, finished, tmp_path):
  found = compare(finished, _doctored(finished, tmp_path / "doctored", **changes))
  assert (found.returncode, found.stdout) == (1, "")
  assert re.search(f"the runs cannot be compared:\n  arc_easy: {told}", found.stderr)


def test_another_tokenizer_leaves_out_the_perplexity_per_token():
  first, second = (
    [{"id": "t:1", "group": "g", "logprobs": [-9.0], "num_tokens": [n], "num_bytes": 40}]
    for n in (7, 9)
  )
  with pytest.raises(ValueError, match=r"t:1 has 7 tokens in one run and 9 in the other"):
    metrics.compare("ppl_token", [first], [second])
  assert metrics.compare("bits_per_byte", [first], [second]).tied == 1


def test_a_folder_without_an_evaluation_a_missing_task_and_an_unfinished_one_are_named(
  finished, other, tmp_path
):
  found = compare(finished, tmp_path)
  assert found.returncode == 2 and f"{tmp_path} holds no evaluation" in found.stderr
  found = compare("--tasks", "gsm8k", finished, other)
  assert found.returncode == 2 and "has no task 'gsm8k'; it has arc_easy, mine" in found.stderr
  shutil.copytree(finished, tmp_path / "run")
  (tmp_path / "run" / "metrics" / "mine" / "manifest.json").unlink()
  found = compare(finished, tmp_path / "run")
  assert found.returncode == 1 and "metrics/mine is unfinished" in found.stderr
