"""How much of SBP's training tokens should be synthetic: three shares, each with two seeds."""

from experiments.launcher.experiment import Experiment
from experiments.launcher.resource import cpu

# The config samples 43% of the training tokens, so that no share repeats the synthetic text.
_SHARES = (0.125, 0.25, 0.375)


def get_experiment() -> Experiment:
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
