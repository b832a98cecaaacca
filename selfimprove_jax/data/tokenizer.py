"""Converts text to token ids and back, with the four special tokens that training needs."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import tokenizers
from pydantic import Field
from tokenizers import decoders, models, pre_tokenizers, trainers

from selfimprove_jax.runtime.config import section

PAD, BOS, SEP, EOS = "<|pad|>", "<|bos|>", "<|sep|>", "<|eos|>"

_OWN_NAMES = {"bos_token": BOS, "eos_token": EOS, "sep_token": SEP, "pad_token": PAD}
_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_GENERIC_CLASS = "PreTrainedTokenizerFast"


@section
class SpecialTokens:
  """Names tokens to use instead of those that an existing tokenizer defines.

  A token that the vocabulary lacks is added to it.

  Attributes:
    sep_token: separates the documents of a pair.
    pad_token: fills rows; it is masked and never predicted, so it may be the EOS token.
  """

  bos_token: str | None = None
  eos_token: str | None = None
  sep_token: str | None = None
  pad_token: str | None = None


@section
class TokenizerConfig:
  """Selects an existing tokenizer, or describes a byte-level BPE to train.

  Attributes:
    path: a tokenizer's folder or its hub name; None trains one.
    special_tokens: for an existing tokenizer.
    vocab_size: of a new tokenizer.
    train_chars: characters to train a new tokenizer on. They come from the first documents, as the
      unique data do, and are fewer if the unique data hold fewer.
  """

  path: str | None = None
  special_tokens: SpecialTokens = SpecialTokens()
  vocab_size: Annotated[int, Field(ge=1)]
  train_chars: Annotated[int, Field(ge=1)]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A subword tokenizer that never adds special tokens.

  Text that spells a special token ("<|eos|>") is encoded as its characters, so a document cannot
  end itself or begin another one.
  """

  backend: tokenizers.Tokenizer
  bos_token: str
  eos_token: str
  sep_token: str
  pad_token: str

  def __post_init__(self) -> None:
    self.backend.no_padding()
    self.backend.no_truncation()
    self.backend.encode_special_tokens = True

  def __reduce__(self) -> tuple:  # pickling the backend would lose the settings of __post_init__
    return Tokenizer, (self.backend, *(getattr(self, kind) for kind in _OWN_NAMES))

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without special tokens."""
    return self.backend.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes texts on all cores."""
    return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids without special tokens; invalid UTF-8 becomes U+FFFD."""
    return self.backend.decode(list(ids), skip_special_tokens=True)

  @property
  def vocab_size(self) -> int:
    """The rows that an embedding table needs: one more than the largest id."""
    return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

  @property
  def bos_id(self) -> int:
    return self.backend.token_to_id(self.bos_token)

  @property
  def sep_id(self) -> int:
    return self.backend.token_to_id(self.sep_token)

  @property
  def eos_id(self) -> int:
    return self.backend.token_to_id(self.eos_token)

  @property
  def pad_id(self) -> int:
    return self.backend.token_to_id(self.pad_token)

  def save(self, path: str | os.PathLike) -> None:
    """Writes a folder that `load_tokenizer` and transformers' `AutoTokenizer` read."""
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _TOKENIZER_FILE).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
    config = {kind: getattr(self, kind) for kind in _OWN_NAMES}
    config["tokenizer_class"] = _GENERIC_CLASS
    (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
  """Trains a byte-level BPE tokenizer with GPT-2's pre-tokenization.

  Equal texts in equal order give equal tokenizers.

  Args:
    vocab_size: 4 special tokens, 256 bytes and the merges. A small text gives fewer merges.
  """
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  fixed = len(_OWN_NAMES) + len(alphabet)
  if vocab_size <= fixed:
    raise ValueError(
      f"vocab_size={vocab_size} must be above {fixed}, the number of special tokens and bytes"
    )
  backend = _byte_level(models.BPE())
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[PAD, BOS, SEP, EOS],
    initial_alphabet=alphabet,
    show_progress=False,
  )
  backend.train_from_iterator(texts, trainer)
  return Tokenizer(backend, **_OWN_NAMES)


def load_tokenizer(
  path_or_name: str | os.PathLike, special_tokens: SpecialTokens | None = None
) -> Tokenizer:
  """Loads a tokenizer that `Tokenizer.save` wrote, or any Hugging Face tokenizer.

  Args:
    path_or_name: a folder with tokenizer.json, or with GPT-2's vocab.json and merges.txt; a
      tokenizer.json; any other folder or hub name that `transformers.AutoTokenizer` reads.
  """
  backend, defined = _load(path_or_name)
  return make_tokenizer(backend, defined, special_tokens, name=os.fspath(path_or_name))


def make_tokenizer(
  backend: tokenizers.Tokenizer,
  defined: Mapping[str, str],
  special_tokens: SpecialTokens | None = None,
  *,
  name: str,
  default: str | None = None,
) -> Tokenizer:
  """Wraps a tokenizer of the library `tokenizers`, which is mutated.

  Args:
    defined: the special tokens that the tokenizer defines: `bos_token`, ...
    name: its name in error messages.
    default: the token to use for those that neither `defined` nor `special_tokens` names.

  Raises:
    ValueError: a special token is named nowhere, or ordinary text is encoded to it.
  """
  tokens: dict[str, str] = {}
  for kind, own_name in _OWN_NAMES.items():
    found = default if backend.token_to_id(own_name) is None else own_name
    if token := getattr(special_tokens, kind, None) or defined.get(kind) or found:
      tokens[kind] = token
  if missing := [kind for kind in _OWN_NAMES if kind not in tokens]:
    raise ValueError(
      f"tokenizer {name!r} defines no {', '.join(missing)}: name a token for it in special_tokens, "
      f"for example {missing[0]}={_OWN_NAMES[missing[0]]!r} (a token that the vocabulary lacks is "
      f"added to it)"
    )
  backend.add_special_tokens([tokens[kind] for kind in _OWN_NAMES])
  wrapped = Tokenizer(backend, **tokens)
  for kind, token in tokens.items():
    if backend.token_to_id(token) in wrapped.encode(token):
      raise ValueError(
        f"{kind}={token!r} is a token that ordinary text is encoded to, so documents could contain "
        f"it; name another one"
      )
  return wrapped


def _load(path_or_name: str | os.PathLike) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  """Returns the backend, and the special tokens that the tokenizer defines."""
  try:
    return _load_any(path_or_name)
  except Exception as error:  # the library `tokenizers` raises Exception itself
    raise ValueError(
      f"tokenizer {os.fspath(path_or_name)!r} can't be read: {type(error).__name__}: {error}"
    ) from error


def _load_any(path_or_name: str | os.PathLike) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
  path = pathlib.Path(path_or_name)
  if path.is_file():
    return tokenizers.Tokenizer.from_file(str(path)), {}
  has = {file.name for file in path.iterdir()} if path.is_dir() else set()
  if {_TOKENIZER_FILE, _CONFIG_FILE} <= has:
    config = json.loads((path / _CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == _GENERIC_CLASS:
      values = {kind: config[kind] for kind in _OWN_NAMES if config.get(kind) is not None}
      defined = {k: v["content"] if isinstance(v, dict) else v for k, v in values.items()}
      if wrong := [f"{k}={v!r}" for k, v in defined.items() if not isinstance(v, str)]:
        raise ValueError(f"{_CONFIG_FILE} has {', '.join(wrong)}, which are no texts")
      return tokenizers.Tokenizer.from_file(str(path / _TOKENIZER_FILE)), defined
  elif _TOKENIZER_FILE in has:
    return tokenizers.Tokenizer.from_file(str(path / _TOKENIZER_FILE)), {}
  elif {"vocab.json", "merges.txt"} <= has and _CONFIG_FILE not in has:
    # AutoTokenizer needs a config file to know that this is GPT-2's layout.
    model = models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
    return _byte_level(model), {}

  import transformers

  # The class decides which special tokens a config that names none has. Without the argument,
  # transformers would ask on standard input whether to run the folder's own code.
  loaded = transformers.AutoTokenizer.from_pretrained(path_or_name, trust_remote_code=False)
  if not loaded.is_fast:
    raise ValueError("it has no fast (`tokenizers`) form")
  tokens = {kind: getattr(loaded, kind) for kind in _OWN_NAMES}
  return loaded.backend_tokenizer, {k: v for k, v in tokens.items() if v is not None}


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  return backend
