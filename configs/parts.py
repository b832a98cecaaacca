"""Sections that configs share: functions to plain dicts of some function's arguments."""

_SHAPES = {
  # name: layers, width, feed-forward, heads, kv heads, head width
  "tiny": (2, 32, 64, 2, 1, 16),
  "0.5m": (4, 96, 256, 4, 4, 24),
  "1m": (4, 128, 344, 4, 4, 32),
  "3b": (26, 3072, 8064, 24, 8, 128),  # of SBP; recalled, unverified
  "6b": (32, 4096, 11008, 32, 8, 128),  # of SBP; a guess that has about the right size
  "llama3_8b": (32, 4096, 14336, 32, 8, 128),
}


def llama(shape: str, *, vocab_size: int, dtype: str, rope_theta: float, **options) -> dict:
  """`LlamaConfig` of a named size; with QK-norm and a tied head unless `options` say otherwise."""
  layers, width, mlp, heads, kv_heads, head_dim = _SHAPES[shape]
  return dict(
    vocab_size=vocab_size,
    num_layers=layers,
    embed_dim=width,
    mlp_dim=mlp,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    dtype=dtype,
    rope_theta=rope_theta,
    **options,
  )


def training(*, batch_rows: int, seq_len: int, peak_lr: float, final_lr: float, **changes) -> dict:
  """AdamW with 5% warm-up and a cosine, and how often a run is looked at and saved.

  `skip_spikes` may be a dict of `window` and `num_deviations`; see `training.optimizer`.
  """
  settings = dict(
    batch_rows=batch_rows,
    seq_len=seq_len,
    peak_lr=peak_lr,
    final_lr=final_lr,
    warmup_fraction=0.05,
    optimizer="adamw",
    momentum_dtype="float32",
    skip_spikes=None,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    clip_norm=1.0,
    accumulation_steps=1,
    num_evaluations=10,
    num_checkpoints=4,
    keep=2,
    patience=None,
    board_every=10,
  )
  if unknown := changes.keys() - settings.keys():
    raise TypeError(f"training has no settings {sorted(unknown)}")
  return settings | changes


def arm(
  label: str,
  mixture: dict[str, float],
  *,
  weight_decay: float,
  dropout_rate: float,
  all_in_of: str | None = None,
) -> dict:
  """One arm of a comparison.

  `all_in_of` gives it as many FLOPs as that arm took all-in, instead of as many tokens.
  """
  return dict(
    label=label,
    mixture=mixture,
    weight_decay=weight_decay,
    dropout_rate=dropout_rate,
    all_in_of=all_in_of,
  )
