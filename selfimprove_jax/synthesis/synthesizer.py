"""Turns units of any kind into requests, and the replies into records."""

import types
from collections.abc import Iterable
from typing import Any

from selfimprove_jax.data.sources import SourceDocument
from selfimprove_jax.language_models.protocol import Reply, TextRequest
from selfimprove_jax.synthesis import entigraph, rephrase, study
from selfimprove_jax.synthesis.prompts import PromptSet
from selfimprove_jax.synthesis.records import GenerationConfig, Origin
from selfimprove_jax.synthesis.units import KINDS, Unit

# First part of a kind -> the module that makes its requests and reads its replies.
_MODULES: dict[str, types.ModuleType] = {
  **dict.fromkeys(("entities", "pair", "triplet"), entigraph),
  "rephrase": rephrase,
  **dict.fromkeys(("spa", "active_reading", "focal"), study),
}
assert {kind.split("/")[0] for kind in KINDS} == set(_MODULES)


class Synthesizer:
  """Makes requests for units of given documents, and reads the replies to them.

  `make_request` and `read` are what `calls.answer` needs.
  """

  def __init__(
    self,
    sources: Iterable[SourceDocument],
    prompts: PromptSet,
    generation: GenerationConfig,
    model_name: str,
  ) -> None:
    self._sources = {source.id: source for source in sources}
    self._prompts = prompts
    self._generation = generation
    self._model_name = model_name

  def make_request(self, unit: Unit, attempt: int) -> TextRequest:
    """Returns the call of a unit; `attempt` counts from 0.

    Raises:
      ValueError: the unit's document is not one of the documents.
    """
    source = self._source(unit)
    module = _module(unit)
    return module.make_request(unit, source, self._prompts, self._generation, attempt)

  def read(self, unit: Unit, request: TextRequest, reply: Reply, attempt: int) -> dict[str, Any]:
    """Returns the record of a reply: finished, or with the field `failure`."""
    prompt = self._prompts.hash(unit.kind)
    origin = Origin(unit, request, reply, prompt, self._model_name, attempt)
    return _module(unit).read(origin, self._source(unit))

  def _source(self, unit: Unit) -> SourceDocument:
    if unit.document not in self._sources:
      raise ValueError(
        f"a unit is about the document {unit.document!r}; there are {sorted(self._sources)[:10]}"
      )
    return self._sources[unit.document]


def _module(unit: Unit) -> types.ModuleType:
  return _MODULES[unit.kind.split("/")[0]]
