"""Compares our scores with lm-eval's, on the same weights and the same examples.

  python -m tests.evaluation.parity --data=FOLDER --rows=100 --checkpoint=SmolLM2-135M

Needs the extra `parity`. Prints the table of benchmarks/evaluation.md; --checkpoint=tiny is a tiny
Llama with random weights, whose tokenizer begins a text with BOS.
"""

import argparse
import dataclasses
import itertools
import math
import pathlib
import tempfile
import time
from typing import Any

from jax.sharding import Mesh

from selfimprove_jax.evaluation import scoring
from selfimprove_jax.evaluation.tasks import builtin, metrics
from selfimprove_jax.language_models import local
from selfimprove_jax.language_models.local import ComputeConfig
from tests.evaluation import lm_eval_peer, tiny_model

TASKS = (
  *("arc_challenge", "arc_easy", "sciq", "winogrande", "mmlu", "triviaqa", "webqs", "lambada"),
  "openwebtext",
)
_WINDOW = 1024


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How far our scores of one task are from lm-eval's.

  Attributes:
    nats: largest difference of two log-likelihoods; of a document's, per token. 0 for texts.
    predictions: share of examples with the same prediction, or the same text.
    greedy: share of requests with the same greedy flag.
    perplexity: relative difference of the perplexities, where the task has one.
    seconds: of us and of lm-eval, with compilation.
  """

  task: str
  rows: int
  nats: float
  predictions: float
  greedy: float
  perplexity: float
  seconds: tuple[float, float]

  @property
  def holds(self) -> bool:
    return (
      self.nats <= 2e-3 and min(self.predictions, self.greedy) >= 0.995 and self.perplexity <= 1e-3
    )


def open_models(folder: pathlib.Path, mesh: Mesh | None = None) -> tuple[Any, Any]:
  """Returns the model of a Hugging Face folder: ours, and lm-eval's."""
  from lm_eval.models.huggingface import HFLM

  config = ComputeConfig(dtype="float32")
  ours = local.load(folder, mesh, max_length=_WINDOW, compute=config)
  # Its window is what the model reads, without the last token that is predicted; ours is with it.
  options = {"dtype": "float32", "device": "cpu", "batch_size": 16, "max_length": _WINDOW - 1}
  theirs = HFLM(pretrained=str(folder), **options)
  return ours, theirs


def compare(task: str, ours: Any, theirs: Any, data: pathlib.Path, rows: int) -> Agreement:
  """Scores the first rows of a task with both."""
  if task == "openwebtext":
    # lm-eval 0.4.13 puts its prefix token before a BOS that the tokenizer has added, and scores
    # that BOS as a token of the document; this setting leaves one.
    theirs.add_bos_token = False
  began = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    found = lm_eval_peer.responses(
      task, model=theirs, data=data, folder=pathlib.Path(folder), number=rows
    )
  peer_seconds = time.monotonic() - began
  theirs.add_bos_token = None
  definition = builtin.get(task)
  shots = lm_eval_peer.read(data / definition.shots_file) if definition.shots_file else []
  lines = lm_eval_peer.read(data / definition.file)
  made = definition.examples(lines, shots)
  if definition.shots_file == definition.file:
    next(made)  # the peer takes it as the shot
  if task == "mmlu":
    made = (example for example in made if example.group == lm_eval_peer.MMLU_SUBJECT)
  examples = list(itertools.islice(made, rows))
  assert len(examples) == len(found), (len(examples), len(found))
  began = time.monotonic()
  records = list(scoring.run(ours, examples))
  seconds = time.monotonic() - began, peer_seconds
  if "generation" in records[0]:
    same = [r["generation"].strip() == f[0].strip() for r, f in zip(records, found, strict=True)]
    return Agreement(task, len(records), 0.0, _share(same), 1.0, 0.0, seconds)
  return _compared(task, records, found, seconds)


def _compared(
  task: str, records: list[dict[str, Any]], found: list[list[Any]], seconds: tuple[float, float]
) -> Agreement:
  nats, predictions, greedy, others = [], [], [], []
  for record, responses in zip(records, found, strict=True):
    if "choices" not in record:
      responses = [(responses[0], None)]
    logprobs = [float(logprob) for logprob, _ in responses]
    size = record["num_tokens"][0] if "choices" not in record else 1
    nats += [abs(a - b) / size for a, b in zip(record["logprobs"], logprobs, strict=True)]
    others.append({**record, "logprobs": logprobs})
    if "choices" in record:
      predictions.append(metrics.predicted(record) == metrics.predicted(others[-1]))
      flags = zip(record["greedy"], (flag for _, flag in responses), strict=True)
      greedy += [a == bool(b) for a, b in flags]
  perplexity = 0.0
  for name in builtin.get(task).metrics:
    if name.startswith("ppl"):
      own, other = (metrics.estimate(name, some).value for some in (records, others))
      perplexity = max(perplexity, abs(math.log(own / other)))
  return Agreement(
    task, len(records), max(nats), _share(predictions), _share(greedy), perplexity, seconds
  )


def _share(flags: list[bool]) -> float:
  return sum(flags) / len(flags) if flags else 1.0


def row(found: Agreement) -> str:
  """Returns a row of the table in benchmarks/evaluation.md."""
  return (
    f"| {found.task} | {found.rows} | {found.nats:.1e} | {found.predictions:.1%} | "
    f"{found.greedy:.1%} | {found.perplexity:.1e} | {found.seconds[0]:.0f} / "
    f"{found.seconds[1]:.0f} | {'yes' if found.holds else 'no'} |"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--data", type=pathlib.Path, required=True)
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--rows", type=int, default=100)
  parser.add_argument("--tasks", default=",".join(TASKS))
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(arguments.checkpoint)
    if arguments.checkpoint == "tiny":
      folder = tiny_model.save(pathlib.Path(temporary), adds_bos=True, max_positions=_WINDOW)
    ours, theirs = open_models(folder)
    print(
      "| task | rows | nats apart, at most | predictions equal | greedy flags equal | "
      "perplexity apart | seconds, ours / lm-eval | within the limits |"
    )
    print("| --- |" + " --- |" * 7)
    for task in arguments.tasks.split(","):
      print(row(compare(task, ours, theirs, arguments.data, arguments.rows)), flush=True)


if __name__ == "__main__":
  main()
