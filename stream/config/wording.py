"""What pydantic finds wrong, in words for somebody who writes TOML. No value is quoted: it may be a secret."""

import re
from collections.abc import Sequence

from pydantic_core import ErrorDetails

from stream.config.lines import KeyPath
from stream.config.rules import Mistake, nearest

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "path_type": "text in quotes",
    "tuple_type": "an array: [...]",
    "dict_type": "a table",
    "model_type": "a table",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
}
_VERB = re.compile(r"(is|must|cannot be|begins)\b")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def explain(error: ErrorDetails, known: Sequence[str]) -> Mistake:
    """One mistake. `known`: the keys of the table that it is in."""
    path: KeyPath = tuple(part for part in error["loc"] if part != "[key]")
    name, kind, context = dotted(path), error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        what = "section" if isinstance(error["input"], dict) else "key"
        return path, f"unknown {what} {name}: {nearest(str(path[-1]), known)}"
    if kind == "missing":
        return path, f"{name} is missing: add it"
    if kind == "value_error":
        problem = str(context["error"])
        return path, f"{name}{'' if _VERB.match(problem) else ':'} {problem}"
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return path, f"{name} must be {words} {context[bound]:g}"
    if kind == "enum":
        return path, f"{name} must be one of {context['expected']}"
    if kind == "too_short":
        return path, f"{name} is empty: name at least one"
    if kind in _WANTED:
        return path, f"{name} must be {_WANTED[kind]}"
    return path, f"{name}: {error['msg'][0].lower()}{error['msg'][1:]}"


def dotted(path: KeyPath) -> str:
    """The name of a value as one would say it: without positions in arrays."""
    return ".".join(part if _BARE.fullmatch(part) else repr(part) for part in path if isinstance(part, str))
