import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfimprove_jax.data import packing, rows
from selfimprove_jax.models import llama
from selfimprove_jax.training import optimizer, train_step

SEQ_LEN = 16
CONFIG = llama.LlamaConfig(
  vocab_size=32,
  num_layers=2,
  embed_dim=16,
  mlp_dim=32,
  num_heads=8,
  num_kv_heads=4,
  head_dim=4,
  dropout_rate=0.1,
  dtype="float32",
)


LEARNING_RATE = optimizer.warmup_cosine(peak_lr=1e-2, final_lr=1e-3, warmup_steps=2, num_steps=20)
# With a small eps AdamW makes full steps of the rounding noise in gradients near 0.
TX = optimizer.adamw(LEARNING_RATE, weight_decay=0.1, b1=0.9, b2=0.95, eps=1e-3, clip_norm=1.0)


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a training step is made of; what was compiled for it is kept."""

  model: llama.Llama
  learning_rate = staticmethod(LEARNING_RATE)
  tx = TX

  def state(self, mesh, seed=0):
    """A fresh state, which may be donated."""
    return jax.tree.map(jnp.copy, self._state(mesh, seed))

  @functools.cache  # noqa: B019
  def _state(self, mesh, seed):
    return train_step.init_state(self.model, self.tx, mesh, key=jax.random.key(seed))

  def abstract(self, mesh):
    return train_step.abstract_state(self.model, self.tx, mesh)

  @functools.cache  # noqa: B019
  def step_fn(self, mesh, accumulation_steps=1):
    return train_step.make_train_step(
      self.model, self.tx, self.learning_rate, mesh, accumulation_steps=accumulation_steps
    )


@pytest.fixture(scope="session")
def make_setup():
  return lambda **changes: Setup(llama.Llama(dataclasses.replace(CONFIG, **changes)))


@pytest.fixture(scope="session")
def packed_rows() -> list[packing.Row]:
  """Rows of documents of 3 to 12 random tokens."""
  r = np.random.default_rng(0)
  lengths = r.integers(3, 12, 120)
  examples = (
    packing.Example(r.integers(0, CONFIG.vocab_size, n).astype(np.int32), np.ones(n, bool))
    for n in lengths
  )
  return list(packing.pack(examples, seq_len=SEQ_LEN, pad_id=0))


@pytest.fixture(scope="session")
def batches(packed_rows):
  """Batches of 8 rows on the host."""
  return [
    {name: np.stack([row[name] for row in packed_rows[i : i + 8]]) for name in packed_rows[0]}
    for i in range(0, len(packed_rows) - 7, 8)
  ]


@pytest.fixture(scope="session")
def source(packed_rows, tmp_path_factory) -> rows.RowSource:
  path = tmp_path_factory.mktemp("rows") / "00000-of-00001.array_record"
  counts = rows.write_rows(path, packed_rows)
  return rows.RowSource([path], counts=[counts], seq_len=SEQ_LEN)
