import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.models import attention

B, T, N, K, H = 2, 7, 4, 2, 6
SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]], np.int32)


def _qkv(scale=1.0, dtype=np.float32):
  r = np.random.default_rng(0)
  shapes = ((B, T, N, H), (B, K, T, H), (B, K, T, H))
  return [jnp.array(scale * r.normal(size=shape), dtype) for shape in shapes]


def _attend(q, k, v, *, segments=SEGMENTS, positions=POSITIONS, implementation="xla"):
  segments = None if segments is None else jnp.array(segments)
  return attention.attend(
    q,
    k,
    v,
    query_positions_BT=jnp.array(positions),
    key_positions_BS=jnp.array(positions),
    query_segments_BT=segments,
    key_segments_BS=segments,
    implementation=implementation,
  )


def _by_hand(q, k, v):
  """One query at a time, over the keys that it may see, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((B, T, N, H))
  for b, t, n in np.ndindex(B, T, N):
    seen = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
    scores = k[b, n // (N // K), seen] @ q[b, t, n] / H**0.5
    weights = np.exp(scores - scores.max())
    out[b, t, n] = weights / weights.sum() @ v[b, n // (N // K), seen]
  return out


def test_a_query_sees_its_own_document_up_to_itself():
  mask = attention.attention_mask(*map(jnp.array, (POSITIONS, POSITIONS, SEGMENTS, SEGMENTS)))
  drawn = ["".join("x" if seen else "." for seen in row) for row in np.asarray(mask[0])]
  assert drawn == [
    "x......",
    "xx.....",
    "xxx....",
    "...x...",
    "...xx..",
    ".....x.",
    "......x",
  ]
  assert np.array_equal(mask[1], np.tri(T, dtype=bool))


def test_grouped_queries_attend_as_written_out_by_hand():
  np.testing.assert_allclose(_attend(*_qkv()), _by_hand(*_qkv()), atol=2e-6)


def test_scores_of_thousands_neither_overflow_nor_leak():
  q, k, v = _qkv(scale=60.0)
  np.testing.assert_allclose(_attend(q, k, v), _by_hand(q, k, v), rtol=1e-4, atol=1e-3)


def test_bfloat16_inputs_lose_no_more_than_their_own_rounding():
  q, k, v = _qkv(dtype=jnp.bfloat16)
  out = _attend(q, k, v)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(out), _by_hand(q, k, v), atol=0.03)


def test_without_segments_a_row_is_one_document():
  q, k, v = _qkv()
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  whole = _attend(q, k, v, segments=None, positions=positions)
  np.testing.assert_array_equal(
    whole, _attend(q, k, v, segments=np.ones_like(SEGMENTS), positions=positions)
  )


def test_an_implementation_that_cannot_separate_documents_refuses_them():
  with pytest.raises(ValueError, match=r"'cudnn' takes neither segment ids.*attention='xla'"):
    _attend(*_qkv(), implementation="cudnn")


def test_an_implementation_that_cannot_use_a_cache_refuses_it():
  q, k, v = _qkv()
  with pytest.raises(ValueError, match="'cudnn' takes neither"):
    attention.attend(
      q[:, :1],
      k,
      v,
      query_positions_BT=jnp.array(POSITIONS[:, :1]),
      key_positions_BS=jnp.array(POSITIONS),
      query_segments_BT=None,
      key_segments_BS=None,
      implementation="cudnn",
    )


def test_an_unknown_implementation_is_refused_with_the_known_ones():
  with pytest.raises(ValueError, match=r"'flash'.*'xla', 'cudnn'"):
    _attend(*_qkv(), implementation="flash")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
def test_cudnn_agrees_with_xla_on_rows_of_one_document():
  r = np.random.default_rng(0)
  shapes = ((2, 64, 4, 64), (2, 2, 64, 64), (2, 2, 64, 64))
  q, k, v = (jnp.array(r.normal(size=shape), jnp.bfloat16) for shape in shapes)
  positions = np.broadcast_to(np.arange(64, dtype=np.int32), (2, 64))
  outs = [
    np.float32(_attend(q, k, v, segments=None, positions=positions, implementation=name))
    for name in ("xla", "cudnn")
  ]
  np.testing.assert_allclose(*outs, atol=0.03)
