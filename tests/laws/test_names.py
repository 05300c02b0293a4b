"""A public class name stands for one thing in the whole repository."""

import ast
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_a_public_class_name_has_one_meaning() -> None:
    places = defaultdict(list)
    for package in ("pipeline", "model", "jobs"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(f"{path.relative_to(REPOSITORY)}:{node.lineno}")
    assert len(places) > 100
    assert {name: locations for name, locations in places.items() if len(locations) > 1} == {}
