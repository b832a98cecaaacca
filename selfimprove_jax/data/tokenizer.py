"""Text <-> token ids, with the four special tokens that training and synthesis need."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD, BOS, SEP, EOS = "<|pad|>", "<|bos|>", "<|sep|>", "<|eos|>"

_ROLES = ("bos_token", "eos_token", "sep_token", "pad_token")
_OWN_NAMES = {"pad_token": PAD, "bos_token": BOS, "sep_token": SEP, "eos_token": EOS}
_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_GENERIC_CLASS = "PreTrainedTokenizerFast"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A subword tokenizer that puts in no special token by itself.

  Text that spells a special token ("<|eos|>") is encoded as the characters it is, so no document
  can end itself or open a second one.
  """

  backend: tokenizers.Tokenizer
  bos_token: str
  eos_token: str
  sep_token: str
  pad_token: str

  def __post_init__(self):
    self.backend.no_padding()
    self.backend.no_truncation()
    self.backend.encode_special_tokens = True

  def __reduce__(self):  # the backend's own pickle forgets what __post_init__ sets
    return Tokenizer, (self.backend, *(getattr(self, role) for role in _ROLES))

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without special tokens."""
    return self.backend.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text, on all cores."""
    return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; special tokens are left out, and broken UTF-8 becomes U+FFFD."""
    return self.backend.decode(list(ids), skip_special_tokens=True)

  @property
  def vocab_size(self) -> int:
    """One more than the largest id: the rows an embedding table needs."""
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
    config = {role: getattr(self, role) for role in _ROLES} | {"tokenizer_class": _GENERIC_CLASS}
    (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
  """A byte-level BPE tokenizer (GPT-2's way of cutting words) fitted to the texts.

  The same texts in the same order give the same tokenizer.

  Args:
    vocab_size: All ids: 4 special tokens, 256 bytes and the merges. A text too small for as many
      merges gives a smaller vocabulary.

  Raises:
    ValueError: `vocab_size` leaves no room for a merge.
  """
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  fixed = len(_ROLES) + len(alphabet)
  if vocab_size <= fixed:
    raise ValueError(f"vocab_size is {vocab_size}; special tokens and bytes alone take {fixed}")
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
  path_or_name: str | os.PathLike,
  *,
  bos_token: str | None = None,
  eos_token: str | None = None,
  sep_token: str | None = None,
  pad_token: str | None = None,
) -> Tokenizer:
  """Our own saved tokenizer, or any Hugging Face tokenizer.

  Args:
    path_or_name: A folder with tokenizer.json, or with GPT-2's vocab.json and merges.txt; a
      tokenizer.json; any other folder or hub name that `transformers.AutoTokenizer` reads.
    bos_token: What to use as BOS instead of the tokenizer's own. A token that the vocabulary
      lacks is added after its last id.
    eos_token: Likewise, the token after a document's end.
    sep_token: Likewise, the token between the documents of a pair.
    pad_token: Likewise; it is never seen or predicted, so it may be the EOS token.

  Raises:
    ValueError: the tokenizer defines no such special token, and none was named; or one that was
      named is what ordinary text encodes to.
  """
  backend, tokens = _load(path_or_name)
  named = {
    "bos_token": bos_token,
    "eos_token": eos_token,
    "sep_token": sep_token,
    "pad_token": pad_token,
  }
  for role, token in named.items():
    if token is not None:
      tokens[role] = token
    elif tokens.get(role) is None and backend.token_to_id(_OWN_NAMES[role]) is not None:
      tokens[role] = _OWN_NAMES[role]
  missing = [role for role in _ROLES if tokens.get(role) is None]
  if missing:
    raise ValueError(
      f"tokenizer {os.fspath(path_or_name)!r} defines no {', '.join(missing)}: name one by the "
      f"option of that name, for example {missing[0]}={_OWN_NAMES[missing[0]]!r} (a token that its "
      f"vocabulary lacks is added to it)"
    )
  backend.add_special_tokens([tokens[role] for role in _ROLES])
  loaded = Tokenizer(backend, **{role: tokens[role] for role in _ROLES})
  for role in _ROLES:
    if backend.token_to_id(tokens[role]) in loaded.encode(tokens[role]):
      raise ValueError(
        f"{role} {tokens[role]!r} is a token that text encodes to; name one that no text becomes"
      )
  return loaded


def _load(path_or_name: str | os.PathLike) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
  """The backend, and the special tokens that it defines."""
  path = pathlib.Path(path_or_name)
  if path.is_file():
    return tokenizers.Tokenizer.from_file(str(path)), {}
  has = {file.name for file in path.iterdir()} if path.is_dir() else set()
  if {_TOKENIZER_FILE, _CONFIG_FILE} <= has:
    config = json.loads((path / _CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == _GENERIC_CLASS:
      values = {role: config[role] for role in _ROLES if role in config}
      tokens = {r: v["content"] if isinstance(v, dict) else v for r, v in values.items()}
      return tokenizers.Tokenizer.from_file(str(path / _TOKENIZER_FILE)), tokens
  elif _TOKENIZER_FILE in has:
    return tokenizers.Tokenizer.from_file(str(path / _TOKENIZER_FILE)), {}
  elif {"vocab.json", "merges.txt"} <= has and _CONFIG_FILE not in has:
    # AutoTokenizer needs a config file to know that this is GPT-2's layout.
    model = models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt"))
    return _byte_level(model), {}

  import transformers

  loaded = transformers.AutoTokenizer.from_pretrained(path_or_name)
  if not loaded.is_fast:
    raise ValueError(f"tokenizer {os.fspath(path_or_name)!r} has no fast (`tokenizers`) form")
  return loaded.backend_tokenizer, {role: getattr(loaded, role) for role in _ROLES}


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  return backend
