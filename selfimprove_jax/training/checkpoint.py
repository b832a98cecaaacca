"""Checkpoints of the training state, through orbax; the only file that knows orbax.

A step is committed by a rename (in an object store by a last object), so a killed save leaves
nothing that looks like a checkpoint. With each step goes a checksum of every leaf, compared on
reading: damage that the file format does not notice is noticed here, and the step before is used.
"""

import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from selfimprove_jax import storage
from selfimprove_jax.models.checksums import DamagedCheckpointError, checksums
from selfimprove_jax.training.train_step import TrainState

_logger = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints of one run: `folder/<step>/`."""

  def __init__(self, folder: str | os.PathLike, *, keep: int | None):
    """Opens or creates the folder.

    Args:
      keep: how many of the last steps stay, beside those that `save` was told to protect; one more
        while a new one is being written. None only reads, and leaves the folder as it is.

    Raises:
      ValueError: `keep` is below 1.
    """
    if keep is not None and keep < 1:
      raise ValueError(f"keep={keep} must be at least 1: a run goes on from its last checkpoint")
    self._keep = keep
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
    """Starts to write a step; of those on disk only the last `keep` and `protect` stay.

    Returns once the state may be donated; `wait` returns once it is on disk.
    """
    step = int(state.step)
    self._protected = protect
    if step in self._manager.all_steps():
      return
    # Not after: until the new one is on disk, an old one is all there is.
    self.wait()
    if jax.default_backend() == "cpu":
      # Orbax would read the live buffers, which the next step is allowed to overwrite.
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
    """The newest state that is whole, on the shardings of `abstract`; None if there is none.

    Damaged steps are reported, and set aside as `<step>.damaged`.
    """
    for step in reversed(self.steps()):
      try:
        return self._restore(step, abstract)
      except DamagedCheckpointError as error:
        _logger.warning("%s; going back to the checkpoint before it", error)
        self._set_aside(step)
    return None

  def _set_aside(self, step: int) -> None:
    # Not deleted: what could not be read now (too little memory, a network disk) may be whole.
    path = self._path(step)
    if jax.process_index() == 0:
      storage.move(path, path.with_name(f"{step}.damaged"))
    multihost_utils.sync_global_devices("checkpoint set aside")
    self._manager.reload()

  def _restore(self, step: int, abstract: TrainState) -> TrainState:
    optimizer = {"opt_state": abstract.opt_state, "step": abstract.step}
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardRestore(abstract.params),
          optimizer=ocp.args.StandardRestore(optimizer),
          checksums=ocp.args.JsonRestore(),
        ),
      )
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
      raise DamagedCheckpointError(
        f"checkpoint {self._path(step)} can't be read: {error}"
      ) from error
    self._compare(step, "params", restored.params, restored.checksums)
    self._compare(step, "optimizer", restored.optimizer, restored.checksums)
    return TrainState(
      step=restored.optimizer["step"],
      params=restored.params,
      opt_state=restored.optimizer["opt_state"],
    )

  def restore_params(self, step: int, abstract_params: Any) -> Any:
    """The parameters of one step, on the shardings of `abstract_params`.

    Raises:
      DamagedCheckpointError: the step is missing, can't be read or is not what was saved.
    """
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardRestore(abstract_params), checksums=ocp.args.JsonRestore()
        ),
      )
    except Exception as error:
      raise DamagedCheckpointError(
        f"checkpoint {self._path(step)} can't be read: {error}"
      ) from error
    self._compare(step, "params", restored.params, restored.checksums)
    return restored.params

  def _compare(self, step, part, tree, saved):
    if saved.get(part) != checksums(tree):
      raise DamagedCheckpointError(
        f"checkpoint {self._path(step)} is damaged: checksums of {part} are not those saved"
      )

  def _path(self, step):
    return self._manager.directory / str(step)

  def wait(self) -> None:
    """Returns when everything saved is on disk; raises what the writing raised."""
    self._manager.wait_until_finished()
    if self._protected is not None:
      for old in self.steps()[: -self._keep]:
        if old not in self._protected:
          self._manager.delete(old)

  def delete_after(self, step: int) -> None:
    """Deletes checkpoints beyond a step."""
    for later in self.steps():
      if later > step:
        self._manager.delete(later)

  def close(self) -> None:
    self.wait()
    self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
