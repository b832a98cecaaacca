"""A look into a run: real documents beside their syntheses, pairs beside their similarity."""

import textwrap

from selfimprove_jax import artifacts, storage
from selfimprove_jax.pipelines import runner, sbp_report

_WIDTH = 96


def show(run_folder: storage.Path, *, limit: int = 3) -> None:
  """Prints some of what the run has made so far.

  Raises:
    ValueError: the folder holds no run.
    artifacts.ArtifactError: nothing to show is complete yet.
  """
  if not (run_folder / runner.CONFIG).exists():
    raise ValueError(f"{run_folder} holds no run: it has no {runner.CONFIG}")
  shown = 0
  if _complete(run_folder / "pairs"):
    tokens = artifacts.open_artifact(run_folder / "tokens")
    pairs = artifacts.open_artifact(run_folder / "pairs")
    for pair in sbp_report.pair_examples(tokens, pairs, limit):
      _block(f"pair, similarity {pair['similarity']:.3f}", "")
      _block(f"d1  {pair['d1']}", pair["d1_text"])
      _block(f"d2  {pair['d2']}", pair["d2_text"])
      shown += 1
  synthetic = run_folder / "synthetic"
  for folder in sorted(synthetic.iterdir()) if synthetic.exists() else []:
    if not _complete(folder):
      continue
    for record in sbp_report.synthetic_examples(artifacts.open_artifact(folder), limit):
      _block(f"{folder.name}", "")
      if record["seed_text"]:
        _block(f"seed  {record['seed_id']}", record["seed_text"])
      _block(f"synthesis  ({record['finish_reason']})", record["text"])
      shown += 1
  if not shown:
    raise artifacts.ArtifactError(f"{run_folder} has neither pairs nor synthetic documents yet")


def _complete(folder):
  try:
    artifacts.open_artifact(folder)
  except artifacts.ArtifactError:
    return False
  return True


def _block(title, text):
  print(f"--- {title}")
  for line in text.splitlines():
    print(textwrap.fill(line, _WIDTH, initial_indent="    ", subsequent_indent="    "))
