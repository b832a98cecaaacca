"""Builds the tokenizer that a GGUF file's metadata describe, with the library `tokenizers` alone.

llama.cpp's file stores vocabulary and merges; the pre-tokenizer is only a name
(`tokenizer.ggml.pre`), for which llama.cpp has regular expressions in its source. The table below
has those of the models that we can run.
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
    patterns: each one splits the pieces that the one before left.
    ignore_merges: a piece that is in the vocabulary is one token, even if no merges lead to it.
    adds_bos: texts begin with BOS, unless the file says otherwise.
    nfc: the text is brought into Unicode's normal form C first.
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
# llama.cpp's ids for a SentencePiece vocabulary that names none.
_SENTENCEPIECE_IDS = {"unk_token": 0, "bos_token": 1, "eos_token": 2}


def read_tokenizer(metadata: Mapping[str, Any], path: str | os.PathLike) -> TokenizerFiles:
  """Builds the tokenizer of a GGUF file.

  Args:
    metadata: the file's values whose keys begin with `tokenizer.`.
    path: the file, for errors.

  Raises:
    ValueError: the file has no tokenizer, or one of a kind that we do not build.
  """
  ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
  kind, tokens = ggml.get("model"), ggml.get("tokens")
  if not tokens:
    raise ValueError(f"{path} has no tokenizer: tokenizer.ggml.tokens is missing or empty")
  if kind == "gpt2":
    pre = _pre_tokenizer(ggml, path)
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
  special = {name: tokens[id_] for name, id_ in ids.items() if id_ is not None}
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


def _pre_tokenizer(ggml: Mapping[str, Any], path: str | os.PathLike) -> _PreTokenizer:
  name = ggml.get("pre", "default")  # as llama.cpp does with files older than the field
  if name not in _PRE_TOKENIZERS:
    raise ValueError(
      f"{path} has tokenizer.ggml.pre={name!r}; supported are {', '.join(_PRE_TOKENIZERS)}"
    )
  return _PRE_TOKENIZERS[name]


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
  unknown = tokens[ggml.get("unknown_token_id", 0)]
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
  tokens: Sequence[str],
  merges: Sequence[tuple[str, ...]],
  path: str | os.PathLike,
  **options: Any,
) -> tokenizers.Tokenizer:
  vocab = {token: id_ for id_, token in enumerate(tokens)}
  try:
    return tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
  except Exception as error:  # `tokenizers` raises Exception itself for a merge without a token
    raise ValueError(f"the merges of {path} do not fit its vocabulary: {error}") from error


def _merges_of_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
  """Recovers merges from SentencePiece's scores.

  SentencePiece joins the two neighbors whose union scores highest, so a merge's rank is the score
  of what it makes. Ties are broken as by transformers' `generate_merges`.
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
  """Makes control tokens special, and user-defined tokens (`<think>`) match as a whole."""
  kinds = list(zip(tokens, token_types))
  control = [token for token, kind in kinds if kind == _CONTROL]
  backend.add_special_tokens(
    [AddedToken(t, normalized=False) for t in dict.fromkeys([*control, *special.values()])]
  )
  backend.add_tokens(
    [AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED]
  )
