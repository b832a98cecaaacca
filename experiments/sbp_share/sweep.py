"""How much of SBP's training tokens should be synthetic: three shares, each with two seeds."""

from selfimprove_jax.launch.experiment import Experiment
from selfimprove_jax.launch.resource import cpu

# The config samples 43% of the training tokens, so no share repeats the synthetic text.
_SHARES = (0.125, 0.25, 0.375)


def get_experiment() -> Experiment:
  """Returns the sweep: synthetic shares of SBP and of unconditional samples, times seeds."""
  return Experiment(
    name="sbp_share",
    config="configs/sbp_quick.py",
    arms={
      f"synthetic{round(1000 * share)}": {
        "arms.sbp.mixture.sbp": share,
        "arms.sbp.mixture.unique": 1 - share,
        "arms.unconditional.mixture.unconditional": share,
        "arms.unconditional.mixture.unique": 1 - share,
      }
      for share in _SHARES
    },
    seeds=(0, 1),
    resource=cpu(cpus=2, memory_gib=8, hours=1.0),
  )
