"""A checkpoint as what answers questions: engine, tokenizer, and the prompts it understands."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from typing import Any

from selfimprove_jax import artifacts, partitioning
from selfimprove_jax.data.tokenizer import Tokenizer
from selfimprove_jax.sampling import length_controls, loading
from selfimprove_jax.sampling.loading import LoadedModel

_END_BYTES = 1 << 20


def file_digests(path: str) -> dict[str, dict[str, Any]]:
  """Size, and SHA-256 of the first and the last MiB, of a checkpoint's files."""
  root = pathlib.Path(path)
  files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file())
  found = {}
  for file in files:
    size = file.stat().st_size
    with file.open("rb") as opened:
      digest = hashlib.sha256(opened.read(_END_BYTES))
      opened.seek(max(opened.tell(), size - _END_BYTES))
      digest.update(opened.read())
    name = file.name if file == root else file.relative_to(root).as_posix()
    found[name] = {"bytes": size, "sha256_of_ends": digest.hexdigest()}
  return found


@dataclasses.dataclass(frozen=True)
class QuestionModel:
  """A loaded checkpoint, and how texts of ours become its token ids."""

  loaded: LoadedModel

  @property
  def tokenizer(self) -> Tokenizer:
    return self.loaded.files.tokenizer

  def encode_markup(self, text: str) -> list[int]:
    """Ids of a text of ours, in which special tokens are recognized."""
    backend = self.tokenizer.backend
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
    ids: list[int] = []
    for piece in re.split(f"({names})", text):
      ids += [backend.token_to_id(piece)] if piece in special else self.tokenizer.encode(piece)
    return ids


def load_model(
  checkpoint: artifacts.Artifact,
  *,
  mesh: dict[str, int],
  compute: dict[str, Any],
  engine: dict[str, Any],
  chat: bool,
) -> QuestionModel:
  """The model that the stage `checkpoint` recorded.

  The stages of one process share one: its weights are loaded and its steps compiled once.

  Args:
    compute: fields of `LlamaConfig` that say how to compute.
    engine: `num_slots` and `max_length` of the engine.
    chat: whether it is asked by its chat template.

  Raises:
    artifacts.ArtifactError: its files are not those that were recorded.
    ValueError: the window is longer than the model's context, or there is no chat template.
  """
  summary = checkpoint.summary
  path = summary["path"]
  if artifacts.digest(file_digests(path)) != summary["files_digest"]:
    raise artifacts.ArtifactError(
      f"the files of the checkpoint {path} are not those that {checkpoint.folder} recorded; put "
      f"them back, or begin in another workdir"
    )
  if engine["max_length"] > summary["max_positions"]:
    raise ValueError(
      f"engine.max_length={engine['max_length']} is more than the {summary['max_positions']} "
      f"positions that the model at {path} was made for"
    )
  settings = json.dumps([mesh, compute, engine], sort_keys=True)
  loaded = _load(path, summary["files_digest"], settings)
  if chat and loaded.chat is None:
    raise ValueError(f"the model at {path} has no chat template; set prompt.chat=False")
  return QuestionModel(loaded)


@functools.lru_cache(maxsize=1)
def _load(path: str, files_digest: str, settings: str) -> LoadedModel:
  del files_digest  # other files, another model
  mesh, compute, engine = json.loads(settings)
  on = partitioning.make_mesh(**mesh)
  return loading.load_model(path, on, changes=compute, chat_template=None, **engine)


def encode_prompt(
  model: QuestionModel,
  question: str,
  condition: dict[str, Any] | None,
  *,
  chat: bool,
  system: str,
  text: str,
) -> tuple[int, ...]:
  """A question as token ids, up to where the model begins to speak.

  Args:
    condition: `kind` and `amount` of a length that is asked for, or None.
    chat: by the checkpoint's chat template; else the text as it stands.
    system: the system message of a chat; empty for none.
    text: holds "{question}", in the place of which the question is put.
  """
  words = text.replace("{question}", question)
  if condition is not None:
    words += "\n\n" + length_controls.instruction(**condition)
  if not chat:
    return (*model.loaded.files.prefix_ids, *model.tokenizer.encode(words))
  messages = [{"role": "system", "content": system}] if system else []
  return tuple(model.loaded.chat.render([*messages, {"role": "user", "content": words}]))
