"""lm-eval on local files: its log-likelihoods of the tasks of `evaluation.tasks.builtin`.

Each task is defined from the same files, independently of ours, in lm-eval's own terms. The shots
are the first ones of their file on both sides.
"""

import gzip
import itertools
import json
import pathlib
from typing import Any

MMLU_SUBJECT = "high_school_psychology"  # more than 100 rows


def read(path: pathlib.Path, number: int | None = None) -> list[dict[str, Any]]:
  with gzip.open(path, "rt") as lines:
    return [json.loads(line) for line in itertools.islice(lines, number)]


def _write(folder: pathlib.Path, name: str, records: list[dict[str, Any]]) -> str:
  path = folder / f"{name}.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return str(path)


def _webqs_choices(doc: dict[str, Any]) -> list[str]:
  kept: list[str] = []
  for answer in sorted(doc["answers"]):
    if not kept or not answer.startswith(kept[-1]):
      kept.append(answer)
  return kept


_ARC = dict(
  output_type="multiple_choice",
  doc_to_text="{{query}}\nAnswer:",
  doc_to_choice="{{choices}}",
  doc_to_target="{{gold}}",
)
# Ours -> lm-eval's config, our file, and the file of the shots.
_TASKS: dict[str, tuple[dict[str, Any], str, str | None]] = {
  "arc_easy": (_ARC, "arc_easy", None),
  "arc_challenge": (_ARC, "arc_challenge", None),
  "sciq": (
    dict(
      output_type="multiple_choice",
      doc_to_text="{{support.lstrip()}}\nQuestion: {{question}}\nAnswer:",
      doc_to_choice="{{distractors + [correct_answer]}}",
      doc_to_target=3,
    ),
    "sciq",
    None,
  ),
  "winogrande": (
    dict(
      output_type="multiple_choice",
      doc_to_text=lambda doc: doc["gold"],
      doc_to_choice=lambda doc: doc["context_options"],
      doc_to_target=lambda doc: doc["continuation"].strip(),
    ),
    "winogrande",
    None,
  ),
  "mmlu": (
    dict(
      output_type="multiple_choice",
      description=(
        "The following are multiple choice questions (with answers) about high school "
        "psychology.\n\n"
      ),
      doc_to_text=(
        "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
        "D. {{choices[3]}}\nAnswer:"
      ),
      doc_to_choice=["A", "B", "C", "D"],
      doc_to_target="answer",
      num_fewshot=5,
    ),
    "mmlu",
    "mmlu_dev",
  ),
  "triviaqa": (
    dict(
      output_type="generate_until",
      doc_to_text=lambda doc: doc["context"].replace("\nAnswer:", "?\nAnswer:"),
      # A shot shows the first of the targets.
      doc_to_target=lambda doc: [doc["answer"], *doc["aliases"]],
      generation_kwargs=dict(until=["\n", ".", ","], do_sample=False, max_gen_toks=24),
      num_fewshot=1,
    ),
    "triviaqa",
    "triviaqa",
  ),
  "webqs": (
    dict(
      output_type="multiple_choice",
      doc_to_text="Question: {{qText}}\nAnswer:",
      doc_to_choice=_webqs_choices,
      doc_to_target=lambda doc: list(range(len(_webqs_choices(doc)))),
      num_fewshot=1,
    ),
    "webquestions",
    "webquestions_train",
  ),
  "lambada": (
    dict(
      output_type="loglikelihood",
      doc_to_text="{{context}}",
      doc_to_target="{{' ' + continuation}}",
    ),
    "lambada",
    None,
  ),
  "openwebtext": (
    dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}"),
    "openwebtext",
    None,
  ),
}


# lm-eval 0.4.13 cannot show the answer of a shot that has several right choices.
_SHOTS = {"webqs": {"doc_to_choice": _webqs_choices, "doc_to_target": lambda doc: 0}}


def config(
  task: str, data: pathlib.Path, folder: pathlib.Path, number: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Returns lm-eval's config of a task, and the records that it evaluates."""
  made, file, shots_file = _TASKS[task]
  records = read(data / f"{file}.jsonl.gz", None if task == "mmlu" else number + 1)
  files = {}
  if shots_file is not None:
    shots = read(data / f"{shots_file}.jsonl.gz")
    if task == "mmlu":
      shots = [shot for shot in shots if shot["subject"] == MMLU_SUBJECT]
      records = [record for record in records if record["subject"] == MMLU_SUBJECT]
    if shots_file == file:
      records = records[1:]  # the first one is the shot
    files["dev"] = _write(folder, f"{task}_shots", shots[: made["num_fewshot"]])
    fewshot = {"sampler": "first_n", **_SHOTS.get(task, {})}
    made = {**made, "fewshot_split": "dev", "fewshot_config": fewshot}
  records = records[:number]
  files["test"] = _write(folder, task, records)
  return {
    "task": f"peer_{task}",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": files},
    "test_split": "test",
    **made,
  }, records


def responses(
  task: str,
  *,
  model: Any,
  data: pathlib.Path,
  folder: pathlib.Path,
  number: int,
) -> list[list[Any]]:
  """Runs lm-eval; returns for each example (log-likelihood, is_greedy) of each request, or texts.

  Args:
    model: an `lm_eval.api.model.LM`.
  """
  import lm_eval
  from lm_eval.api.task import ConfigurableTask

  made, _ = config(task, data, folder, number)
  found = lm_eval.simple_evaluate(
    model=model,
    tasks=[ConfigurableTask(config=made)],
    bootstrap_iters=0,
    log_samples=True,
    verbosity="ERROR",
  )
  samples = sorted(found["samples"][made["task"]], key=lambda sample: sample["doc_id"])
  return [[response[0] for response in sample["resps"]] for sample in samples]
