"""Finds every error message and warning in the code, and writes docs/reference/errors.md: meaning and cure of each.

A message with a `hint:` has its cure in the code. The others have cause and cure in cures.toml beside this file.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]
CURES = tomllib.loads((Path(__file__).parent / "cures.toml").read_text())
_LEDGER = {"BadImage", "NotFetched", "Retryable", "Refused", "NeedsIsolation", "FileTooLarge"}
"""Errors of one sample. Their texts are reasons: docs/reference/ledger.md explains them."""
_DATA = {"DamagedFile", "StageFailed", "StorageError", "NoAnswer", "OSError", "MemoryError", "DeviceUnavailable",
         "RuntimeError", "OutOfDeviceMemory", "Drifted", "UnreadableIndex", "NpmUnavailable",
         "FloatingPointError", "GatesFailed", "PermissionError", "FileExistsError", "DamagedPointer",
         "LeaseConflict", "AccessDenied", "FileNotFoundError", "RemovedVersion"}
"""Errors that end a command with exit code 1; the others end it with 2."""
_NO_NAMES = {"join", "map", "str", "repr", "sorted", "len", "set", "int", "if", "else", "or", "for", "in", "self",
             "config", "f", "r", "sum", "type", "keys", "splitlines", "strip"}
_HEAD = """# Error messages

Every error of the program, by the part that raises it, and every [warning](#warnings) of its log. Words in capitals
stand for values.
Exit code 1: items failed or data is damaged. Exit code 2: invalid usage, and nothing was changed.
[Troubleshooting](../troubleshooting.md) begins with symptoms.
[Reasons in the ledger](ledger.md) explains why single samples are left out.
"""


_WARNINGS = """## Warnings

Warnings in the log. A warning alone does not end a command. Its text may be an error of this page.

| warning | meaning, and what helps |
|---|---|"""


@dataclass(frozen=True)
class Message:
    """An error message or a warning. `place` is file:line, `code` the exit code, or 0 for a warning.

    `cure` is empty if neither the code nor cures.toml has one.
    """

    place: str
    area: str
    text: str
    code: int
    cure: str


def find_messages() -> list[Message]:
    """The messages of the three packages, in the order of the files."""
    return [message for package in ("pipeline", "model", "jobs") for file in sorted((_ROOT / package).rglob("*.py"))
            for message in _messages_of(file)]


def find_warnings() -> list[Message]:
    """The warnings in the log of the three packages, in the order of the files."""
    return [warning for package in ("pipeline", "model", "jobs") for file in sorted((_ROOT / package).rglob("*.py"))
            for warning in _warnings_of(file)]


def _warnings_of(file: Path) -> Iterator[Message]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warning":
            text = _template(node.args[0])
            assert text is not None, f"{file}:{node.lineno}: no literal text\nhint: pass the values as arguments"
            said, _, hint = _fill(text, node.args[1:]).partition("\nhint: ")
            said = " ".join(said.split())
            if said == "ERROR":  # the text is an error, which has its own entry
                continue
            name = str(file.relative_to(_ROOT))
            cure = next((cure for start, cure in CURES["warnings"].items() if said.startswith(start)), "")
            yield Message(f"{name}:{node.lineno}", "", said, 0, " ".join(hint.split()) or cure)


def _fill(text: str, values: list[ast.expr]) -> str:
    """The text of a log line, with words in capitals for its arguments."""
    remaining = iter(values)
    return re.sub(r"%[-+.\d]*[sdgf]|%%", lambda part: "%" if part[0] == "%%" else _value(next(remaining)), text)


def _messages_of(file: Path) -> Iterator[Message]:
    name = str(file.relative_to(_ROOT))
    area = name.rpartition("/")[0] if name.count("/") == 1 else "/".join(name.split("/")[:2])
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        kind = ast.unparse(node.exc.func)
        if kind.rpartition(".")[2] in _LEDGER or "BadImage" in kind:
            continue
        code = 1 if kind.rpartition(".")[2] in _DATA else 2
        text = _template(node.exc.args[0]) if node.exc.args else None
        if text is None or kind.startswith(("self.", "_", "syntax")) or kind in CURES["built"]:
            built = f"{name}: {ast.unparse(node.exc)}"
            said, cure = next((entry for part, entry in CURES["built"].items() if part in built),
                              (built, CURES["classes"].get(kind, "")))
            if kind not in CURES["classes"] or said != built:  # a class with a cure may pass on a text
                yield Message(f"{name}:{node.lineno}", area, said, code, cure)
            continue
        said, _, hint = text.partition("\nhint: ")
        said = " ".join(said.split())
        yield Message(f"{name}:{node.lineno}", area, said, code, " ".join(hint.split()) or _cure(kind, said))


def _cure(kind: str, text: str) -> str:
    """Cause and cure of a message whose text has no hint."""
    if kind in CURES["classes"]:
        return CURES["classes"][kind]
    for start, cure in CURES["messages"].items():
        if text.startswith(start):
            return cure
    return "The message has the command." if re.search(r"\bHINT\b", text) else ""


def _template(node: ast.expr) -> str | None:
    """The text of a message; values are words in capitals."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else _value(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return "".join(_template(side) or _value(side) for side in (node.left, node.right))
    return _template(node.body) if isinstance(node, ast.IfExp) else None


def _value(node: ast.AST) -> str:
    if isinstance(node, ast.IfExp) and isinstance(node.body, ast.Constant) and isinstance(node.orelse, ast.Constant):
        return str(node.body.value or node.orelse.value)  # the plural of a word
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and isinstance(node.left, ast.Constant):
        return str(node.left.value)
    code = ast.unparse(node)
    if "hint" in code.lower() or "_CONVERT" in code:
        return "HINT"
    names = [name for name in re.findall(r"[A-Za-z_]\w*", re.sub(r"'[^']*'", "", code)) if name not in _NO_NAMES]
    if any(name.endswith("sign_option") for name in names):
        return " [--sign KEYFILE]"
    return names[-1].strip("_").upper().replace("_", " ") if names else "VALUE"


def errors_page() -> str:
    """docs/reference/errors.md."""
    lines = [_HEAD]
    messages = find_messages()
    for area in dict.fromkeys(message.area for message in messages):
        title, about = CURES["areas"].get(area, [area, ""])
        lines += [f"## {title}", "", about, "", "| message | exit | what helps |", "|---|---|---|"]
        rows = {(message.text, message.code, message.cure) for message in messages if message.area == area}
        lines += [f"| {_cell(text)} | {code} | {_cell(cure)} |" for text, code, cure in sorted(rows)]
        lines.append("")
    warnings = {(warning.text, warning.cure) for warning in find_warnings()}
    lines += [_WARNINGS, *(f"| {_cell(text)} | {_cell(cure)} |" for text, cure in sorted(warnings)), ""]
    return "<!-- `make reference` writes this page from the code. -->\n\n" + "\n".join(lines)


def _cell(text: str) -> str:
    """Text that Markdown does not read as markup."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", text)
