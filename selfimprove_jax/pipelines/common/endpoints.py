"""Evaluates a model behind an OpenAI-compatible endpoint."""

import functools
from typing import Annotated, Any

from pydantic import Field

from selfimprove_jax.language_models.chat_api import Prices
from selfimprove_jax.language_models.endpoint import Endpoint
from selfimprove_jax.language_models.openai_client import Limits
from selfimprove_jax.language_models.store import CallStore
from selfimprove_jax.runs.stage import Context
from selfimprove_jax.runtime.config import section


@section
class EndpointConfig:
  """Names a model behind an endpoint, whose address is the config's `checkpoint`.

  Its `/completions` must return the log-probabilities of a prompt (`echo` with `logprobs`).

  Attributes:
    model: its name there.
    api_key_env: environment variable with the key; empty if none is needed.
    cache: SQLite file of answers and their prices, which later runs share.
    max_usd: hard cap on the price of all calls in the cache; None for none.
  """

  model: str = ""
  api_key_env: str = ""
  cache: str = "evaluation_calls.sqlite"
  input_usd_per_million: Annotated[float, Field(ge=0)] = 0.0
  output_usd_per_million: Annotated[float, Field(ge=0)] = 0.0
  max_usd: float | None = None
  max_concurrent: Annotated[int, Field(ge=1)] = 16
  requests_per_minute: float | None = None


def is_url(checkpoint: str) -> bool:
  return checkpoint.startswith(("http://", "https://"))


@section
class AddressConfig:
  """Configures the stage `checkpoint` for an endpoint."""

  url: str
  model: str


def endpoint(context: Context, config: AddressConfig) -> dict[str, Any]:
  """Records which model behind which endpoint is evaluated."""
  del context  # the artifact is its summary
  return {"path": config.url, "kind": "endpoint", "model": config.model}


@functools.lru_cache(maxsize=1)
def connect(url: str, config: EndpointConfig) -> Endpoint:
  """Opens the cache and returns the model; stages of one process share it.

  Raises:
    ValueError: the key is missing.
  """
  return Endpoint(
    url,
    config.model,
    store=CallStore(config.cache, max_usd=config.max_usd),
    prices=Prices(config.input_usd_per_million, config.output_usd_per_million),
    api_key_env=config.api_key_env or None,
    limits=Limits(
      max_concurrent=config.max_concurrent, requests_per_minute=config.requests_per_minute
    ),
  )
