import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.models import cpu, devices, llama
from selfimprove_jax.runtime import partitioning


def _normal(*shape):
  return jnp.array(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
  ("num_tokens", "tensor", "num_products"),
  [(16, 1, 1), (4, 1, 2), (16, 2, 2)],
  ids=["many tokens", "few tokens", "sharded heads"],
)
def test_projections_are_joined_where_it_pays_and_give_the_same(num_tokens, tensor, num_products):
  x_BTD, weights = _normal(2, num_tokens, 8), (_normal(8, 4, 2), _normal(8, 6))
  project_each = jax.jit(lambda x, *w: cpu.project_each(x, *w))
  with jax.set_mesh(partitioning.make_mesh(data=-1, fsdp=1, tensor=tensor)):
    found = project_each(x_BTD, *weights)
    lowered = project_each.lower(x_BTD, *weights).as_text()
  assert lowered.count("dot_general") == num_products
  for a, weight in zip(found, weights, strict=True):
    np.testing.assert_allclose(a, llama.project(x_BTD, weight), atol=1e-5)


@pytest.mark.parametrize(
  ("function", "subscripts", "shapes"),
  [
    (cpu.scores, "BKGTH,BKSH->BKGTS", [(2, 2, 3, 5, 4), (2, 2, 7, 4)]),
    (cpu.weighted_sum, "BKGTS,BKSH->BKGTH", [(2, 2, 3, 5, 7), (2, 2, 7, 4)]),
  ],
)
def test_the_written_gradients_of_attention_are_those_of_the_einsum(function, subscripts, shapes):
  factors = [_normal(*shape) for shape in shapes]
  weights = _normal(*jnp.einsum(subscripts, *factors).shape)

  def gradients(product):
    loss = lambda *factors: jnp.sum(product(*factors) * weights)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*factors)

  expected = gradients(lambda *factors: jnp.einsum(subscripts, *factors))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4),
    gradients(function),
    expected,
  )


def test_only_auto_follows_the_devices():
  assert devices.platform() == "cpu"
  assert [cpu.is_chosen(name) for name in ("auto", "cpu", "xla", "splash")] == [True, True] + [
    False
  ] * 2
