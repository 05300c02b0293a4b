"""Code that only older Pythons accept is found on every version."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def _names_of(body: list[ast.stmt]) -> set[str]:
    """Names that the body of a class assigns."""
    names = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    names |= {node.target.id for node in body
              if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value}
    return names | {target.id for node in body if isinstance(node, ast.Assign)
                    for target in node.targets if isinstance(target, ast.Name)}


def _annotations_of(body: list[ast.stmt]) -> list[ast.expr]:
    annotations = [node.annotation for node in body if isinstance(node, ast.AnnAssign)]
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            annotations += filter(None, (node.returns, *(argument.annotation for argument in arguments)))
    return annotations


def hidden_names(code: str) -> list[str]:
    """Names in annotations of a class that mean something else once the class is complete."""
    classes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ClassDef)]
    return [f"{node.name}.{name.id}" for node in classes for annotation in _annotations_of(node.body)
            for name in ast.walk(annotation) if isinstance(name, ast.Name) and name.id in _names_of(node.body)]


def test_no_class_hides_a_name_that_its_annotations_use() -> None:
    # Python 3.14 reads annotations when they are first needed, in the class's own namespace.
    assert hidden_names("class A:\n  kind: sources.Kind = 1\n  sources: str = ''") == ["A.sources"]
    assert hidden_names("class A:\n  def clip(self, n: int) -> clip.Config: ...") == ["A.clip"]
    assert hidden_names("class A:\n  kind: sources.Kind = 1\n  other: str = ''") == []
    for package in ("pipeline", "model", "jobs"):
        for path in (REPOSITORY / package).rglob("*.py"):
            assert hidden_names(path.read_text()) == [], path
