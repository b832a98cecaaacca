"""`show` prints what is complete of a run, and says so when nothing is."""

import shutil

import pytest

from selfimprove_jax import artifacts
from selfimprove_jax.pipelines import show


def test_pairs_stand_beside_their_similarity_and_syntheses_beside_their_seeds(smoke, capsys):
  show.show(smoke.folder, limit=2)
  lines = capsys.readouterr().out.splitlines()
  titles = [line for line in lines if line.startswith("---")]
  assert sum(title.startswith("--- pair, similarity 0.") for title in titles) == 2
  assert sum(title.startswith("--- d2  numpy/") for title in titles) == 2
  assert titles.count("--- sbp") == titles.count("--- unconditional") == 2
  assert sum(title.startswith("--- seed  numpy/") for title in titles) == 2  # of SBP alone
  assert all(len(line) <= 120 for line in lines)


def test_a_run_under_way_shows_what_there_is(smoke, tmp_path, capsys):
  shutil.copy(smoke.folder / "config.json", tmp_path)
  with pytest.raises(artifacts.ArtifactError, match="neither pairs nor synthetic documents yet"):
    show.show(tmp_path)
  for name in ("tokens", "pairs"):
    shutil.copytree(smoke.folder / name, tmp_path / name)
  show.show(tmp_path, limit=1)
  out = capsys.readouterr().out
  assert "--- pair, similarity" in out
  assert "--- synthesis" not in out


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(ValueError, match="holds no run: it has no config"):
    show.show(tmp_path)
