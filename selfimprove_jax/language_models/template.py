"""Jinja templates that come with a stranger's checkpoint, run with bounds on what they may cost.

Jinja's sandbox keeps a template away from Python's objects, but lets it loop and allocate without
end. Here each render has a budget. It is spent by what takes time or memory in proportion to
something: passes through loops and macros, and the sizes of what is joined, compared, and printed.
Nothing is computed when a template is loaded.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.sandbox
from jinja2.visitor import NodeTransformer

# One unit is about a microsecond: a pass, an item of a list, some expressions, or these characters.
_UNIT_CHARS, _UNIT_NODES = 64, 4
_UNITS, _UNITS_PER_MESSAGE = 300_000, 100
# Templates that go through all messages for each one get these too, so they can't have very many.
_MORE_PER_MESSAGE, _MAX_MORE = 5_000, 2_000_000
_MAX_SOURCE, _MAX_OUTPUT = 1 << 16, 1 << 20
_MAX_BITS = 10_000  # of an integer
_MAX_NUMBER = 10_000  # given to a filter or in a format
_BUDGET = "*budget"  # no name in a template can begin like this
_FILTERS = (
  *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first"),
  *("float", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list"),
  *("lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe"),
  *("select", "selectattr", "sort", "string", "sum", "title", "trim", "truncate", "unique"),
  *("upper", "urlencode", "wordcount"),
)
# Filters that go through lists in lists, and those whose result is a product of their arguments.
_DEEP = ("dictsort", "format", "groupby", "join", "sort", "string", "unique")
_PRODUCTS = ("indent", "join", "replace")
_METHODS_REFUSED = (
  *("center", "encode", "expandtabs", "format_map", "ljust", "maketrans", "rjust", "translate"),
  "zfill",
)


class TemplateError(ValueError):
  """A chat template is not valid, refuses the messages, or would cost too much."""


class Template:
  """A compiled template."""

  def __init__(self, source: str) -> None:
    """Raises TemplateError if it is not valid, or too long."""
    if len(source) > _MAX_SOURCE:
      raise TemplateError(
        f"the chat template has {len(source)} characters; at most {_MAX_SOURCE} are supported"
      )
    try:
      self._template = _environment().from_string(source)
    except Exception as error:  # also SyntaxError and RecursionError of Python's own compiler
      raise TemplateError(f"the chat template is not valid Jinja: {_text(error)}") from error

  def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
    """Raises TemplateError with the template's reason, or if the budget is spent."""
    chars = sum(len(text) for message in messages for text in message.values())
    more = min(_MORE_PER_MESSAGE * len(messages), _MAX_MORE)
    budget = _Budget(_UNITS + _UNITS_PER_MESSAGE * len(messages) + more + chars)
    pieces, room = [], _MAX_OUTPUT + 8 * chars
    try:
      for piece in self._template.generate({"messages": messages, _BUDGET: budget, **variables}):
        room -= len(piece)
        if room < 0:
          raise _TooMuch("it writes too much")
        pieces.append(piece)
    except Exception as error:  # a template can raise anything: ZeroDivisionError, MemoryError
      raise TemplateError(f"the chat template refuses these messages: {_text(error)}") from error
    return "".join(pieces)


def _text(error: Exception) -> str:
  return str(error)[:500] or type(error).__name__


class _TooMuch(jinja2.TemplateError):
  pass


class _Budget:
  def __init__(self, units: int) -> None:
    self.units = units

  def spend(self, units: int) -> None:
    self.units -= units
    if self.units < 0:
      raise _TooMuch("it loops or allocates too much")


def _budget(context: Any) -> _Budget:
  return context.parent[_BUDGET]


def _flat(value: Any) -> int:
  """Returns the cost of going through a value once."""
  if isinstance(value, str):
    return len(value) // _UNIT_CHARS
  return len(value) if hasattr(type(value), "__len__") else 0


def _deep(value: Any, known: dict[int, int] | None = None) -> int:
  """Returns the cost of going through all that a value holds; what it holds twice counts twice."""
  known = {} if known is None else known
  if isinstance(value, jinja2.utils.Namespace):
    value = value._Namespace__attrs
  if not isinstance(value, list | tuple | Mapping | Iterable) or isinstance(value, str | range):
    return _flat(value)
  if not hasattr(type(value), "__len__"):
    return 0  # a generator, which is spent for as it is read
  if id(value) not in known:
    known[id(value)] = 0
    parts = itertools.chain(value, value.values()) if isinstance(value, Mapping) else value
    known[id(value)] = 1 + sum(1 + _deep(part, known) for part in parts)
  return known[id(value)]


@jinja2.pass_context
def _pass(context: Any, units: int) -> str:
  """Spends for one pass through a loop or macro."""
  _budget(context).spend(units)
  return ""


@jinja2.pass_context
def _spent(context: Any, value: Any) -> Any:
  """Spends for a value that is compared or was built, and returns it."""
  _budget(context).spend(_deep(value))
  return value


@jinja2.pass_context
def _counted(context: Any, value: Any) -> Any:
  """Spends for what a loop goes through, and returns it."""
  budget = _budget(context)
  if hasattr(type(value), "__len__"):
    budget.spend(_flat(value) if not isinstance(value, str) else len(value))
    return value
  items = []
  for item in value:
    budget.spend(1)
    items.append(item)
  return items


@jinja2.pass_context
def _printed(context: Any, value: Any) -> str:
  """Returns the text of a value."""
  budget = _budget(context)
  if not isinstance(value, str):
    budget.spend(_deep(value))
  text = str(value)
  budget.spend(_flat(text))
  return text


@jinja2.pass_context
def _joined(context: Any, values: list[Any]) -> str:
  return "".join(_printed(context, value) for value in values)


@jinja2.pass_context
def _to_json(
  context: Any,
  value: Any,
  indent: int | None = None,
  ensure_ascii: bool = False,
  separators: Any = None,
  sort_keys: bool = False,
) -> str:
  """Is not Jinja's filter, which escapes for HTML."""
  encoder = json.JSONEncoder(
    indent=indent, ensure_ascii=ensure_ascii, separators=separators, sort_keys=sort_keys
  )
  _check_numbers(indent, *(separators or ()))
  budget, pieces = _budget(context), []
  for piece in encoder.iterencode(value):
    budget.spend(1 + _flat(piece))
    pieces.append(piece)
  return "".join(pieces)


def _check_numbers(*values: Any) -> None:
  for value in values:
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
      raise _TooMuch(f"{str(value)[:20]} is above {_MAX_NUMBER}")


def _check_format(text: str) -> None:
  """Refuses widths that are long, or not written in the format itself."""
  if re.search(r"\d{5}|\*|\{[^{}]*\{", text):
    raise _TooMuch(f"the format {text[:40]!r} has a width above {_MAX_NUMBER}, or computes one")


def _spend_product(budget: _Budget, value: Any, arguments: Iterable[Any]) -> None:
  """Spends for a result that may be as long as a value times an argument."""
  sizes = [a if isinstance(a, int) else len(a) for a in arguments if isinstance(a, int | str)]
  length = len(value) if hasattr(type(value), "__len__") else 0
  budget.spend((length + 1) * max([0, *sizes]) // _UNIT_CHARS)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a filter or test that spends for its value, arguments, and result."""
  kind = getattr(function, "jinja_pass_arg", None)

  @jinja2.pass_context
  @functools.wraps(function)
  def guarded(context: Any, value: Any = None, *args: Any, **kwargs: Any) -> Any:
    budget, given = _budget(context), (*args, *kwargs.values())
    _check_numbers(*given)
    if name in ("join", "list", "last", "sum", "sort", "unique"):
      value = _counted(context, value) if not isinstance(value, str) else value
    budget.spend(1 + (_deep(value) if name in _DEEP else _flat(value)) + sum(map(_deep, given)))
    if name in _PRODUCTS:
      _spend_product(budget, value, given)
    if name == "format":
      _check_format(str(value))
    first = {None: (), "context": (context,), "environment": (context.environment,)}
    first["eval_context"] = (context.eval_ctx,)
    result = function(*first[kind and kind.name], value, *args, **kwargs)
    budget.spend(_flat(result))
    return result

  guarded.jinja_pass_arg = _pass.jinja_pass_arg  # `wraps` copies the function's
  return guarded


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

  def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
    tree = _Spending().visit(super()._parse(source, name, filename))
    return tree.set_environment(self)

  def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
    if isinstance(obj, int | float | bytes) or (isinstance(obj, str) and attr in _METHODS_REFUSED):
      return False
    return super().is_safe_attribute(obj, attr, value)

  def wrap_str_format(self, value: Any) -> Any:
    made = super().wrap_str_format(value)
    if made is None:
      return None
    if value.__name__ == "format_map":
      raise jinja2.sandbox.SecurityError("format_map is not supported")
    _check_format(value.__self__)
    return made

  def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
    budget, owner = _budget(context), getattr(obj, "__self__", None)
    budget.spend(1 + _flat(owner) + sum(map(_deep, (*args, *kwargs.values()))))
    if isinstance(owner, list | tuple):
      budget.spend(_deep(owner))
    name = getattr(obj, "__name__", "")
    if name == "join" and args:
      args = (_counted(context, args[0]), *args[1:])
      _spend_product(budget, args[0], [owner])
    elif name == "replace" and isinstance(owner, str):
      _spend_product(budget, owner, args)
    result = super().call(context, obj, *args, **kwargs)
    budget.spend(0 if isinstance(result, range) else _flat(result))
    return result

  def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
    budget, whole = _budget(context), isinstance(left, int) and isinstance(right, int)
    if operator == "%" and isinstance(left, str):
      _check_format(left)
      budget.spend(_deep(right))
    elif whole and operator in ("*", "**"):
      bits = left.bit_length()
      if (bits * abs(right) if operator == "**" else bits + right.bit_length()) > _MAX_BITS:
        raise _TooMuch("an integer is too large")
    elif operator == "*":
      times = [x for x in (left, right) if isinstance(x, int)]
      parts = [x for x in (left, right) if hasattr(type(x), "__len__")]
      if times and parts:
        budget.spend((len(parts[0]) + 1) * max(0, times[0]))
    result = super().call_binop(context, operator, left, right)
    budget.spend(1 + _flat(result))
    return result


class _Spending(NodeTransformer):
  """Inserts what spends; filters with these names can't be written in a template."""

  def visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
    node = self.generic_visit(node, *args, **kwargs)
    match node:
      case nodes.For():
        if node.recursive:
          raise jinja2.TemplateSyntaxError("recursive loops are not supported", node.lineno)
        node.iter = _filtered(node.iter, "*counted")
        _add_pass(node)
      case nodes.Macro() | nodes.CallBlock() | nodes.Block():
        _add_pass(node)
      case nodes.Concat():
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "*joined")
      case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") | nodes.Getitem(arg=nodes.Slice()):
        return _filtered(node, "*spent")
      case nodes.Compare():
        node.expr = _filtered(node.expr, "*spent")
        for operand in node.ops:
          operand.expr = _filtered(operand.expr, "*spent")
    return node


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
  return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _add_pass(node: Any) -> None:
  """Makes each pass through a body spend for all that stands in it."""
  inside = [found for part in node.body for found in part.find_all(nodes.Node)]
  chars = sum(len(found.data) for found in inside if isinstance(found, nodes.TemplateData))
  units = 1 + len(inside) // _UNIT_NODES + chars // _UNIT_CHARS
  spend = _filtered(nodes.Const(units, lineno=node.lineno), "*pass")
  node.body.insert(0, nodes.ExprStmt(spend, lineno=node.lineno))


class _Generation(jinja2.ext.Extension):
  """Renders `{% generation %}`, which marks the text that is trained on, as its body."""

  tags = {"generation"}

  def parse(self, parser: Any) -> Any:
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


@functools.cache
def _environment() -> _Environment:
  environment = _Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    optimized=False,  # constants would be folded when the template is loaded
    finalize=_printed,
    extensions=[_Generation, "jinja2.ext.loopcontrols"],
  )
  known = environment.filters
  environment.filters = {name: _guarded(name, known[name]) for name in _FILTERS}
  environment.filters |= {"*pass": _pass, "*spent": _spent, "*counted": _counted}
  environment.filters |= {"*joined": _joined, "tojson": _to_json}
  environment.tests = {name: _guarded("", test) for name, test in environment.tests.items()}
  del environment.globals["lipsum"]
  environment.globals["raise_exception"] = _raise_exception
  return environment
