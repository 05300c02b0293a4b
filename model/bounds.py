"""Bounds of settings: annotations of the fields, such as `Annotated[int, Ge(1)]`, and the function that checks them.

model/bounds.py and pipeline/bounds.py are the same file. The two packages do not import each other. annotated_types
has no checker, and pydantic converts values: 1 would become 1.0 in a plan.
"""

import operator
from dataclasses import asdict
from typing import Any, Literal, get_args, get_origin, get_type_hints

_WORDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def check_bounds(section: str, config: Any) -> None:
    """Raise ValueError for the first field outside its bounds. None passes, NaN never does, tuples count by element."""
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value, parts = getattr(config, name), get_args(kind)
        values = value if isinstance(value, tuple) else (value,)
        rules = {f"one of {', '.join(parts)}": value in parts} if get_origin(kind) is Literal else {
            f"{_WORDS[key]} {limit}": all(getattr(operator, key)(each, limit) for each in values if each is not None)
            for part in (kind, *parts) for bound in getattr(part, "__metadata__", ())
            for key, limit in asdict(bound).items() if limit is not None}
        if not all(rules.values()):
            raise ValueError(f"{section}.{name} = {value!r}: must be {' and '.join(rules)}")
