"""Where what XLA compiled is kept between runs."""

import os
import pathlib

DEFAULT_FOLDER = str(pathlib.Path("~/.cache/selfimprove_jax/xla").expanduser())
_MOST_BYTES = 8 * 2**30
_LEAST_SECONDS = 0.5


def keep_in(folder: str) -> None:
  """Tells JAX, before it is imported, and the processes that this one starts.

  What the environment says already stands.

  Args:
    folder: empty for none.
  """
  if folder:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_MOST_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(_LEAST_SECONDS))
