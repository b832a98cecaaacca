"""Checkpoints of the training state, through orbax, with a checksum of every array.

Orbax commits a step by a rename (in an object store by a last object), so a killed save leaves
nothing that looks like a checkpoint. The checksums reveal damage that the file format does not
notice; a damaged step is set aside, and the one before it is used.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from selfimprove_jax.models.checksums import DamagedCheckpointError, checksums
from selfimprove_jax.runs import storage
from selfimprove_jax.training.train_step import TrainState

_logger = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints of one run: `folder/<step>/`."""

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    keep: int | None,
    is_regular: Callable[[int], bool] = lambda step: True,
  ):
    """Opens or creates the folder.

    Args:
      keep: steps that stay on disk, the newest ones, not counting those that `save` protects; while
        a step is written, one more stays. None only reads, and changes nothing in the folder.
      is_regular: steps of which this is false, such as the one at which a run was interrupted, stay
        only until a newer one is on disk. So an interrupted run ends with the same steps.
    """
    self._keep = keep
    self._is_regular = is_regular
    self._protected: frozenset[int] | None = None  # None: nothing was saved, so nothing is deleted
    options = ocp.CheckpointManagerOptions(
      enable_async_checkpointing=True, cleanup_tmp_directories=keep is not None
    )
    folder = storage.path(folder)
    if not storage.is_remote(folder):
      folder = folder.absolute()
    self._manager = ocp.CheckpointManager(folder, options=options)

  def steps(self) -> list[int]:
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, *, protect: frozenset[int] = frozenset()) -> None:
    """Starts to write a step; deletes all others but the last regular ones and `protect`.

    Returns when the state may be donated; `wait` returns when it is on disk.
    """
    step = int(state.step)
    self._protected = protect
    if step in self._manager.all_steps():
      return
    # Old steps are deleted here, not after this save has started: until it is on disk, they are all
    # there is.
    self.wait()
    if jax.default_backend() == "cpu":
      # On CPUs orbax reads the live buffers, which the next step may overwrite.
      state = jax.tree.map(jnp.copy, state)
    optimizer = {"opt_state": state.opt_state, "step": state.step}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave(optimizer),
        checksums=ocp.args.JsonSave(
          {"params": checksums(state.params), "optimizer": checksums(optimizer)}
        ),
      ),
    )

  def restore_last(self, abstract: TrainState) -> TrainState | None:
    """Restores the newest undamaged state onto the shardings of `abstract`; None if there is none.

    Damaged steps are reported, and renamed to `<step>.damaged`.
    """
    optimizer = {"opt_state": abstract.opt_state, "step": abstract.step}
    for step in reversed(self.steps()):
      try:
        params, restored = self._restore(step, params=abstract.params, optimizer=optimizer)
      except DamagedCheckpointError as error:
        _logger.warning("%s; going back to the checkpoint before it", error)
        self._set_aside(step)
      else:
        return TrainState(restored["step"], params, restored["opt_state"])
    return None

  def restore_params(self, step: int, abstract_params: Any) -> Any:
    """Restores the parameters of one step onto the shardings of `abstract_params`.

    Raises:
      DamagedCheckpointError: the step is missing, can't be read or is not what was saved.
    """
    (params,) = self._restore(step, params=abstract_params)
    return params

  def _restore(self, step: int, **parts: Any) -> list[Any]:
    path = self._manager.directory / str(step)
    arguments = {name: ocp.args.StandardRestore(abstract) for name, abstract in parts.items()}
    try:
      restored = self._manager.restore(
        step, args=ocp.args.Composite(**arguments, checksums=ocp.args.JsonRestore())
      )
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
      raise DamagedCheckpointError(f"checkpoint {path} can't be read: {error}") from error
    for name in parts:
      if restored.checksums.get(name) != checksums(restored[name]):
        raise DamagedCheckpointError(
          f"checkpoint {path} is damaged: the checksums of its {name} differ from those saved"
        )
    return [restored[name] for name in parts]

  def _set_aside(self, step: int) -> None:
    # Not deleted: a step that can't be read now (too little memory, a network disk) may be whole.
    path = self._manager.directory / str(step)
    if jax.process_index() == 0:
      storage.move(path, path.with_name(f"{step}.damaged"))
    multihost_utils.sync_global_devices("checkpoint set aside")
    self._manager.reload()

  def wait(self) -> None:
    """Returns when everything saved is on disk; raises what the writing thread raised."""
    self._manager.wait_until_finished()
    if self._protected is not None:
      steps = self.steps()
      regular = [step for step in steps if self._is_regular(step)]
      kept = {*regular[-self._keep :], *steps[-1:], *self._protected}
      for old in sorted(set(steps) - kept):
        self._manager.delete(old)

  def close(self) -> None:
    self.wait()
    self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
