"""Embeds documents as unit vectors, whose inner product is their similarity.

Axis letters: C documents, E embedding, B batch, T position, D model.

A row has length 1, or is all zeros if there is nothing to embed: it then has similarity 0 to all
others and joins no pair. The SBP paper embeds with Qwen3-Embedding-0.6B (1024-d); TF-IDF and the
seed model need no download.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Float, Int
from pydantic import Field

from selfimprove_jax.models import bert
from selfimprove_jax.models.checkpoints import hf_config
from selfimprove_jax.runtime.config import section

_CHUNK_BYTES = 16 << 20
_FEWEST_COLUMNS = 32
_MIN_NORM = 1e-6  # of a projected unit vector; below it the direction is rounding noise


@section
class TfidfSvdConfig:
  """Embeds by `TfidfSvd`, fitted on the training documents.

  Attributes:
    dim: directions of the SVD; below the number of documents, and of words in two or more of them.
  """

  method: Literal["tfidf_svd"] = "tfidf_svd"
  dim: Annotated[int, Field(ge=1)]


@section
class SeedModelConfig:
  """Embeds by the mean hidden state of the pretrained model (`mean_pooled`)."""

  method: Literal["seed_model"] = "seed_model"
  batch_size: Annotated[int, Field(ge=1)]


EmbeddingConfig = Annotated[TfidfSvdConfig | SeedModelConfig, Field(discriminator="method")]


@section
class BertSentencesConfig:
  """Embeds by `BertSentences`, a sentence encoder such as all-MiniLM-L6-v2.

  Attributes:
    folder: a Hugging Face folder with `BertModel` and tokenizer.json.
    seq_len: tokens of a text that count, with two special ones; None takes the number in the
      folder's sentence_bert_config.json or, without that file, all positions of the model.
  """

  method: Literal["bert"] = "bert"
  folder: str
  batch_size: Annotated[int, Field(ge=1)] = 32
  seq_len: Annotated[int, Field(ge=3)] | None = None


TextEmbeddingConfig = Annotated[TfidfSvdConfig | BertSentencesConfig, Field(discriminator="method")]
"""Embedders that need nothing but texts."""


@dataclasses.dataclass(frozen=True)
class TfidfSvd:
  """Latent semantic analysis: TF-IDF of words, projected on the corpus's leading directions.

  Fit it on training documents, then embed any others: `TfidfSvd.fit(train, ...)(held_out)`.
  """

  vectorizer: Any
  svd: Any

  @classmethod
  def fit(cls, texts: Sequence[str], *, dim: int, seed: int) -> "TfidfSvd":
    """Learns the words that two documents share, their weights and the `dim` directions.

    Args:
      seed: seeds the randomized SVD. The result does not depend on the number of threads.
    """
    import threadpoolctl
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    if len(texts) <= dim:
      raise ValueError(f"dim={dim} needs more than {dim} documents; there are {len(texts)}")
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2)
    try:
      counts_CV = vectorizer.fit_transform(texts)
      num_words = counts_CV.shape[1]
    except ValueError:  # scikit-learn's error for an empty vocabulary
      num_words = 0
    if num_words <= dim:
      raise ValueError(
        f"dim={dim} needs more than {dim} words that two documents share; the {len(texts)} "
        f"documents share {num_words}"
      )
    svd = TruncatedSVD(dim, random_state=seed)
    with threadpoolctl.threadpool_limits(1):  # with more threads BLAS sums in another order
      svd.fit(counts_CV)
    return cls(vectorizer, svd)

  def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "C E"]:
    """Returns float32 unit rows; a zero row for a text with no word that `fit` saw."""
    import threadpoolctl

    if not texts:  # the vectorizer refuses an empty list
      return np.zeros((0, self.svd.n_components), np.float32)
    with threadpoolctl.threadpool_limits(1):
      return _unit_rows(self.svd.transform(self.vectorizer.transform(texts)))


@dataclasses.dataclass(frozen=True)
class BertSentences:
  """Embeds texts by the mean of a BERT encoder's hidden states over their tokens.

  Special tokens count in the mean, as in sentence-transformers, except that a text without other
  tokens is a zero row.

  Attributes:
    tokenizer: adds the special tokens; truncates to `seq_len` tokens and pads nothing.
    hidden_fn: as in `mean_pooled`.
  """

  tokenizer: tokenizers.Tokenizer
  hidden_fn: Callable[[Array, Array, Array], Array]
  seq_len: int
  batch_size: int
  pad_id: int

  @classmethod
  def load(cls, config: BertSentencesConfig) -> "BertSentences":
    """Loads the encoder of a Hugging Face folder.

    Raises:
      ValueError: the folder has no such encoder, pools in another way than by the mean, or has
        fewer positions than `seq_len`.
    """
    folder = pathlib.Path(config.folder)
    model_config = bert.read_config(folder)
    seq_len = config.seq_len or _own_seq_len(folder, model_config.max_positions)
    if seq_len > model_config.max_positions:
      raise ValueError(
        f"seq_len={seq_len} is more than the {model_config.max_positions} positions of {folder}"
      )
    _check_pooling(folder)
    try:
      tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises no narrower class
      raise ValueError(f"{folder / 'tokenizer.json'} can't be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(seq_len)
    if tokenizer.get_vocab_size() > model_config.vocab_size:
      raise ValueError(
        f"{folder} has a tokenizer of {tokenizer.get_vocab_size()} tokens for a model of "
        f"{model_config.vocab_size}"
      )
    params = bert.load_params(folder, model_config)
    model = bert.Bert(model_config)

    @jax.jit
    def hidden(params: Any, tokens_BT: Array, segment_ids_BT: Array) -> Array:
      return model.apply({"params": params}, tokens_BT, segment_ids_BT > 0)

    def hidden_fn(tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array) -> Array:
      return hidden(params, tokens_BT, segment_ids_BT)

    return cls(tokenizer, hidden_fn, seq_len, config.batch_size, pad_id=0)

  def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "C E"]:
    """Returns float32 unit rows; a zero row for a text without tokens."""
    encodings = self.tokenizer.encode_batch(list(texts))
    tokens = [[] if all(e.special_tokens_mask) else e.ids for e in encodings]
    # Texts of similar length share a batch, and each number of columns is compiled once.
    lengths = [min(self.seq_len, max(_FEWEST_COLUMNS, _power_of_2(len(ids)))) for ids in tokens]
    rows: list[np.ndarray | None] = [None] * len(tokens)
    for length in sorted({*lengths}) or [min(self.seq_len, _FEWEST_COLUMNS)]:
      chosen = [index for index, other in enumerate(lengths) if other == length]
      embedded = mean_pooled(
        self.hidden_fn,
        [tokens[index] for index in chosen],
        seq_len=length,
        batch_size=self.batch_size,
        pad_id=self.pad_id,
      )
      for index, row in zip(chosen, embedded, strict=True):
        rows[index] = row
    return np.stack(rows) if rows else embedded


def text_embedder(
  config: TextEmbeddingConfig, texts: Sequence[str], *, seed: int
) -> Callable[[Sequence[str]], Float[np.ndarray, "C E"]]:
  """Makes an embedder of texts; `texts` and `seed` fit those that are fitted."""
  if isinstance(config, TfidfSvdConfig):
    return TfidfSvd.fit(texts, dim=config.dim, seed=seed)
  return BertSentences.load(config)


def _own_seq_len(folder: pathlib.Path, max_positions: int) -> int:
  path = folder / "sentence_bert_config.json"
  value = hf_config.read_json(path).get("max_seq_length") if path.exists() else None
  return max_positions if value is None else hf_config.check_size(path, "max_seq_length", value)


def _check_pooling(folder: pathlib.Path) -> None:
  path = folder / "1_Pooling" / "config.json"
  if not path.exists():
    return
  prefix = "pooling_mode_"
  modes = {n: on for n, on in hf_config.read_json(path).items() if n.startswith(prefix)}
  chosen = sorted(name.removeprefix(prefix) for name, is_on in modes.items() if is_on)
  if chosen != ["mean_tokens"]:
    raise ValueError(f"{path} pools by {', '.join(chosen)}; supported is mean_tokens")


def _power_of_2(length: int) -> int:
  return 1 << max(0, length - 1).bit_length()


def mean_pooled(
  hidden_fn: Callable[[Array, Array, Array], Float[Array, "B T D"]],
  token_lists: Iterable[Sequence[int]],
  *,
  seq_len: int,
  batch_size: int,
  pad_id: int,
) -> Float[np.ndarray, "C D"]:
  """Embeds documents by the mean of a language model's hidden states over their tokens.

  Args:
    hidden_fn: (tokens_BT, positions_BT, segment_ids_BT) -> hidden states; jit it: every call has
      the same shapes. Segment 0 is padding and does not count in the mean.
    token_lists: one document each; only its first `seq_len` tokens count.

  Returns:
    Float32 unit rows; a zero row for a document without tokens.
  """
  batches, remaining = [], iter(token_lists)
  # Runs at least once, since no documents must still give an array with D columns.
  while (batch := list(itertools.islice(remaining, batch_size))) or not batches:
    batches.append(_pool_batch(hidden_fn, batch, seq_len, batch_size, pad_id))
  return _unit_rows(np.concatenate(batches))


def write_embeddings(path: str | os.PathLike, embeddings_CE: Float[np.ndarray, "C E"]) -> None:
  """Writes a new float32 zarr3 array at the folder `path`, chunked along C (16 MiB per chunk)."""
  import tensorstore as ts

  rows, dim = embeddings_CE.shape
  chunk_rows = max(1, min(rows, _CHUNK_BYTES // (4 * max(1, dim))))
  spec = {
    **_zarr(path),
    "metadata": {
      "shape": [rows, dim],
      "data_type": "float32",
      "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk_rows, dim]}},
      "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    },
    "create": True,
  }
  ts.open(spec).result().write(embeddings_CE.astype(np.float32)).result()


def open_embeddings(path: str | os.PathLike) -> Any:
  """Opens the array of `write_embeddings` as a lazy `tensorstore.TensorStore` of shape (C, E)."""
  import tensorstore as ts

  return ts.open(_zarr(path), open=True, read=True).result()


def _zarr(path: str | os.PathLike) -> dict[str, Any]:
  return {"driver": "zarr3", "kvstore": {"driver": "file", "path": os.fspath(path)}}


def _pool_batch(
  hidden_fn: Callable[..., Array],
  batch: Sequence[Sequence[int]],
  seq_len: int,
  batch_size: int,
  pad_id: int,
) -> Float[np.ndarray, "B D"]:
  tokens_BT = np.full((batch_size, seq_len), pad_id, np.int32)
  segment_ids_BT = np.zeros((batch_size, seq_len), np.int32)
  for row, tokens in enumerate(batch):
    length = min(len(tokens), seq_len)
    tokens_BT[row, :length] = tokens[:length]
    segment_ids_BT[row, :length] = 1
  positions_BT = np.broadcast_to(np.arange(seq_len, dtype=np.int32), tokens_BT.shape)
  hidden_BTD = hidden_fn(*map(jnp.asarray, (tokens_BT, positions_BT, segment_ids_BT)))
  return np.asarray(_masked_mean(hidden_BTD, segment_ids_BT))[: len(batch)]


@jax.jit
def _masked_mean(
  hidden_BTD: Float[Array, "B T D"], segment_ids_BT: Int[Array, "B T"]
) -> Float[Array, "B D"]:
  is_token_BT = segment_ids_BT > 0
  # where, not a product: attention over only padding may give NaN, and NaN * 0 is NaN.
  hidden_BTD = jnp.where(is_token_BT[:, :, None], hidden_BTD.astype(jnp.float32), 0.0)
  return hidden_BTD.sum(1) / jnp.maximum(is_token_BT.sum(1), 1)[:, None]


def _unit_rows(rows_CE: Float[np.ndarray, "C E"]) -> Float[np.ndarray, "C E"]:
  rows_CE = rows_CE.astype(np.float64)
  norms_C1 = np.linalg.norm(rows_CE, axis=1, keepdims=True)
  has_direction_C1 = norms_C1 > _MIN_NORM
  units_CE = rows_CE / np.where(has_direction_C1, norms_C1, 1)
  return np.where(has_direction_C1, units_CE, 0).astype(np.float32)
