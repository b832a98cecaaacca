"""Where the benchmarks are on the Hugging Face hub, as lm-eval 0.4.13 names them."""

import pathlib
from collections.abc import Iterator
from typing import Any

from selfimprove_jax.evaluation.tasks.task import Hub, Row

_SAVED = ("state.json", "dataset_dict.json")  # files of `save_to_disk`


def read(hub: Hub, split: str, *, folder: str) -> Iterator[Row]:
  """Yields the records of a split, in the shape of the task's file.

  Args:
    folder: holds data sets that `save_to_disk` wrote, as PATH or PATH/NAME; one that is not there
      is read from the hub.

  Raises:
    ValueError: the extra `hub` is missing, or the data set cannot be read.
  """
  try:
    import datasets
  except ImportError as error:
    raise ValueError(
      "hub=True needs the package `datasets`: pip install 'selfimprove_jax[hub]'"
    ) from error
  saved = pathlib.Path(folder, hub.path, hub.name or "")
  where = f"{hub.path} {hub.name or ''}".strip()
  try:
    if any((saved / file).is_file() for file in _SAVED):
      records = datasets.load_from_disk(str(saved))[split]
    else:
      records = datasets.load_dataset(hub.path, hub.name, split=split, streaming=True)
    for record in records:
      yield hub.convert(record)
  except Exception as error:  # the library has its own for networks, files, formats and versions
    raise ValueError(f"{where}, split {split}: {type(error).__name__}: {error}") from error


def _arc(record: Row) -> Row:
  return {
    "query": f"Question: {record['question']}",
    "choices": list(record["choices"]["text"]),
    "gold": list(record["choices"]["label"]).index(record["answerKey"]),
  }


def _sciq(record: Row) -> Row:
  distractors = [record[f"distractor{number}"] for number in (1, 2, 3)]
  kept = {name: record[name] for name in ("question", "correct_answer", "support")}
  return {**kept, "distractors": distractors}


def _winogrande(record: Row) -> Row:
  before, _, after = record["sentence"].partition("_")
  return {
    "context_options": [before + record["option1"], before + record["option2"]],
    "continuation": after.strip(),
    "gold": int(record["answer"]) - 1,
  }


def _mmlu(record: Row) -> Row:
  return {**record, "answer": "ABCD"[record["answer"]]}


def _triviaqa(record: Row) -> Row:
  found = record["answer"]
  context = f"Question: {record['question']}\nAnswer:"
  return {"context": context, "answer": found["value"], "aliases": list(found["aliases"])}


def _webqs(record: Row) -> Row:
  return {"qText": record["question"], "answers": list(record["answers"])}


def _lambada(record: Row) -> Row:
  context, _, word = record["text"].rpartition(" ")
  return {"context": context, "continuation": word}


def _same(record: Row) -> Row:
  return record


def _hub(path: str, name: str | None, split: str, convert: Any, shots: str | None = None) -> Hub:
  return Hub(path=path, name=name, split=split, shots_split=shots, convert=convert)


ARC_CHALLENGE = _hub("allenai/ai2_arc", "ARC-Challenge", "test", _arc)
ARC_EASY = _hub("allenai/ai2_arc", "ARC-Easy", "test", _arc)
SCIQ = _hub("allenai/sciq", None, "test", _sciq)
WINOGRANDE = _hub("allenai/winogrande", "winogrande_xl", "validation", _winogrande)
MMLU = _hub("cais/mmlu", "all", "test", _mmlu, "dev")
TRIVIAQA = _hub("mandarjoshi/trivia_qa", "rc.nocontext", "validation", _triviaqa, "train")
WEBQS = _hub("stanfordnlp/web_questions", None, "test", _webqs, "train")
LAMBADA = _hub("EleutherAI/lambada_openai", "default", "test", _lambada)
OPENWEBTEXT = _hub("EleutherAI/pile", "pile_openwebtext2", "train", _same)
GSM8K = _hub("openai/gsm8k", "main", "test", _same, "train")
MATH500 = _hub("HuggingFaceH4/MATH-500", "default", "test", _same, "test")
