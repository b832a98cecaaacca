"""The persistent cache of programs that XLA compiled."""

import os
import pathlib

DEFAULT_FOLDER = str(pathlib.Path("~/.cache/selfimprove_jax/xla").expanduser())
_MAX_BYTES = 8 * 2**30
_MIN_COMPILE_SECONDS = 0.5


def keep_in(folder: str) -> None:
  """Sets the folder of JAX's cache, for this process and those that it starts.

  Settings in the environment win.

  Args:
    folder: local or gs://; empty for no cache.
  """
  import jax

  if folder:
    for option, value in {
      "jax_compilation_cache_dir": folder,
      "jax_compilation_cache_max_size": _MAX_BYTES,
      "jax_persistent_cache_min_compile_time_secs": _MIN_COMPILE_SECONDS,
    }.items():
      if option.upper() not in os.environ:
        os.environ[option.upper()] = str(value)
        jax.config.update(option, value)
