"""Sets of prompts: folders of text files, in our own words.

A set has `system.txt`, and a task for each kind of unit: `pair.txt`, `rephrase/easy.txt`. The user
message begins with the document, and the task follows it, so that all requests about one document
begin alike and a local model computes that beginning once.
"""

import hashlib
import importlib.resources
import string
from collections.abc import Mapping

from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.synthesis import units

_HASH_DIGITS = 12
_END = "\n\n----\n\n"  # of the document in a user message
_PLACEHOLDERS = {
  units.PAIR: {"first", "second"},
  units.TRIPLET: {"first", "second", "third"},
  units.APPLY: {"strategy"},
  units.FOCAL: {"question"},
}
_IN_ALL_KINDS = {"name"}


class PromptSet:
  """The prompts of all kinds of units: "default", or "small" for models below a billion parameters.

  Attributes:
    name: name of the set.
  """

  def __init__(self, name: str, system: str, tasks: Mapping[str, str]) -> None:
    """Takes the texts of a set; tasks contain `$name` and the placeholders of their kind.

    Raises:
      ValueError: a kind has no task, or a task lacks a placeholder of its kind or has another one.
    """
    self.name = name
    self._system = system.strip()
    self._tasks = {kind: string.Template(task.strip()) for kind, task in tasks.items()}
    for kind in units.KINDS:
      if kind not in self._tasks:
        raise ValueError(f"the prompts {name!r} have no task for the kind {kind!r}")
      found = set(self._tasks[kind].get_identifiers())
      needed = _PLACEHOLDERS.get(kind, set())
      if not self._tasks[kind].is_valid() or found - _IN_ALL_KINDS != needed:
        raise ValueError(
          f"the task {kind!r} of the prompts {name!r} has the placeholders {sorted(found)}; it "
          f"must have {sorted(needed)}, and may have {sorted(_IN_ALL_KINDS)}; a dollar sign is $$"
        )

  @classmethod
  def load(cls, name: str) -> "PromptSet":
    """Reads a set of this package.

    Raises:
      ValueError: there is no set of this name.
    """
    root = importlib.resources.files(__name__)
    names = sorted(p.name for p in root.iterdir() if p.joinpath("system.txt").is_file())
    if name not in names:
      raise ValueError(f"there are no prompts {name!r}; there are {', '.join(map(repr, names))}")
    folder = root.joinpath(name)
    tasks = {
      kind: folder.joinpath(*f"{kind}.txt".split("/")).read_text("utf-8") for kind in units.KINDS
    }
    return cls(name, folder.joinpath("system.txt").read_text("utf-8"), tasks)

  def hash(self, kind: str) -> str:
    """Returns a short SHA-256 of the texts that make the prompts of a kind."""
    content = "\0".join([self._system, _END, self._task(kind).template])
    return hashlib.sha256(content.encode()).hexdigest()[:_HASH_DIGITS]

  def render(
    self, kind: str, source: SourceDocument, **values: str
  ) -> tuple[list[dict[str, str]], int]:
    """Returns the messages about a document and the end of what all kinds share.

    Args:
      values: the placeholders of the kind, such as `first` and `second` of a pair.

    Returns:
      A system and a user message, and the number of characters of their contents, taken together,
      with which the messages of every unit of this document begin.
    """
    document = _presented(source)
    task = self._task(kind).substitute(values, name=source.name)
    messages = [
      {"role": "system", "content": self._system},
      {"role": "user", "content": document + task},
    ]
    return messages, len(self._system) + len(document)

  def _task(self, kind: str) -> string.Template:
    if kind not in self._tasks:
      raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(self._tasks)}")
    return self._tasks[kind]


def _presented(source: SourceDocument) -> str:
  """Returns a document with its title, author and year, as user messages begin with it."""
  lines = [
    f"Title: {source.name}",
    *([f"Author: {source.author}"] if source.author else []),
    *([f"Year: {source.year}"] if source.year else []),
  ]
  head = "\n".join(lines)
  return f"{head}\n\n{source.text.strip()}{_END}"
