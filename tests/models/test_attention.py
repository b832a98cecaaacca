import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.models import attention, kernels
from selfimprove_jax.runtime import partitioning

B, T, N, K, H = 2, 7, 4, 2, 6
PLAIN = ("xla", "cpu")
SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]], np.int32)


def _qkv(scale=1.0, dtype=np.float32):
  r = np.random.default_rng(0)
  shapes = ((B, T, N, H), (B, K, T, H), (B, K, T, H))
  return [jnp.array(scale * r.normal(size=shape), dtype) for shape in shapes]


def _attend(q, k, v, *, segments=SEGMENTS, positions=POSITIONS, implementation):
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


@pytest.mark.parametrize("implementation", PLAIN)
def test_grouped_queries_attend_as_written_out_by_hand(implementation):
  found = _attend(*_qkv(), implementation=implementation)
  np.testing.assert_allclose(found, _by_hand(*_qkv()), atol=2e-6)


@pytest.mark.parametrize("implementation", PLAIN)
def test_scores_of_thousands_neither_overflow_nor_leak(implementation):
  q, k, v = _qkv(scale=60.0)
  found = _attend(q, k, v, implementation=implementation)
  np.testing.assert_allclose(found, _by_hand(q, k, v), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("implementation", PLAIN)
def test_bfloat16_inputs_lose_no_more_than_their_own_rounding(implementation):
  q, k, v = _qkv(dtype=jnp.bfloat16)
  out = _attend(q, k, v, implementation=implementation)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(out), _by_hand(q, k, v), atol=0.03)


def test_without_segments_a_row_is_one_document():
  q, k, v = _qkv()
  positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  attend = functools.partial(_attend, q, k, v, positions=positions, implementation="xla")
  whole = attend(segments=None)
  np.testing.assert_array_equal(whole, attend(segments=np.ones_like(SEGMENTS)))


def _packed(T, documents, padding):
  """Segments and positions of two rows: these documents and padding, and one whole document."""
  segments = np.ones((2, T), np.int32)
  positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
  lengths = [*documents, padding]
  assert sum(lengths) == T
  segments[0] = np.repeat([*range(1, len(documents) + 1), 0], lengths)
  positions[0] = np.concatenate([np.arange(length) for length in lengths])
  return segments, positions


def _forward_and_gradients(implementation, *, T, K, segments, positions, dtype=jnp.float32):
  """The context, and the gradients by q, k, v of a fixed weighting of it; padding weighs 0."""
  r = np.random.default_rng(0)
  shapes = ((2, T, 4, 8), (2, K, T, 8), (2, K, T, 8))
  qkv = tuple(jnp.array(r.normal(size=shape), dtype) for shape in shapes)
  weights = np.float32(r.normal(size=shapes[0]))
  if segments is not None:
    weights = weights * (segments > 0)[:, :, None, None]

  def weighted(q, k, v):
    out = _attend(
      q, k, v, segments=segments, positions=positions, implementation=implementation
    ).astype(jnp.float32)
    return jnp.sum(out * weights), out * (weights != 0)

  both = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
  (_, out), gradients = both(*qkv)
  return (out, *gradients)


# 384 positions are three tiles of the kernels; 300 are padded to three. Documents end within a tile
# and at the end of one, and one is longer than a tile.
_ROWS = {
  "packed": dict(T=384, documents=(100, 28, 200), padding=56),
  "packed, not in tiles": dict(T=300, documents=(90, 150), padding=60),
  "one document per row": dict(T=256, documents=None, padding=0),
}


@pytest.mark.parametrize(
  ("rows", "num_kv_heads"),
  [
    ("packed, not in tiles", 1),
    pytest.param("packed", 2, marks=pytest.mark.slow),
    pytest.param("one document per row", 4, marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("implementation", ["cpu", "splash", "pallas_gpu"])
def test_every_implementation_agrees_with_xla_forward_and_backward(
  implementation, rows, num_kv_heads
):
  row = _ROWS[rows]
  segments, positions = _packed(row["T"], row["documents"] or (row["T"],), row["padding"])
  arguments = dict(T=row["T"], K=num_kv_heads, positions=positions)
  arguments["segments"] = None if row["documents"] is None else segments
  found = _forward_and_gradients(implementation, **arguments)
  expected = _forward_and_gradients("xla", **arguments)
  for name, a, b in zip(("context", "dq", "dk", "dv"), found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
  "implementation", ["splash", pytest.param("pallas_gpu", marks=pytest.mark.slow)]
)
def test_a_kernel_on_a_mesh_gives_what_it_gives_on_one_device(implementation):
  segments, positions = _packed(128, (50, 70), 8)
  arguments = dict(T=128, K=2, segments=segments, positions=positions)
  mesh = partitioning.make_mesh(dcn=2, data=1, fsdp=1, tensor=2, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    on_mesh = jax.jit(lambda: _forward_and_gradients(implementation, **arguments))()
  for a, b in zip(on_mesh, _forward_and_gradients(implementation, **arguments), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
    assert {s.data.shape[0] for s in on_mesh[0].addressable_shards} == {1}


@pytest.mark.parametrize("rows", ["packed", "one document per row"])
@pytest.mark.parametrize("implementation", PLAIN)
def test_blocks_of_queries_change_no_number(monkeypatch, rows, implementation):
  monkeypatch.setattr(attention, "QUERY_BLOCK", 64)
  T = 150  # not a multiple of the block
  segments, positions = _packed(
    T, (60, 80) if rows == "packed" else (T,), T - 140 if rows == "packed" else 0
  )
  arguments = dict(T=T, K=2, positions=positions, segments=segments if rows == "packed" else None)
  whole = _forward_and_gradients(implementation, **arguments)
  monkeypatch.setattr(attention, "BLOCK_QUERIES_FROM", 128)
  for a, b in zip(_forward_and_gradients(implementation, **arguments), whole, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("implementation", PLAIN)
def test_rows_of_4096_never_have_all_their_scores_in_memory(implementation):
  T, heads = 4096, 4

  def loss(q, k, v, segments):
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    out = _attend(q, k, v, segments=segments, positions=positions, implementation=implementation)
    return jnp.sum(out.astype(jnp.float32))

  shapes = ((1, T, heads, 64), (1, heads, T, 64), (1, heads, T, 64))
  qkv = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  segments = jax.ShapeDtypeStruct((1, T), jnp.int32)
  compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*qkv, segments).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < heads * T * T * 4  # scores, in float32


def test_a_cache_is_read_with_any_implementation_that_takes_one():
  q, k, v = _qkv()
  outs = [
    attention.attend(
      q[:, 4:5],
      k,
      v,
      query_positions_BT=jnp.full((B, 1), 4),
      key_positions_BS=jnp.broadcast_to(jnp.arange(T), (B, T)),
      query_segments_BT=None,
      key_segments_BS=None,
      implementation=implementation,
    )
    for implementation in ("xla", "cpu", "auto", "splash", "pallas_gpu")
  ]
  for out in outs[1:]:
    np.testing.assert_array_equal(out, outs[0])


_KERNEL = dict(T=4096, N=24, K=8, H=128)


@pytest.mark.parametrize(
  ("platform", "changes", "chosen"),
  [
    ("tpu", {}, "splash"),
    ("tpu", {"is_packed": False}, "splash"),
    ("tpu", {"T": 100}, "xla"),
    ("tpu", {"S": 8192}, "xla"),
    ("gpu", {}, "pallas_gpu"),
    ("gpu", {"is_packed": False}, "cudnn"),
    ("gpu", {"is_packed": False, "H": 256}, "xla"),
    ("gpu", {"dtype": jnp.float32}, "xla"),
    ("cpu", {}, "cpu"),
    ("cpu", {"S": 8192}, "cpu"),
  ],
)
def test_auto_chooses_by_the_device_and_the_rows(platform, changes, chosen):
  c = {**_KERNEL, "is_packed": True, "dtype": jnp.bfloat16, **changes}
  q = jax.ShapeDtypeStruct((2, c["T"], c["N"], c["H"]), c["dtype"])
  k = jax.ShapeDtypeStruct((2, c["K"], c.get("S", c["T"]), c["H"]), c["dtype"])
  assert attention._choose(q, k, is_packed=c["is_packed"], platform=platform) == chosen


def test_the_gpu_kernel_is_lowered_for_cuda_without_a_gpu():
  def loss(q, k, v, segments):
    kernel, _ = kernels.KERNELS["pallas_gpu"]
    out = kernels.tiled(functools.partial(kernel, interpret=False), q, k, v, segments)
    return jnp.sum(out.astype(jnp.float32))

  shapes = ((2, 512, 4, 128), (2, 2, 512, 128), (2, 2, 512, 128))
  qkv = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  segments = jax.ShapeDtypeStruct((2, 512), jnp.int32)
  device = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
  )
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*qkv, segments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  for kernel in ("mha_forward", "mha_preprocess_backward", "mha_backward"):
    assert kernel in text


def test_an_implementation_that_cannot_separate_documents_refuses_them():
  with pytest.raises(ValueError, match=r"'cudnn' takes neither segment ids.*attention='auto'"):
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
