"""Correctness of function calls by the rules of the Berkeley Function Calling Leaderboard (its AST check).

A gold answer is a list of {function: {parameter: [admissible values]}}, where "" among the values means that the
parameter may be left out. The calls must match it one to one, in any order; an empty gold list asks for no call.
Leaves out the executed and multi-turn categories.
"""

import re
from typing import Any

from core.trajectory import ToolCall

PYTHON_TYPES = {
    "string": str,
    "integer": int,
    "float": float,
    "number": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "object": dict,
}
IGNORED_IN_STRINGS = re.compile(r"[ ,./\-_*^]")


def calls_match(calls: list[ToolCall], gold: list[dict], functions: list[dict] | None = None) -> bool:
    """Whether the calls are the gold calls, one to one in any order; for an empty gold list: whether there is no call.

    functions: the declared functions ({"name", "parameters"}, or OpenAI-style with these under "function"); they add
    the checks of types and required parameters. A malformed call (arguments not a dict) matches nothing, yet is a call.
    Raises ValueError for a gold call that does not name exactly one function.
    """
    if len(calls) != len(gold):
        return False
    declared = {spec["name"]: spec for spec in (f.get("function", f) for f in functions or [])}
    fits = [[j for j, call in enumerate(calls) if _call_fits(call, wanted, declared)] for wanted in gold]
    return _one_to_one(fits, len(calls))


def _one_to_one(candidates: list[list[int]], n: int) -> bool:
    """Whether every row can take a column of its own (augmenting paths): a greedy choice may block a later row."""
    owner: list[int | None] = [None] * n

    def place(row: int, seen: set[int]) -> bool:
        for column in candidates[row]:
            if column not in seen:
                seen.add(column)
                if owner[column] is None or place(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(candidates)))


def _call_fits(call: ToolCall, wanted: dict[str, dict], declared: dict[str, dict]) -> bool:
    if len(wanted) != 1:
        raise ValueError(f"a gold call names one function, this one {len(wanted)}: {wanted}")
    [(name, allowed)] = wanted.items()
    # Models whose tool names may not hold dots write underscores.
    if call.name not in (name, name.replace(".", "_")) or not isinstance(call.arguments, dict):
        return False
    parameters = declared.get(name, {}).get("parameters", {})
    given, properties = call.arguments, parameters.get("properties", {})
    if any(p not in allowed or (properties and p not in properties) for p in given):
        return False
    if any(p not in given for p in parameters.get("required", [])):
        return False
    if any(p not in given and "" not in values for p, values in allowed.items()):
        return False
    return all(_value_fits(value, allowed[p], properties.get(p, {})) for p, value in given.items())


def _value_fits(value: Any, allowed: list, schema: dict) -> bool:
    """Whether the value is admissible and of the declared type, unless that admissible value is not (a variable)."""
    if _typed(value, schema):
        return any(_same(value, a) for a in allowed)
    return any(_same(value, a) and not _typed(a, schema) for a in allowed if a != "")


def _typed(value: Any, schema: dict) -> bool:
    """Declared type, of list items too. Exact: True is no integer; yet an int may stand for a float."""
    kind = PYTHON_TYPES.get(str(schema.get("type")))
    if kind is float and type(value) is int:
        return True
    if kind is list and isinstance(value, list):
        return all(_typed(item, schema.get("items") or {}) for item in value)
    return kind is None or type(value) is kind


def _same(value: Any, allowed: Any) -> bool:
    """Equal, strings up to case, spaces and light punctuation; a dict has a list of admissible values per key."""
    if isinstance(value, str) and isinstance(allowed, str):
        return _plain(value) == _plain(allowed)
    if isinstance(value, dict) and isinstance(allowed, dict):
        return all(k in allowed and any(_same(v, a) for a in _options(allowed[k])) for k, v in value.items()) and all(
            k in value or "" in _options(options) for k, options in allowed.items()
        )
    if isinstance(value, list) and isinstance(allowed, list):
        return len(value) == len(allowed) and all(map(_same, value, allowed))
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _options(allowed: Any) -> list:
    return allowed if isinstance(allowed, list) else [allowed]


def _plain(text: str) -> str:
    return IGNORED_IN_STRINGS.sub("", text).lower().replace("'", '"')
