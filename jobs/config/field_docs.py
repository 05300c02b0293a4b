"""The text below each field of a class of settings, for files of settings and for the pages of the documents."""

import ast
import functools
import inspect
import itertools
import textwrap
from dataclasses import is_dataclass


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass and of its bases, in one line each."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_dataclass(base):
            continue
        (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(base))).body
                   if isinstance(node, ast.ClassDef))
        for field, below in itertools.pairwise(body):
            if (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr)
                    and isinstance(below.value, ast.Constant)):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs
