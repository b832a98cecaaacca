"""Checks the extra `hub` in an environment that has nothing else, with a data set on disk."""

import importlib.util
import json
import pathlib
import tempfile

from selfimprove_jax.data import corpora


def main() -> None:
  assert importlib.util.find_spec("torch") is None, "torch is installed: not a clean check"
  texts = [f"Document number {number}." for number in range(3)]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = corpora.HuggingFaceConfig(name=folder, split="train")
    found = [document.text for document in corpora.read_documents(source)]
  assert found == texts, found
  print("hub: a data set was read")


if __name__ == "__main__":
  main()
