"""Typed config sections, and the ml_collections pages that fill them.

A section is a frozen dataclass next to the code that reads it:

  @section
  class SplitConfig:
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05

A page in `configs/` gives every field, so that each one can be overridden from the command line:

  c.split = page(SplitConfig, test_fraction=0.1)

`parse` turns the page into the section once, when the program starts. It refuses unknown and
missing keys, wrong types and values out of range, each by its path.

A field that may hold several sections is tagged by a Literal field:

  source: Annotated[JsonlConfig | FoldersConfig, Field(discriminator="kind")]
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import ml_collections
import pydantic

T = TypeVar("T")


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
  """Makes a class a frozen dataclass whose fields pydantic checks, without coercing types.

  `__post_init__` may raise ValueError for fields that do not go together.
  """
  checked = pydantic.dataclasses.dataclass(
    cls,
    frozen=True,
    kw_only=True,
    config=pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False),
  )
  return typing.cast(type[T], checked)


def page(cls: type, **values: Any) -> ml_collections.ConfigDict:
  """Returns a section as a ConfigDict that gives every field, defaults included.

  A field that is None becomes a typed placeholder, which the command line can override. A nested
  section may be given as a page, or as a dict of the fields that differ from the defaults.

  Raises:
    TypeError: `values` names no field of the section, or lacks one that has no default.
  """
  fields = {field.name: field for field in dataclasses.fields(cls)}
  if unknown := [name for name in values if name not in fields]:
    raise TypeError(f"{cls.__name__} has no field {unknown[0]!r}{_nearest(unknown[0], fields)}")
  hints = typing.get_type_hints(cls)
  result = ml_collections.ConfigDict()
  for name, field in fields.items():
    if name in values:
      value = values[name]
    elif field.default is not dataclasses.MISSING:
      value = field.default
    elif field.default_factory is not dataclasses.MISSING:
      value = field.default_factory()
    else:
      raise TypeError(f"{cls.__name__} needs a value for {name!r}")
    kinds = _alternatives(hints[name])
    result[name] = _page_value(value, kinds)
    if isinstance(result[name], ml_collections.ConfigDict):
      _add_other_members(result[name], kinds)
  return result


def _page_value(value: Any, kinds: list[Any]) -> Any:
  if value is None:
    scalars = [kind for kind in kinds if kind in (bool, int, float, str)]
    return ml_collections.config_dict.placeholder(scalars[0] if scalars else object)
  if dataclasses.is_dataclass(value):
    return page(type(value), **{f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
  if isinstance(value, dict):
    if sections := [kind for kind in kinds if dataclasses.is_dataclass(kind)]:
      return page(_tagged(sections, value), **value)
    held = [typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict]
    inner = _alternatives(held[0]) if held else []
    return ml_collections.ConfigDict({key: _page_value(v, inner) for key, v in value.items()})
  if isinstance(value, list):
    return tuple(value)  # ml_collections can override a tuple from the command line, but no list
  if float in kinds and type(value) is int and int not in kinds:
    return float(value)  # else the command line would only take an int
  return value


def _add_other_members(made: ml_collections.ConfigDict, kinds: list[Any]) -> None:
  """Adds a union's other members, unset, so that the command line can choose another one."""
  sections = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
  for kind in sections if len(sections) > 1 else []:
    for name, hint in typing.get_type_hints(kind).items():
      if name not in made:
        made[name] = _unset(_alternatives(hint))


def _unset(kinds: list[Any]) -> Any:
  """Returns placeholders for a field, or for all fields of a section."""
  if dataclasses.is_dataclass(kinds[0]):
    fields = typing.get_type_hints(kinds[0]).items()
    return ml_collections.ConfigDict({name: _unset(_alternatives(hint)) for name, hint in fields})
  kind = {tuple: tuple, typing.Literal: str}.get(typing.get_origin(kinds[0]), kinds[0])
  return ml_collections.config_dict.placeholder(kind if isinstance(kind, type) else object)


def _tagged(sections: list[type], values: dict[str, Any]) -> type:
  """Returns the member of a union of sections that the values are for, by their tag."""
  for kind in sections:
    if len(sections) == 1 or _tag(kind, values):
      return kind
  raise TypeError(f"{values} has the tag of none of {[kind.__name__ for kind in sections]}")


def _alternatives(hint: Any) -> list[Any]:
  """Returns the types that an annotation allows, without `Annotated`."""
  if typing.get_origin(hint) is typing.Annotated:
    return _alternatives(typing.get_args(hint)[0])
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return [kind for arg in typing.get_args(hint) for kind in _alternatives(arg)]
  return [hint]


def parse(
  cls: type[T],
  values: Mapping[str, Any],
  *,
  path: str = "",
  overrides: Collection[str] = (),
) -> T:
  """Returns the section that a page describes.

  Args:
    values: JSON-able, as `ConfigDict.to_dict` gives it.
    path: the section's place in the whole config, for error messages.
    overrides: paths that the command line set. If it chose another member of a union, the page's
      values for the fields of the former one are dropped.

  Raises:
    ValueError: a key is unknown or missing, or a value is not allowed. Each fault is one line with
      the knob's path, its value, what is allowed, and the nearest right name.
  """
  try:
    values = _chosen(cls, values, overrides)
    return pydantic.TypeAdapter(cls).validate_json(json.dumps(values))
  except pydantic.ValidationError as error:
    found: dict[str, list[str]] = {}
    for fault in error.errors():
      where, message = _describe(cls, fault)
      where = ".".join(filter(None, (path, where))) or "the config"
      found.setdefault(where, []).append(message)
  # A scalar of several types gives one fault for each of them, at the same place.
  lines = [
    f"{where}: {' or '.join([first, *(m.removeprefix('must be ') for m in others)])}"
    for where, (first, *others) in found.items()
  ]
  raise ValueError("\n".join(lines))


def _chosen(
  hint: Any, values: Any, overrides: Collection[str], path: str = "", switched: bool = False
) -> Any:
  """Returns a page's values without those for union members that are not chosen.

  Args:
    switched: the command line chose the member, so what it did not set takes its default.
  """
  kinds = [kind for kind in _alternatives(hint) if kind not in (None, types.NoneType)]
  if not isinstance(values, Mapping) or not kinds:
    return values
  sections = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
  if len(sections) > 1:
    members = [kind for kind in sections if _tag(kind, values)]
    if not members:
      return values  # pydantic describes the wrong tag
    switched = f"{path}{_tag(members[0], values)}" in overrides
    fields = typing.get_type_hints(members[0])
    others = {name for kind in sections for name in typing.get_type_hints(kind)} - fields.keys()

    def is_dropped(name: str, value: Any) -> bool:
      is_given = any(f"{other}.".startswith(f"{path}{name}.") for other in overrides)
      return name in others and not is_given and (switched or _is_unset(value))

    values = {name: value for name, value in values.items() if not is_dropped(name, value)}
    sections = members
  if switched:
    values = {name: value for name, value in values.items() if value is not None}
  if sections:
    hints = typing.get_type_hints(sections[0])
  else:
    inner = typing.get_args(kinds[0])
    hints = dict.fromkeys(values, inner[-1] if inner else None)
  return {
    name: _chosen(hints.get(name), value, overrides, f"{path}{name}.", switched)
    for name, value in values.items()
  }


def _is_unset(value: Any) -> bool:
  if isinstance(value, Mapping):
    return all(_is_unset(v) for v in value.values())
  return value is None


def _tag(kind: type, values: Mapping[str, Any]) -> str | None:
  """Returns the name of the section's Literal field, if the values have its tag."""
  for name, hint in typing.get_type_hints(kind).items():
    if typing.get_origin(hint) is typing.Literal and values.get(name) in typing.get_args(hint):
      return name
  return None


def to_json(config: Any) -> Any:
  """Returns a section as JSON values: dicts, lists, numbers, texts."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def choices(name: str, known: Iterable[str]) -> str:
  """Formats the end of an error about an unknown name: the nearest known one, and all of them."""
  known = sorted(known)
  near = difflib.get_close_matches(name, known, n=1)
  return f"; did you mean {near[0]!r}? There are {known}" if near else f"; there are {known}"


def _describe(cls: type, fault: Any) -> tuple[str, str]:
  """Returns the place of a pydantic error, as `path=value`, and what is wrong there."""
  keys, owner = _locate(cls, fault["loc"])
  where, value = ".".join(keys), fault["input"]
  match fault["type"]:
    case "unexpected_keyword_argument":
      fields = [field.name for field in dataclasses.fields(owner)]
      return f"{where}={value!r}", f"there is no such knob{_nearest(keys[-1], fields)}"
    case "missing":
      return where, "is missing; the page must give it"
    case "union_tag_not_found":
      tag = fault["ctx"]["discriminator"].strip("'")
      return f"{where}.{tag}", "is missing; the page must give it"
    case "union_tag_invalid":
      tag, allowed = fault["ctx"]["tag"], fault["ctx"]["expected_tags"]
      where = f"{where}.{fault['ctx']['discriminator'].strip(chr(39))}"
      return f"{where}={tag!r}", f"must be one of {allowed}{_did_you_mean(tag, allowed)}"
    case "literal_error":
      allowed = fault["ctx"]["expected"]
      return f"{where}={value!r}", f"must be {allowed}{_did_you_mean(value, allowed)}"
    case "value_error":
      message = str(fault["ctx"]["error"])
      return (where if isinstance(value, dict) else f"{where}={value!r}"), message
  message = fault["msg"].replace("Input should", "must").replace("an object", "a section")
  return f"{where}={value!r}", message


def _locate(cls: type, loc: tuple[str | int, ...]) -> tuple[list[str], Any]:
  """Returns the keys that lead to an error's place, and the section that the last one is in."""
  keys, owner, hint = [], None, cls
  for key in loc:
    kinds = [kind for kind in _alternatives(hint) if kind is not types.NoneType]
    if len(kinds) > 1:
      # First comes the union's member, by its tag or type; it is no key of the page.
      hint = next((kind for kind in kinds if key in _tags(kind)), None)
      continue
    keys.append(str(key))
    if dataclasses.is_dataclass(kinds[0]):
      owner = kinds[0]
      hint = typing.get_type_hints(owner, include_extras=True).get(key)
    else:
      arguments = typing.get_args(kinds[0])
      hint = arguments[1 if typing.get_origin(kinds[0]) is dict else 0] if arguments else None
  return keys, owner


def _tags(kind: Any) -> list[Any]:
  """Returns the values of a section's Literal fields; one of them tags it in a union."""
  if not dataclasses.is_dataclass(kind):
    return []
  hints = typing.get_type_hints(kind).values()
  return [v for h in hints if typing.get_origin(h) is typing.Literal for v in typing.get_args(h)]


def _did_you_mean(value: Any, allowed: str) -> str:
  near = difflib.get_close_matches(str(value), re.findall("'([^']*)'", allowed), n=1)
  return f"; did you mean {near[0]!r}?" if near else ""


def _nearest(name: str, known: Iterable[str]) -> str:
  """Formats the nearest known name, or all of them if none is near."""
  near = difflib.get_close_matches(name, list(known), n=1)
  return f"; did you mean {near[0]!r}?" if near else f"; there are {sorted(known)}"
