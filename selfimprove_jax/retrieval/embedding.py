"""Documents as unit vectors, whose inner product is their similarity.

Axis letters: C documents, E embedding, B batch, T position, D model.

Two embedders share one convention: a row has length 1, or is all zeros where there is nothing to
embed; a zero row is at similarity 0 to everything, so no pair is ever made of it. The SBP paper
embeds with Qwen3-Embedding-0.6B (1024-d); both embedders here need no download.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_CHUNK_BYTES = 16 << 20
_NORM_OF_NOTHING = 1e-6  # of a projected unit vector; below it a direction is rounding noise


@dataclasses.dataclass(frozen=True)
class TfidfSvd:
  """Latent semantic analysis: TF-IDF of words, projected on the corpus's leading directions.

  Fit it once, on training documents; it embeds any others: `TfidfSvd.fit(train, ...)(held_out)`.
  """

  vectorizer: Any
  svd: Any

  @classmethod
  def fit(cls, texts: Sequence[str], *, dim: int, seed: int) -> "TfidfSvd":
    """Learns the words, their weights and the `dim` directions.

    Words found in one document alone are left out: they can link no two documents.

    Args:
      dim: Less than the number of texts and of shared words.
      seed: Of the randomized SVD. The result does not depend on the number of threads.

    Raises:
      ValueError: the corpus is too small for `dim`.
    """
    import threadpoolctl
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    if dim < 1:
      raise ValueError(f"dim={dim}: an embedding has at least 1 dimension")
    if len(texts) <= dim:
      raise ValueError(f"dim={dim} needs more than {dim} documents; there are {len(texts)}")
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2)
    try:
      counts_CV = vectorizer.fit_transform(texts)
      num_words = counts_CV.shape[1]
    except ValueError:  # scikit-learn's word for an empty vocabulary
      num_words = 0
    if num_words <= dim:
      raise ValueError(
        f"dim={dim} needs more than {dim} words that two documents share; the {len(texts)} "
        f"documents share {num_words}"
      )
    svd = TruncatedSVD(dim, random_state=seed)
    with threadpoolctl.threadpool_limits(1):  # BLAS sums in another order on more threads
      svd.fit(counts_CV)
    return cls(vectorizer, svd)

  def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "C E"]:
    """Float32 unit rows; a zero row for a text with no word that `fit` saw."""
    import threadpoolctl

    if not texts:
      return np.zeros((0, self.svd.n_components), np.float32)
    with threadpoolctl.threadpool_limits(1):
      return _unit_rows(self.svd.transform(self.vectorizer.transform(texts)))


def tfidf_svd(texts: Sequence[str], *, dim: int, seed: int) -> Float[np.ndarray, "C E"]:
  """Embeds documents with a `TfidfSvd` that was fitted on them."""
  return TfidfSvd.fit(texts, dim=dim, seed=seed)(texts)


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
    token_lists: One document each. Only its first `seq_len` tokens are read.

  Returns:
    Float32 unit rows; a zero row for a document without tokens.
  """
  batches = []
  batch: list[Sequence[int]] = []
  for tokens in token_lists:
    batch.append(tokens)
    if len(batch) == batch_size:
      batches.append(_pool_batch(hidden_fn, batch, seq_len, batch_size, pad_id))
      batch = []
  if batch or not batches:
    batches.append(_pool_batch(hidden_fn, batch, seq_len, batch_size, pad_id))
  return _unit_rows(np.concatenate(batches))


def write_embeddings(
  path: str | os.PathLike, embeddings_CE: Float[np.ndarray, "C E"], *, chunk_rows: int | None = None
) -> None:
  """Writes a new float32 zarr3 array at the folder `path`, chunked along C (16 MiB a chunk).

  The folder can be a shard: `with writer.shard("00000-of-00001.zarr") as (path, counts): ...`.
  """
  import tensorstore as ts

  rows, dim = embeddings_CE.shape
  if chunk_rows is None:
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
  """Opens what `write_embeddings` wrote, reading nothing yet.

  Returns:
    A `tensorstore.TensorStore` of shape (C, E); `np.asarray(store[a:b])` reads those rows.
  """
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
  hidden_BTD = hidden_fn(
    jnp.asarray(tokens_BT), jnp.asarray(positions_BT), jnp.asarray(segment_ids_BT)
  )
  return np.asarray(_masked_mean(hidden_BTD, segment_ids_BT))[: len(batch)]


@jax.jit
def _masked_mean(
  hidden_BTD: Float[Array, "B T D"], segment_ids_BT: Int[Array, "B T"]
) -> Float[Array, "B D"]:
  is_token_BT = segment_ids_BT > 0
  # where, not a product: a row of nothing but padding may hold NaN
  hidden_BTD = jnp.where(is_token_BT[:, :, None], hidden_BTD.astype(jnp.float32), 0.0)
  return hidden_BTD.sum(1) / jnp.maximum(is_token_BT.sum(1), 1)[:, None]


def _unit_rows(rows_CE: Float[np.ndarray, "C E"]) -> Float[np.ndarray, "C E"]:
  rows_CE = rows_CE.astype(np.float64)
  norms_C1 = np.linalg.norm(rows_CE, axis=1, keepdims=True)
  is_something_C1 = norms_C1 > _NORM_OF_NOTHING
  return np.where(is_something_C1, rows_CE / np.where(is_something_C1, norms_C1, 1), 0).astype(
    np.float32
  )
