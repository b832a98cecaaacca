"""Values that config sections accept, and the messages about those that they refuse."""

import dataclasses
import json
import pickle
from typing import Annotated, Literal

import ml_collections
import pytest
from pydantic import Field

from selfimprove_jax.runtime.config import choices, page, parse, section, to_json


@section
class ModelConfig:
  """A plain section."""

  num_layers: Annotated[int, Field(ge=1)]
  dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
  attention: Literal["auto", "xla", "splash"] = "auto"
  path: str | None = None
  ids: tuple[int, ...] = ()
  max_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"

  def __post_init__(self) -> None:
    if self.path is not None and self.ids:
      raise ValueError(f"path={self.path!r} and ids={self.ids} exclude each other")


@section
class FileConfig:
  """A member of a tagged union."""

  kind: Literal["file"] = "file"
  name: str = ""


@section
class FolderConfig:
  """A member of a tagged union."""

  kind: Literal["folder"] = "folder"
  pattern: str = "*"
  depth: int | None = None


@section
class Config:
  """A section of sections."""

  seed: int
  model: ModelConfig = ModelConfig(num_layers=2)
  source: Annotated[FileConfig | FolderConfig, Field(discriminator="kind")] = FileConfig()
  arms: dict[str, ModelConfig] = dataclasses.field(default_factory=dict)


def _page(**values):
  return page(Config, **{"seed": 0, **values})


def _fault(changes):
  """The message for a page with some values changed, by path."""
  values = _page().to_dict()
  for path, value in changes.items():
    *sections, key = path.split(".")
    here = values
    for name in sections:
      here = here[name]
    here[key] = value
  with pytest.raises(ValueError) as error:
    parse(Config, values)
  return str(error.value)


def test_a_page_gives_every_field_and_parses_to_the_section():
  made = _page(arms={"a": ModelConfig(num_layers=3)})
  assert parse(Config, made.to_dict()) == Config(seed=0, arms={"a": ModelConfig(num_layers=3)})
  assert set(made.model) == {field.name for field in dataclasses.fields(ModelConfig)}


def test_a_section_goes_to_json_and_back():
  config = Config(seed=1, source=FolderConfig(depth=2), model=ModelConfig(num_layers=1, ids=(3,)))
  assert parse(Config, to_json(config)) == config
  assert to_json(config)["model"]["ids"] == [3]
  assert json.loads(json.dumps(to_json(config))) == to_json(config)


def test_a_section_is_frozen_and_can_be_pickled():
  config = Config(seed=1)
  assert pickle.loads(pickle.dumps(config)) == config
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.seed = 2


@pytest.mark.parametrize(
  ("path", "value"),
  [
    ("model.path", "a/b"),
    ("model.attention", "xla"),
    ("model.ids", (1, 2)),
    ("source.name", "x"),
    ("arms.a.dropout_rate", 0.5),
  ],
)
def test_every_knob_of_a_locked_page_can_be_overridden(path, value):
  made = _page(arms={"a": ModelConfig(num_layers=3)})
  made.lock()
  made.update_from_flattened_dict({path: value})
  config = parse(Config, made.to_dict())
  for key in path.split("."):
    config = config[key] if isinstance(config, dict) else getattr(config, key)
  assert config == value


def test_a_knob_whose_default_is_none_takes_only_its_type():
  made = page(FolderConfig)
  with pytest.raises(TypeError, match="int"):
    made.depth = "deep"
  made.depth = 3
  assert parse(FolderConfig, made.to_dict()).depth == 3


def test_an_integer_for_a_float_knob_stays_overridable_by_a_float():
  made = page(ModelConfig, num_layers=1, dropout_rate=0)
  made.dropout_rate = 0.25
  assert parse(ModelConfig, made.to_dict()).dropout_rate == 0.25


def test_a_page_refuses_a_field_that_the_section_does_not_have_or_lacks():
  with pytest.raises(
    TypeError, match=r"ModelConfig has no field 'num_layer'; did you mean 'num_la"
  ):
    page(ModelConfig, num_layer=1)
  with pytest.raises(TypeError, match="ModelConfig needs a value for 'num_layers'"):
    page(ModelConfig)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"model.num_layer": 3},
      "model.num_layer=3: there is no such knob; did you mean 'num_layers'?",
    ),
    (
      {"source.zzz": 3},
      "source.zzz=3: there is no such knob; there are ['kind', 'name']",
    ),
    ({"model.num_layers": 0}, "model.num_layers=0: must be greater than or equal to 1"),
    ({"model.dropout_rate": 1.0}, "model.dropout_rate=1.0: must be less than 1"),
    ({"model.dropout_rate": float("nan")}, "model.dropout_rate=nan: must be a finite number"),
    ({"model.num_layers": True}, "model.num_layers=True: must be a valid integer"),
    ({"model.num_layers": "3"}, "model.num_layers='3': must be a valid integer"),
    (
      {"model.attention": "splsh"},
      "model.attention='splsh': must be 'auto', 'xla' or 'splash'; did you mean 'splash'?",
    ),
    (
      {"model.max_tokens": "aut"},
      "model.max_tokens='aut': must be a valid integer or 'auto'; did you mean 'auto'?",
    ),
    ({"model.ids": (1, "x")}, "model.ids.1='x': must be a valid integer"),
    ({"model": 3}, "model=3: must be a section"),
    (
      {"model.path": "a", "model.ids": (1,)},
      "model: path='a' and ids=(1,) exclude each other",
    ),
    ({"source.kind": "fil"}, "source.kind='fil': must be one of 'file', 'folder'"),
    ({"source.kind": "folder"}, "source.name='': there is no such knob"),
    ({"arms.b": {"num_layers": -1}}, "arms.b.num_layers=-1: must be greater than or equal to 1"),
    ({"arms.b": {}}, "arms.b.num_layers: is missing; the page must give it"),
  ],
)
def test_a_fault_is_told_with_its_path_value_and_what_is_allowed(changes, message):
  assert message in _fault(changes)


def test_a_missing_key_is_told_by_its_path():
  made = _page().to_dict()
  del made["seed"]
  del made["source"]["kind"]
  with pytest.raises(ValueError, match="seed: is missing; the page must give it") as error:
    parse(Config, made)
  assert "source.kind: is missing" in str(error.value)


def test_every_fault_of_a_page_is_told_at_once_one_a_line():
  lines = _fault({"model.num_layers": 0, "model.attention": "x", "sed": 1}).splitlines()
  assert [line.split("=")[0] for line in lines] == ["model.num_layers", "model.attention", "sed"]


def test_faults_of_a_section_by_itself_begin_with_its_path():
  with pytest.raises(ValueError, match=r"^a\.b\.num_layers=0: must be"):
    parse(ModelConfig, {"num_layers": 0}, path="a.b")


def test_a_page_of_a_section_default_holds_config_dicts_that_lock():
  made = _page()
  assert isinstance(made.model, ml_collections.ConfigDict)
  made.lock()
  with pytest.raises((AttributeError, KeyError)):
    made.model.num_layer = 3


def test_choices_name_the_nearest_and_all():
  assert choices("smok", ["smoke", "quick"]) == (
    "; did you mean 'smoke'? There are ['quick', 'smoke']"
  )
  assert choices("x", ["smoke"]) == "; there are ['smoke']"
