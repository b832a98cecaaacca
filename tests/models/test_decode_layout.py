"""The form to sample with computes the same as the stacked one, on one device and on a mesh."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.models import llama
from selfimprove_jax.models.decode_layout import DecodeLlama, decode_config, decode_params
from selfimprove_jax.models.llama import Llama, abstract_params, init_params
from selfimprove_jax.runtime import partitioning

OURS = llama.LlamaConfig(
  vocab_size=48,
  num_layers=2,
  embed_dim=24,
  mlp_dim=40,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  rope_theta=1234.0,
  dtype="float32",
)
CONFIGS = {
  "ours": OURS,
  "qwen2": dataclasses.replace(OURS, qk_norm=False, qkv_bias=True),
  "untied": dataclasses.replace(OURS, tie_embeddings=False),
  "one kv head": dataclasses.replace(OURS, num_kv_heads=1),
  "no grouping": dataclasses.replace(OURS, num_kv_heads=4),
  "trained with remat": dataclasses.replace(OURS, dropout_rate=0.1, remat="full"),
}
B, T = 2, 7


@functools.cache
def _params(config):
  """Random parameters, norms and biases too, so that a swapped or unused one shows."""
  params = nn.unbox(jax.jit(functools.partial(init_params, Llama(config)))(jax.random.key(0)))
  r = np.random.default_rng(1)
  return jax.tree.map(lambda x: jnp.array(x + 0.2 * r.normal(size=x.shape), jnp.float32), params)


def _logits(model, params, mesh):
  tokens = jnp.array(np.random.default_rng(0).integers(0, model.c.vocab_size, (B, T)), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))

  def apply(params):
    with partitioning.axis_rules():
      return model.apply({"params": params}, tokens, positions)[0]

  with jax.set_mesh(mesh):
    return np.asarray(jax.jit(apply)(params))


@pytest.mark.parametrize(
  "name",
  ["ours", "qwen2", *(pytest.param(n, marks=pytest.mark.slow) for n in [*CONFIGS][2:])],
)
def test_decode_parameters_give_the_logits_of_the_stacked_ones(name, one_device_mesh):
  config = CONFIGS[name]
  params = _params(config)
  flat = decode_params(params, config, one_device_mesh)
  expected = _logits(Llama(config), params, one_device_mesh)
  assert expected.std() > 0.3
  found = _logits(DecodeLlama(decode_config(config)), flat, one_device_mesh)
  np.testing.assert_allclose(found, expected, atol=2e-5)
  assert sum(x.size for x in jax.tree.leaves(flat)) == config.num_parameters


def test_bfloat16_halves_the_parameters_and_rounds_as_the_stacked_form(one_device_mesh):
  config = dataclasses.replace(OURS, dtype="bfloat16")
  params = _params(OURS)
  flat = decode_params(params, config, one_device_mesh)
  assert {x.dtype for x in jax.tree.leaves(flat)} == {jnp.dtype("bfloat16")}
  found = _logits(DecodeLlama(decode_config(config)), flat, one_device_mesh)
  assert found.dtype == np.float32
  scale = _logits(Llama(OURS), params, one_device_mesh).std()
  expected = _logits(Llama(config), params, one_device_mesh)
  assert np.abs(found - expected).max() < 0.1 * scale
  # Both forms round at the same places, so they are equally near to float32.
  exact = _logits(Llama(OURS), params, one_device_mesh)
  assert (found - exact).std() < 1.2 * (expected - exact).std() < 0.03 * scale


@pytest.mark.parametrize("name", [pytest.param("ours", marks=pytest.mark.slow), "qwen2"])
def test_a_mesh_holds_shards_of_the_parameters_and_computes_the_same(name, one_device_mesh):
  config = CONFIGS[name]
  mesh = partitioning.make_mesh(data=2, fsdp=2, tensor=2)
  boxed = jax.eval_shape(functools.partial(init_params, Llama(config)), jax.random.key(0))
  params = jax.device_put(_params(config), partitioning.param_shardings(boxed, mesh))
  flat = decode_params(params, config, mesh)
  described = abstract_params(DecodeLlama(decode_config(config)), mesh)
  jax.tree.map(
    lambda x, abstract: np.testing.assert_equal(
      (x.shape, x.dtype, x.sharding.is_equivalent_to(abstract.sharding, x.ndim)),
      (abstract.shape, abstract.dtype, True),
    ),
    flat,
    described,
  )
  joined = flat["layers_1"]["attention"]["wqkv_DKJH"]
  D, K, J, H = joined.shape
  assert joined.addressable_shards[0].data.shape == (D // 2, K // 2, J, H)
  expected = _logits(Llama(config), _params(config), one_device_mesh)
  found = _logits(DecodeLlama(decode_config(config)), flat, mesh)
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_boxed_parameters_are_accepted(one_device_mesh):
  boxed = jax.jit(functools.partial(init_params, Llama(OURS)))(jax.random.key(0))
  found = decode_params(boxed, OURS, one_device_mesh)
  expected = decode_params(nn.unbox(boxed), OURS, one_device_mesh)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
