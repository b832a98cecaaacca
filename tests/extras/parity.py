"""Checks the extra `parity`: our scores are those of lm-eval, if real benchmarks are at hand."""

import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.evaluation import parity, tiny_model


def main() -> None:
  data = os.environ.get("SELFIMPROVE_DATA")
  if not data:
    print("parity: SELFIMPROVE_DATA names no folder, so nothing was compared")
    return
  with tempfile.TemporaryDirectory() as folder:
    model = tiny_model.save(pathlib.Path(folder), adds_bos=True, max_positions=1024)
    models = parity.open_models(model)
    for task in ("sciq", "mmlu", "triviaqa", "openwebtext"):
      found = parity.compare(task, *models, pathlib.Path(data) / "evals", 10)
      assert found.holds, found
  print("parity: log-likelihoods, texts and perplexities are those of lm-eval")


if __name__ == "__main__":
  main()
