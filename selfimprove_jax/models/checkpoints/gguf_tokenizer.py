"""Builds the tokenizer that a GGUF file's metadata describe, using only the library `tokenizers`.

A GGUF file stores the vocabulary and the merges, but of the pre-tokenizer only its name
(`tokenizer.ggml.pre`); the regular expressions are in llama.cpp's source. The table below copies
those of the models that we can run.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from selfimprove_jax.models.checkpoints.tokenizer_files import TokenizerFiles, prefix_ids

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")  # one digit at a time
_TEKKEN = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _PreTokenizer:
  """A pre-tokenizer and the settings that its name in a GGUF file implies.

  Attributes:
    patterns: each one splits the pieces of the one before.
    ignore_merges: a piece that is in the vocabulary is one token, even if no merges lead to it.
    adds_bos: texts begin with BOS, unless the file sets `add_bos_token`.
    nfc: normalize the text to Unicode NFC first.
  """

  patterns: tuple[str, ...]
  ignore_merges: bool = False
  adds_bos: bool = False
  nfc: bool = False


_DIGITS_THEN_GPT2 = _PreTokenizer((r"\p{N}", _GPT2))
_LIKE_LLAMA3 = _PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)
# llama.cpp does not normalize; the tokenizers that Qwen publishes do.
_LIKE_QWEN2 = _PreTokenizer((_QWEN2,), nfc=True)
_PRE_TOKENIZERS = {
  "default": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
  "gpt-2": _PreTokenizer((_GPT2,)),
  **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS_THEN_GPT2),
  **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LIKE_LLAMA3),
  **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _LIKE_QWEN2),
  "tekken": _PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
}
# Values of tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL_IDS = {
  "bos_token": "bos_token_id",
  "eos_token": "eos_token_id",
  "unk_token": "unknown_token_id",
  "pad_token": "padding_token_id",
}
_LISTS = {"tokens": str, "merges": str, "token_type": int, "scores": float}
_TYPES = {
  **_LISTS,
  **dict.fromkeys(("model", "pre", "tokenizer.chat_template"), str),
  **dict.fromkeys(_SPECIAL_IDS.values(), int),
  **dict.fromkeys(("add_bos_token", "add_space_prefix"), bool),
}
# llama.cpp's ids for a SentencePiece vocabulary that names none.
_SENTENCEPIECE_IDS = {"unk_token": 0, "bos_token": 1, "eos_token": 2}


def read_tokenizer(metadata: Mapping[str, Any], path: str | os.PathLike) -> TokenizerFiles:
  """Builds the tokenizer of a GGUF file.

  Args:
    metadata: the file's values whose keys begin with `tokenizer.`.
    path: the file's name in error messages.
  """
  ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
  _check_types(ggml, path)
  kind, tokens = ggml.get("model"), ggml.get("tokens")
  if not tokens:
    raise ValueError(f"{path} has no tokenizer: tokenizer.ggml.tokens is missing or empty")
  if kind == "gpt2":
    name = ggml.get("pre", "default")  # llama.cpp's default for files older than the field
    if name not in _PRE_TOKENIZERS:
      raise ValueError(
        f"{path} has tokenizer.ggml.pre={name!r}; supported are {', '.join(_PRE_TOKENIZERS)}"
      )
    pre = _PRE_TOKENIZERS[name]
    backend = _byte_level(ggml, pre, path)
    adds_bos, default_ids = pre.adds_bos, {}
  elif kind == "llama":
    backend = _sentencepiece(ggml, path)
    adds_bos, default_ids = True, _SENTENCEPIECE_IDS
  else:
    raise ValueError(
      f"{path} has tokenizer.ggml.model={kind!r}; supported are 'gpt2' (byte-level BPE) and "
      f"'llama' (SentencePiece)"
    )
  ids = {name: ggml.get(key, default_ids.get(name)) for name, key in _SPECIAL_IDS.items()}
  for name, id_ in ids.items():
    if id_ is not None and not 0 <= id_ < len(tokens):
      raise ValueError(f"{path} has {_SPECIAL_IDS[name]}={id_}, and {len(tokens)} tokens")
  special = {name: tokens[id_] for name, id_ in ids.items() if id_ is not None}
  if "" in special.values():
    raise ValueError(f"{path} has special tokens without text: {special}")
  _add_tokens(backend, tokens, ggml.get("token_type") or (), special)
  if ggml.get("add_bos_token", adds_bos) and "bos_token" in special:
    bos = special["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
      single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, ids["bos_token"])]
    )
  return TokenizerFiles(
    backend=backend,
    special_tokens=special,
    chat_template=metadata.get("tokenizer.chat_template"),
    eos_ids=() if ids["eos_token"] is None else (ids["eos_token"],),
    prefix_ids=prefix_ids(backend),
  )


def _check_types(ggml: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Raises ValueError for a value of another type than llama.cpp's."""
  for key, kind in _TYPES.items():
    value = ggml.get(key)
    parts = value if isinstance(value, list) else [value]
    is_list = key in _LISTS
    if value is None or (isinstance(value, list) == is_list and {*map(type, parts)} <= {kind}):
      continue
    wanted = f"a list of {kind.__name__}" if is_list else kind.__name__
    raise ValueError(f"{path} has the tokenizer's {key}={str(value)[:40]}; it must be {wanted}")


def _byte_level(
  ggml: Mapping[str, Any], pre: _PreTokenizer, path: str | os.PathLike
) -> tokenizers.Tokenizer:
  merges = [tuple(merge.split(" ")) for merge in ggml.get("merges", ())]
  backend = _bpe(ggml["tokens"], merges, path, ignore_merges=pre.ignore_merges)
  if pre.nfc:
    backend.normalizer = normalizers.NFC()
  splits = [
    pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in pre.patterns
  ]
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentencepiece(ggml: Mapping[str, Any], path: str | os.PathLike) -> tokenizers.Tokenizer:
  tokens = ggml["tokens"]
  if "merges" in ggml:
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
  elif "scores" in ggml:
    merges = _merges_of_scores(tokens, ggml["scores"])
  else:
    raise ValueError(f"{path} has neither tokenizer.ggml.merges nor tokenizer.ggml.scores")
  id_ = ggml.get("unknown_token_id", 0)
  unknown = tokens[id_] if 0 <= id_ < len(tokens) else None  # which `read_tokenizer` refuses
  backend = _bpe(tokens, merges, path, unk_token=unknown, fuse_unk=True, byte_fallback=True)
  adds_space = ggml.get("add_space_prefix", True)
  backend.pre_tokenizer = pre_tokenizers.Metaspace(
    replacement="▁", prepend_scheme="first" if adds_space else "never", split=False
  )
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  if adds_space:
    steps.append(decoders.Strip(content=" ", left=1, right=0))
  backend.decoder = decoders.Sequence(steps)
  return backend


def _bpe(
  tokens: Sequence[str], merges: Sequence[tuple[str, ...]], path: str | os.PathLike, **options: Any
) -> tokenizers.Tokenizer:
  vocab = {token: id_ for id_, token in enumerate(tokens)}
  try:
    return tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
  except Exception as error:  # `tokenizers` raises Exception itself for a merge without a token
    raise ValueError(f"the merges of {path} do not fit its vocabulary: {error}") from error


def _merges_of_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
  """Recovers merges from SentencePiece's scores: a merge ranks by the score of its result.

  Breaks ties like transformers' `generate_merges`.
  """
  vocab = {token: id_ for id_, token in enumerate(tokens)}
  found = []
  for token, score in zip(tokens, scores):
    pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
    pairs = [(a, b) for a, b in pairs if a in vocab and b in vocab]
    pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    found += [(score, len(a), len(b), a, b) for a, b in pairs]
  found.sort(key=lambda item: item[:3], reverse=True)  # stable: equal keys keep their order
  return [(a, b) for *_, a, b in found]


def _add_tokens(
  backend: tokenizers.Tokenizer,
  tokens: Sequence[str],
  token_types: Sequence[int],
  special: Mapping[str, str],
) -> None:
  """Makes control tokens special, and keeps user-defined tokens (`<think>`) in one piece."""
  kinds = list(zip(tokens, token_types))
  control = [token for token, kind in kinds if kind == _CONTROL]
  backend.add_special_tokens(
    [AddedToken(t, normalized=False) for t in dict.fromkeys([*control, *special.values()])]
  )
  backend.add_tokens(
    [AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED]
  )
