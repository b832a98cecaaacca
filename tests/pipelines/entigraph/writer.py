"""How a server writes synthetic texts about the documents of conftest.py, for tests."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from tests.language_models.conftest import Call, Said, say
from tests.pipelines.entigraph.conftest import ENTITIES

STAGES = ("sources", "generator", "entities", "relations", "rephrasings")
PRICES = {"input_usd_per_million": 1000.0, "output_usd_per_million": 2000.0}  # 0.02 for each call


def tag(call: Call) -> str:
  """Returns a word that stands for what was asked; the reply contains it."""
  return hashlib.sha256(json.dumps(call.body, sort_keys=True).encode()).hexdigest()[:12]


def document(call: Call) -> str:
  """Returns the id of the document that a call is about."""
  return next(name for name in ENTITIES if call.asked.startswith(f"Title: The {name}\n"))


def behave(call: Call, refuses: Callable[[Call], bool]) -> Said:
  """Returns a list of entities or a text; or a list of one entity, or a refusal."""
  refused = refuses(call)
  if "response_format" in call.body:
    entities = ENTITIES[document(call)]
    listed = [entities[0], entities[0].upper()] if refused else entities
    return say(json.dumps({"summary": f"Summary {tag(call)}.", "entities": listed}))
  return say(f"I'm sorry, but I cannot. {tag(call)}" if refused else f"A text about {tag(call)}.")


def page(values: Mapping[str, Any], url: str, cache: str) -> dict[str, Any]:
  """Returns a page whose generator is an endpoint."""
  changed = json.loads(json.dumps(values))
  endpoint = {"model": "some-model", "cache": cache, "max_concurrent": 4, **PRICES}
  changed["generator"] = {"kind": "endpoint", "url": url, "endpoint": endpoint}
  changed["synthesis"]["generation"]["max_attempts"] = 2
  return changed
