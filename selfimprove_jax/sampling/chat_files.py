"""What a model brings beside its weights to read and write text: tokenizer, chat template, ends."""

import dataclasses
import itertools
import json
import os
import pathlib
import tempfile
from typing import Any

import tokenizers

from selfimprove_jax.data.tokenizer import Tokenizer, load_tokenizer
from selfimprove_jax.models import gguf, pretrained

_ROLES = ("bos_token", "eos_token", "sep_token", "pad_token")
_SPECIAL = (*_ROLES, "unk_token", "cls_token", "mask_token")
# Where Hugging Face folders name the end of sequence, the one that counts first.
_WITH_EOS_IDS = ("generation_config.json", "config.json")


@dataclasses.dataclass(frozen=True)
class ChatFiles:
  """Attributes:
  tokenizer: with the end of sequence in the place of special tokens that the model lacks.
  special_tokens: those that it defines, by Hugging Face's names (`bos_token`, ...).
  template: the Jinja source of its chat template, or None.
  eos_ids: tokens of which each ends a text.
  prefix_ids: what a text that is no chat begins with, such as the beginning of sequence.
  """

  tokenizer: Tokenizer
  special_tokens: dict[str, str]
  template: str | None
  eos_ids: tuple[int, ...]
  prefix_ids: tuple[int, ...]


def read(checkpoint: str | os.PathLike) -> ChatFiles:
  """What the model at a path brings: a Hugging Face folder, a .gguf file, an orbax folder of ours.

  Raises:
    ValueError: no model there; it brings no tokenizer, or no end of sequence.
  """
  if pretrained.kind(checkpoint) != "gguf":
    return _of_folder(pretrained.tokenizer_path(checkpoint), pretrained.kind(checkpoint))
  with tempfile.TemporaryDirectory() as folder:
    gguf.save_tokenizer(checkpoint, folder)
    return _of_folder(pathlib.Path(folder), "gguf")


def _of_folder(folder, kind):
  config = _json(folder / "tokenizer_config.json")
  special = {role: _content(config[role]) for role in _SPECIAL if config.get(role) is not None}
  ids = _eos_ids(folder)
  if "eos_token" not in special and (folder / "tokenizer.json").exists() and ids:
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (name := backend.id_to_token(ids[0])) is not None:
      special["eos_token"] = name
  if "eos_token" not in special:
    raise ValueError(
      f"{folder} names no end of sequence: neither an eos_token in tokenizer_config.json nor an "
      f"eos_token_id of a known token in {' or '.join(_WITH_EOS_IDS)}"
    )
  absent = {role: special["eos_token"] for role in _ROLES if role not in special}
  tokenizer = load_tokenizer(folder, **absent)
  if kind == "orbax":  # as `data.packing` begins every text
    prefix = (tokenizer.bos_id,)
  else:
    whole = tokenizer.backend.encode("a", add_special_tokens=True)
    special_first = itertools.takewhile(
      lambda pair: pair[1], zip(whole.ids, whole.special_tokens_mask)
    )
    prefix = tuple(token for token, _ in special_first)
  return ChatFiles(
    tokenizer=tokenizer,
    special_tokens=special,
    template=_template(folder, config),
    eos_ids=tuple(dict.fromkeys([tokenizer.eos_id, *ids])),
    prefix_ids=prefix,
  )


def _json(file) -> dict[str, Any]:
  return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _content(token):
  return token["content"] if isinstance(token, dict) else token


def _eos_ids(folder):
  for name in _WITH_EOS_IDS:
    ids = _json(folder / name).get("eos_token_id")
    if ids is not None:
      return [ids] if isinstance(ids, int) else list(ids)
  return []


def _template(folder, config):
  file = folder / "chat_template.jinja"
  if file.exists():
    return file.read_text(encoding="utf-8")
  template = config.get("chat_template")
  if isinstance(template, list):  # several, by name
    named = {entry["name"]: entry["template"] for entry in template}
    return named.get("default")
  return template
