"""Reads and copies the tokenizer of a checkpoint in Hugging Face's files."""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import tokenizers

from selfimprove_jax.models.checkpoints.hf_config import CONFIG_FILE, read_json

GENERATION_FILE = "generation_config.json"

_MODEL_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
_FILES = (
  *(*_MODEL_FILES, "merges.txt", "added_tokens.json"),
  *(_SPECIAL_TOKENS_MAP, _TOKENIZER_CONFIG, TEMPLATE_FILE),
)
_SPECIAL = (
  *("bos_token", "eos_token", "sep_token", "pad_token"),
  *("unk_token", "cls_token", "mask_token"),
)

_MAX_ID = 1 << 32


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
  """A checkpoint's tokenizer, special tokens and chat template.

  Attributes:
    backend: a new object, which the caller may change.
    special_tokens: those that the checkpoint defines, by Hugging Face's names (`bos_token`, ...).
    chat_template: Jinja source, or None.
    eos_ids: tokens that end a text, the `eos_token` first; empty if the checkpoint names none.
    prefix_ids: tokens that begin a text that is not a chat, such as BOS.
  """

  backend: tokenizers.Tokenizer
  special_tokens: dict[str, str]
  chat_template: str | None
  eos_ids: tuple[int, ...]
  prefix_ids: tuple[int, ...]


def check_tokenizer(folder: str | os.PathLike) -> None:
  """Raises ValueError if a folder holds no tokenizer."""
  if not any((pathlib.Path(folder) / name).exists() for name in _MODEL_FILES):
    raise ValueError(
      f"{folder} has no tokenizer: none of {', '.join(_MODEL_FILES)}. Name another folder that "
      f"holds the model's tokenizer"
    )


def copy_tokenizer(source: str | os.PathLike, target: str | os.PathLike) -> None:
  """Copies a tokenizer's files, including its chat template."""
  check_tokenizer(source)
  for name in _FILES:
    if (pathlib.Path(source) / name).exists():
      shutil.copyfile(pathlib.Path(source) / name, pathlib.Path(target) / name)


def read_tokenizer(folder: pathlib.Path, *, begins_with_bos: bool) -> TokenizerFiles:
  """Reads the tokenizer of a Hugging Face folder.

  Args:
    begins_with_bos: texts begin with BOS, even if the tokenizer itself would not add it.

  Raises:
    ValueError: there is none, or it can't be read.
  """
  check_tokenizer(folder)
  try:
    return _read(folder, begins_with_bos=begins_with_bos)
  except Exception as error:  # the library `tokenizers` raises Exception itself
    raise ValueError(
      f"the tokenizer of {folder} can't be read: {type(error).__name__}: {error}"
    ) from error


def _read(folder: pathlib.Path, *, begins_with_bos: bool) -> TokenizerFiles:
  config = _read_if_exists(folder / _SPECIAL_TOKENS_MAP)
  config |= _read_if_exists(folder / _TOKENIZER_CONFIG)
  defined = {kind: config[kind] for kind in _SPECIAL if config.get(kind) is not None}
  special = {k: v["content"] if isinstance(v, dict) else v for k, v in defined.items()}
  if (folder / "tokenizer.json").exists():
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  else:
    import transformers

    # Without the argument, transformers would ask on standard input whether to run the folder's
    # own code.
    loaded = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not loaded.is_fast:
      raise ValueError("it has no fast (`tokenizers`) form")
    backend = loaded.backend_tokenizer
    special = {k: v for k in _SPECIAL if (v := getattr(loaded, k)) is not None}
  check_special(special)

  ids = _eos_ids(folder)
  if "eos_token" in special:
    ids = [_id(backend, "eos_token", special), *ids]
  elif ids and (name := backend.id_to_token(ids[0])) is not None:
    special["eos_token"] = name
  template = config.get("chat_template")
  if isinstance(template, list):  # several templates with names
    template = {entry["name"]: entry["template"] for entry in template}.get("default")
  if (folder / TEMPLATE_FILE).exists():
    template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
  if template is not None and not isinstance(template, str):
    raise ValueError(f"chat_template={template!r} must be a text")
  if begins_with_bos and "bos_token" in special:
    prefix = (_id(backend, "bos_token", special),)
  else:
    prefix = prefix_ids(backend)
  return TokenizerFiles(backend, special, template, tuple(dict.fromkeys(ids)), prefix)


def check_special(special: Mapping[str, Any]) -> None:
  """Raises ValueError for a special token that is no text."""
  if wrong := [f"{k}={v!r}" for k, v in special.items() if not isinstance(v, str) or not v]:
    raise ValueError(f"{', '.join(wrong)} must be a text that is not empty")


def _id(backend: tokenizers.Tokenizer, kind: str, special: Mapping[str, str]) -> int:
  found = backend.token_to_id(special[kind])
  if found is None:
    raise ValueError(f"the vocabulary has no {kind}={special[kind]!r}")
  return found


def prefix_ids(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
  """Returns the special tokens that a tokenizer puts before a text."""
  encoding = backend.encode("a", add_special_tokens=True)
  pairs = zip(encoding.ids, encoding.special_tokens_mask)
  return tuple(id_ for id_, _ in itertools.takewhile(lambda pair: pair[1], pairs))


def write_tokenizer(files: TokenizerFiles, folder: str | os.PathLike) -> None:
  """Writes a tokenizer and its chat template as the files that transformers reads."""
  folder = pathlib.Path(folder)
  files.backend.save(str(folder / "tokenizer.json"))
  config = {
    **files.special_tokens,
    "clean_up_tokenization_spaces": False,  # transformers 4 would change decoded text
    "tokenizer_class": "PreTrainedTokenizerFast",
  }
  config_text = json.dumps(config, indent=1, sort_keys=True) + "\n"
  (folder / _TOKENIZER_CONFIG).write_text(config_text, encoding="utf-8")
  if files.chat_template is not None:
    (folder / TEMPLATE_FILE).write_text(files.chat_template, encoding="utf-8")


def _read_if_exists(path: pathlib.Path) -> dict[str, Any]:
  return read_json(path) if path.exists() else {}


def _eos_ids(folder: pathlib.Path) -> list[int]:
  """Returns the EOS ids in a folder's generation_config.json, else in its config.json."""
  for name in (GENERATION_FILE, CONFIG_FILE):
    ids = _read_if_exists(folder / name).get("eos_token_id")
    if ids is not None:
      ids = ids if isinstance(ids, list) else [ids]
      if not all(type(id_) is int and 0 <= id_ < _MAX_ID for id_ in ids):
        raise ValueError(f"{folder / name} has eos_token_id={ids!r}; token ids are needed")
      return ids
  return []
