"""Checks the extra `hub` in an environment that has nothing else, with a data set on disk."""

import importlib.util
import json
import pathlib
import tempfile

import datasets

from selfimprove_jax.data import corpora
from selfimprove_jax.evaluation.tasks import hub


def main() -> None:
  assert importlib.util.find_spec("torch") is None, "torch is installed: not a clean check"
  texts = [f"Document number {number}." for number in range(3)]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = corpora.HuggingFaceConfig(name=folder, split="train")
    found = [document.text for document in corpora.read_documents(source)]
    saved = str(pathlib.Path(folder) / "saved")
    records = datasets.Dataset.from_dict({"text": texts})
    datasets.DatasetDict(train=records, dev=records.select([2])).save_to_disk(saved)
    source = corpora.HuggingFaceConfig(name=saved, split="dev")
    [document] = corpora.read_documents(source)
    question = {"question": "Why?", "subject": "art", "choices": list("wxyz"), "answer": 2}
    mmlu = datasets.DatasetDict(test=datasets.Dataset.from_list([question]))
    mmlu.save_to_disk(str(pathlib.Path(folder) / "cais/mmlu/all"))
    [record] = hub.read(hub.MMLU, "test", folder=folder)
  assert found == texts, found
  assert document == corpora.Document("saved:dev:0", "saved:dev:0", texts[2])
  assert record == question | {"answer": "C"}, record
  print("hub: data sets of files, and of `save_to_disk`, were read; one as records of a task")


if __name__ == "__main__":
  main()
