"""Which rows are wanted: an expression over the columns of a table, as in `punsafe < 0.1 and AESTHETIC_SCORE > 5`.

It is written like Python, read with Python's parser, and never evaluated by it: what is not listed here is refused.

    and or not, < <= > >= == != (chained too), in [..], not in, is None, is not None
    numbers with + - * /, True, False, "text" or 'text' (as it stands: a backslash is a backslash)
    names of columns, `other names` or col("other names")
    len(caption)  lower(caption)  contains(caption, "cat")  match(caption, "^a (cat|dog)")

As in SQL a row with a missing value is not wanted by a comparison, nor by its opposite: only `is None` finds it. NaN
and what is divided by zero count as missing.
"""

import ast
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_LONGEST = 10_000  # characters
_DEEPEST = 60
_HINT = "and, or, not, comparisons, in [..], is None, + - * /, len, lower, contains, match"
_FUNCTIONS = {"len": 1, "lower": 1, "contains": 2, "match": 2, "col": 1}
_ORDER: dict[type[ast.cmpop], str] = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==",
                                      ast.NotEq: "!="}
_OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_MATH: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


@dataclass(frozen=True)
class _Column:
    name: str


@dataclass(frozen=True)
class _Literal:
    value: bool | int | float | str


@dataclass(frozen=True)
class _Math:
    sign: str
    left: "_Value"
    right: "_Value"


@dataclass(frozen=True)
class _Call:
    name: str  # len or lower
    value: "_Value"


_Value = _Column | _Literal | _Math | _Call


# Conditions. There is no `not` among them: it is carried down to each while parsing, so that a missing value makes
# neither a condition nor its opposite true.
@dataclass(frozen=True)
class _Many:
    every: bool  # and, or
    parts: tuple["_Condition", ...]


@dataclass(frozen=True)
class _Compare:
    sign: str
    left: _Value
    right: _Value


@dataclass(frozen=True)
class _In:
    value: _Value
    list: tuple[Any, ...]
    inside: bool


@dataclass(frozen=True)
class _Missing:
    value: _Value
    missing: bool


@dataclass(frozen=True)
class _Find:
    how: str  # contains or match
    value: _Value
    pattern: str
    found: bool


@dataclass(frozen=True)
class _Flag:
    value: _Column | _Literal
    true: bool


_Condition = _Many | _Compare | _In | _Missing | _Find | _Flag


@dataclass(frozen=True)
class Where:
    """An expression that says of every row of a table whether it is wanted."""

    text: str
    columns: tuple[str, ...]
    """The columns it names, in order of appearance."""
    _condition: _Condition

    @staticmethod
    def parse(text: str) -> "Where":
        """Read an expression; ValueError says what is wrong with it."""
        condition = _Parser(text).condition()
        columns = tuple(dict.fromkeys(value.name for value in _values(condition) if isinstance(value, _Column)))
        if not columns:
            raise ValueError(f"{_short(text)} names no column, so it says the same of every row\n"
                             f"hint: an example is punsafe < 0.1 and AESTHETIC_SCORE > 5")
        return Where(text, columns, condition)

    @property
    def expression(self) -> pc.Expression:
        """The same for pyarrow (a dataset's filter), of columns of integers, float32, float64, string and bool."""
        return _Arrow(None).condition(self._condition)

    def check(self, schema: pa.Schema) -> None:
        """Refuse columns that a table does not have, or whose type does not suit, before a row is read."""
        for name in self.columns:
            found = schema.get_all_field_indices(name)
            if not found:
                same = [other for other in schema.names if other.lower() == name.lower()]
                raise ValueError(f"there is no column {name} for {_short(self.text)}\nhint: "
                                 + (f"it is written {same[0]}" if same else f"the columns are {_listed(schema.names)}"))
            if len(found) > 1:
                raise ValueError(f"the column {name} of {_short(self.text)} is there {len(found)} times\n"
                                 f"hint: rename all but one")
        _Types(schema, self.text).condition(self._condition)

    def cast(self, table: pa.Table) -> pa.Table:
        """The table of a CSV file with its text columns as numbers (float64) where the expression takes them for such.

        Text is taken for a number if it is compared with one or calculated with, or if two columns are put in order
        (`width > height`). A cell that is no number becomes a missing value.
        """
        for name, kind in _uses(self._condition, table.schema).items():
            index = table.schema.get_field_index(name)
            if kind == "number" and index >= 0 and _kind(table.schema.field(index).type) == "text":
                numbers = [_numbers(chunk) for chunk in table.column(index).chunks]
                table = table.set_column(index, name, pa.chunked_array(numbers, pa.float64()))
        return table

    def mask(self, table: pa.Table) -> np.ndarray:
        """For every row whether it is wanted, as bool (N,)."""
        self.check(table.schema)
        if not table.num_rows:
            return np.zeros(0, bool)
        uses = _uses(self._condition, table.schema)
        plain = pa.table({name: _plain(table.column(name), uses.get(name, "")) for name in self.columns})
        expression = _Arrow(plain.schema).condition(self._condition)
        try:
            import pyarrow.dataset as ds  # 44 MB, for those who filter
            found = ds.dataset(plain).to_table(columns={"mask": expression}, use_threads=False)["mask"]
        except pa.ArrowException as error:
            raise ValueError(f"{_short(self.text)} cannot be worked out: {error}") from None
        return found.fill_null(False).to_numpy(zero_copy_only=False).astype(bool, copy=False)

    def row_groups(self, file: Any) -> list[int]:
        """The numbers of the row groups that can have a row that is wanted, by the file's statistics alone.

        `file` is a ParquetFile, or a ParquetFileFragment of a pyarrow dataset.
        """
        metadata = file.metadata
        numbers = (range(metadata.num_row_groups) if isinstance(file, pq.ParquetFile)
                   else [group.id for group in file.row_groups])
        # Of a column below another one the path is not the name.
        places = {metadata.schema.column(number).path: number for number in range(metadata.num_columns)
                  if metadata.schema.column(number).path == metadata.schema.column(number).name
                  and metadata.schema.column(number).max_repetition_level == 0}
        result = []
        for number in numbers:
            group = metadata.row_group(number)
            ranges = {name: _range(group.column(places[name])) for name in self.columns if name in places}
            if group.num_rows and _possible(self._condition, ranges):
                result.append(number)
        return result


class _Parser:
    """One text -> one condition."""

    def __init__(self, text: str) -> None:
        self.text = text
        if not text.strip():
            raise ValueError("the expression is empty\nhint: an example is punsafe < 0.1 and AESTHETIC_SCORE > 5")
        if len(text) > _LONGEST:
            raise ValueError(f"the expression has {len(text)} characters, {_LONGEST} are allowed")
        quoted = self._quoted().strip()
        try:
            self.tree = ast.parse(quoted, mode="eval").body
        except SyntaxError as error:
            raise self.wrong(f"cannot be read: {error.msg}",
                             "names that are no Python names go into `backticks`, text into \"quotes\"") from None
        except (ValueError, MemoryError, RecursionError) as error:
            raise self.wrong(f"cannot be read: {str(error) or 'nested too deeply'}", _HINT) from None
        # Without recursion, before anything that recurses.
        level: list[ast.AST] = [self.tree]
        for _ in range(_DEEPEST):
            level = [child for node in level for child in ast.iter_child_nodes(node)]
        if level:
            raise self.wrong("is nested too deeply", f"{_DEEPEST} levels are allowed")

    def wrong(self, what: str, hint: str) -> ValueError:
        return ValueError(f"{_short(self.text)} {what}\nhint: {hint}")

    def source(self, node: ast.AST) -> str:
        return _short(ast.unparse(node))

    def _quoted(self) -> str:
        """The text on one line, what is quoted as Python quotes it, names in backticks as col("..")."""
        result, position, text = "", 0, self.text
        while position < len(text):
            sign = text[position]
            if sign in "'\"`":
                end = text.find(sign, position + 1)
                if end < 0:
                    raise self.wrong(f"has no second {sign}", "quotes and backticks come in pairs")
                inner = text[position + 1:end]
                if sign != "`" and re.search(r"(?<!\w)[rR]$", result):
                    result = result[:-1]  # r"..": what is quoted is taken as it stands anyway
                result += f"col({inner!r})" if sign == "`" else repr(inner)
                position = end + 1
                continue
            if sign == "#":
                raise self.wrong("has a # outside of quotes", "there are no comments")
            result += " " if sign in "\r\n\f" else sign
            position += 1
        return result

    def condition(self) -> _Condition:
        return self._condition(self.tree, True)

    def _condition(self, node: ast.AST, true: bool) -> _Condition:
        if isinstance(node, ast.BoolOp):
            parts = tuple(self._condition(part, true) for part in node.values)
            return _Many(isinstance(node.op, ast.And) == true, parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return self._condition(node.operand, not true)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = tuple(self._pair(left, sign, right, true)
                          for left, sign, right in zip(sides, node.ops, sides[1:], strict=False))
            return pairs[0] if len(pairs) == 1 else _Many(true, pairs)
        if isinstance(node, ast.Call) and self._name(node) in {"contains", "match"}:
            return self._find(node, true)
        value = self._value(node)
        if isinstance(value, _Column) or (isinstance(value, _Literal) and isinstance(value.value, bool)):
            return _Flag(value, true)
        raise self.wrong(f"has {self.source(node)} where a condition is wanted", f"compare it: {self.source(node)} > 0")

    def _pair(self, left: ast.expr, sign: ast.cmpop, right: ast.expr, true: bool) -> _Condition:
        if isinstance(sign, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self.wrong("has `is` with something other than None", "== compares")
            value = self._value(left)
            if isinstance(value, _Literal):
                raise self.wrong(f"asks whether {self.source(left)} is None", "that is asked of columns")
            return _Missing(value, isinstance(sign, ast.Is) == true)
        for side in (left, right):
            if isinstance(side, ast.Constant) and side.value is None:
                raise self.wrong("compares with None", "write `is None` or `is not None`")
        if isinstance(sign, ast.In | ast.NotIn):
            return self._in(left, right, isinstance(sign, ast.In) == true)
        one, other = self._value(left), self._value(right)
        kinds = {_literal_kind(one), _literal_kind(other)} - {""}
        if len(kinds) > 1:
            raise self.wrong(f"compares {self.source(left)} with {self.source(right)}, "
                             f"{_literal_kind(one)} with {_literal_kind(other)}", 'text is written "in quotes"')
        name = _ORDER[type(sign)] if true else _OPPOSITE[_ORDER[type(sign)]]
        if kinds == {"truth"} and name not in {"==", "!="}:
            raise self.wrong("puts True or False in an order", "== and != compare them")
        if isinstance(one, _Literal) and isinstance(other, _Literal):
            raise self.wrong(f"compares {self.source(left)} with {self.source(right)}, no column among them", _HINT)
        return _Compare(_TURNED[name], other, one) if isinstance(one, _Literal) else _Compare(name, one, other)

    def _in(self, left: ast.expr, right: ast.expr, inside: bool) -> _Condition:
        if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
            raise self.wrong(f"has `in` with {self.source(right)}",
                             'a list is wanted, as in x in ["a", "b"]; contains(x, "a") looks into text')
        value, values = self._value(left), []
        for element in right.elts:
            if isinstance(element, ast.Constant) and element.value is None:
                raise self.wrong("has None in a list", "write `or x is None`")
            literal = self._value(element)
            if not isinstance(literal, _Literal):
                raise self.wrong(f"has {self.source(element)} in a list", "lists hold numbers or texts")
            values.append(literal)
        kinds = {_literal_kind(literal) for literal in [value, *values]} - {""}
        if len(kinds) > 1:
            raise self.wrong(f"mixes {' and '.join(sorted(kinds))} in a list", 'text is written "in quotes"')
        if isinstance(value, _Literal):
            raise self.wrong(f"looks for {self.source(left)}, which is no column, in a list", "the column comes first")
        return _In(value, tuple(literal.value for literal in values), inside)

    def _find(self, node: ast.Call, found: bool) -> _Condition:
        name = self._name(node)
        value, pattern = self._value(node.args[0]), node.args[1]
        if not isinstance(pattern, ast.Constant) or not isinstance(pattern.value, str):
            raise self.wrong(f"has {self.source(pattern)} as the second of {name}", f'{name}(caption, "text")')
        if _literal_kind(value) not in {"", "text"} or isinstance(value, _Literal):
            raise self.wrong(f"has {self.source(node.args[0])} as the first of {name}", f'{name}(caption, "text")')
        if name == "match":
            try:
                pc.match_substring_regex(pa.array([""]), pattern.value)
            except pa.ArrowException as error:
                raise self.wrong(f"has a pattern that cannot be read: {error}", "patterns are those of RE2") from None
        return _Find(name, value, pattern.value, found)

    def _name(self, node: ast.Call) -> str:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in _FUNCTIONS:
            raise self.wrong(f"calls {self.source(node.func)}", f"functions are {', '.join(sorted(_FUNCTIONS))}")
        if node.keywords or len(node.args) != _FUNCTIONS[name]:
            raise self.wrong(f"calls {name} with {len(node.args) + len(node.keywords)} values",
                             f"it takes {_FUNCTIONS[name]}")
        return name

    def _value(self, node: ast.AST) -> _Value:
        if isinstance(node, ast.Name):
            return _Column(node.id)
        if isinstance(node, ast.Constant) and type(node.value) in {bool, int, float, str}:
            return self._literal(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            value = self._number(node.operand)
            if isinstance(value, _Literal):
                return _Literal(-value.value if isinstance(node.op, ast.USub) else value.value)  # type: ignore[operator]
            return _Math("-", _Literal(0), value) if isinstance(node.op, ast.USub) else value
        if isinstance(node, ast.BinOp) and type(node.op) in _MATH:
            sign, left, right = _MATH[type(node.op)], self._number(node.left), self._number(node.right)
            if isinstance(left, _Literal) and isinstance(right, _Literal):
                return self._literal(self._worked_out(sign, left.value, right.value, node))
            return _Math(sign, left, right)
        if isinstance(node, ast.Call):
            name = self._name(node)
            if name == "col":
                inner = node.args[0]
                if not isinstance(inner, ast.Constant) or not isinstance(inner.value, str):
                    raise self.wrong("calls col with something other than a text", 'col("the name")')
                return _Column(inner.value)
            if name in {"len", "lower"}:
                inner_value = self._value(node.args[0])
                if isinstance(inner_value, _Literal) or _literal_kind(inner_value) not in {"", "text"}:
                    raise self.wrong(f"calls {name} with {self.source(node.args[0])}", f"{name}(caption)")
                return _Call(name, inner_value)
        raise self.wrong(f"has {self.source(node)}, which is not among what is understood",
                         f"a column of that name goes into backticks: `{self.source(node)}`"
                         if isinstance(node, ast.Attribute) else _HINT)

    def _number(self, node: ast.AST) -> _Value:
        value = self._value(node)
        if _literal_kind(value) not in {"", "number"}:
            raise self.wrong(f"calculates with {self.source(node)}", "numbers are calculated with")
        return value

    def _literal(self, value: bool | int | float | str) -> _Literal:
        if isinstance(value, float) and not math.isfinite(value):
            raise self.wrong("has a number that is too large", "1e308 is the limit")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            raise self.wrong("has an integer of more than 64 bits", "write it with an exponent: 1e20")
        return _Literal(value)

    def _worked_out(self, sign: str, left: Any, right: Any, node: ast.AST) -> float:
        if sign == "/" and not right:
            raise self.wrong(f"divides by zero: {self.source(node)}", "a number other than 0")
        work: dict[str, Callable[[Any, Any], Any]] = {"+": lambda: left + right, "-": lambda: left - right,
                                                      "*": lambda: left * right, "/": lambda: left / right}
        return work[sign]()


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:60]) + (f" and {len(names) - 60} more" if len(names) > 60 else "")


def _literal_kind(value: _Value) -> str:
    """number, text or truth, as far as that can be seen without a table."""
    if isinstance(value, _Literal):
        return "truth" if isinstance(value.value, bool) else "text" if isinstance(value.value, str) else "number"
    if isinstance(value, _Column):
        return ""
    return "text" if isinstance(value, _Call) and value.name == "lower" else "number"


def _values(node: Any) -> Iterator[_Value]:
    """All values of a condition, in order."""
    if isinstance(node, _Many):
        for part in node.parts:
            yield from _values(part)
    elif isinstance(node, _Compare | _Math):
        if isinstance(node, _Math):
            yield node
        yield from _values(node.left)
        yield from _values(node.right)
    elif isinstance(node, _Column | _Literal):
        yield node
    else:
        if isinstance(node, _Call):
            yield node
        yield from _values(node.value)


def _conditions(condition: _Condition) -> Iterator[_Condition]:
    if isinstance(condition, _Many):
        for part in condition.parts:
            yield from _conditions(part)
    else:
        yield condition


def _kind(type_: pa.DataType) -> str:
    """number, text, truth, nothing (a column of nulls), or "" for what no expression can look at."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        return "number"
    if pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return "text"
    return "truth" if pa.types.is_boolean(type_) else "nothing" if pa.types.is_null(type_) else ""


def _uses(condition: _Condition, schema: pa.Schema) -> dict[str, str]:
    """What each column is taken for: number, text or truth, where the expression shows it."""
    uses: dict[str, str] = {}

    def use(value: _Value, kind: str) -> None:
        if isinstance(value, _Column) and kind:
            uses.setdefault(value.name, kind)

    def kind_of(value: _Value) -> str:
        if not isinstance(value, _Column):
            return _literal_kind(value)
        index = schema.get_field_index(value.name)
        known = _kind(schema.field(index).type) if index >= 0 else ""
        return uses.get(value.name, "") or (known if known in {"number", "truth"} else "")

    for value in _values(condition):
        if isinstance(value, _Math):
            use(value.left, "number")
            use(value.right, "number")
        elif isinstance(value, _Call):
            use(value.value, "text")
    found = list(_conditions(condition))
    for part in found:
        if isinstance(part, _Find):
            use(part.value, "text")
        elif isinstance(part, _Flag):
            use(part.value, "truth")
        elif isinstance(part, _In):
            use(part.value, _literal_kind(_Literal(part.list[0])))
    # a < b and b < 5: what is known of one column is known of the next, in whatever order they stand.
    for _ in range(len(schema.names) + 1):
        before = len(uses)
        for part in found:
            if isinstance(part, _Compare):
                use(part.left, kind_of(part.right))
                use(part.right, kind_of(part.left))
        if len(uses) == before:
            break
    for part in found:
        if isinstance(part, _Compare) and part.sign not in {"==", "!="} and not (kind_of(part.left)
                                                                                 or kind_of(part.right)):
            use(part.left, "number")
            use(part.right, "number")
    return uses


class _Types:
    """Whether the types of a table suit a condition."""

    def __init__(self, schema: pa.Schema, text: str) -> None:
        self.schema, self.text = schema, text

    def wrong(self, what: str, hint: str) -> ValueError:
        return ValueError(f"{what} in {_short(self.text)}\nhint: {hint}")

    def told(self, value: _Value) -> str:
        if isinstance(value, _Column):
            return f"the column {value.name} ({self.schema.field(value.name).type})"
        if isinstance(value, _Literal):
            return f"the {self.kind(value)} {value.value!r}"
        return f"{value.name}(..)" if isinstance(value, _Call) else "a calculation"

    def kind(self, value: _Value) -> str:
        if not isinstance(value, _Column):
            for inner, wanted in self._inner(value):
                if self.kind(inner) not in {wanted, "nothing"}:
                    does = f"{value.name}(..) takes" if isinstance(value, _Call) else "+ - * / take"
                    raise self.wrong(f"{self.told(inner)} is no {wanted}, which {does},",
                                     f"{', '.join(self._columns(wanted)) or 'no column'} would do")
            return _literal_kind(value)
        kind = _kind(self.schema.field(value.name).type)
        if not kind:
            raise self.wrong(f"{self.told(value)} is neither number nor text nor truth", "other columns can be asked")
        return kind

    def _columns(self, kind: str) -> list[str]:
        return [name for name in self.schema.names[:60] if _kind(self.schema.field(
            self.schema.get_all_field_indices(name)[0]).type) == kind]

    def _inner(self, value: _Value) -> list[tuple[_Value, str]]:
        if isinstance(value, _Math):
            return [(value.left, "number"), (value.right, "number")]
        return [(value.value, "text")] if isinstance(value, _Call) else []

    def condition(self, condition: _Condition) -> None:
        for part in _conditions(condition):
            if isinstance(part, _Compare):
                self.same(part.left, part.right, "is compared with")
                if part.sign not in {"==", "!="} and self.kind(part.left) == "truth":
                    raise self.wrong(f"{self.told(part.left)} is put in an order", "== and != compare True and False")
            elif isinstance(part, _In):
                self.same(part.value, _Literal(part.list[0]), "is looked for beside")
            elif isinstance(part, _Find) and self.kind(part.value) not in {"text", "nothing"}:
                raise self.wrong(f"{self.told(part.value)} is no text, which {part.how}(..) takes,",
                                 f"{', '.join(self._columns('text')) or 'no column'} would do")
            elif isinstance(part, _Flag) and self.kind(part.value) not in {"truth", "nothing"}:
                raise self.wrong(f"{self.told(part.value)} is neither true nor false", "compare it with something")
            elif isinstance(part, _Missing):
                self.kind(part.value)

    def same(self, left: _Value, right: _Value, verb: str) -> None:
        kinds = {self.kind(left), self.kind(right)}
        if len(kinds - {"nothing"}) > 1:
            hint = "both sides must be numbers, or texts"
            if self.kind(left) == "text" and isinstance(right, _Literal):
                hint = f'text is compared with text: "{right.value}"'
            raise self.wrong(f"{self.told(left)} {verb} {self.told(right)}", hint)


class _Arrow:
    """Conditions as Arrow's expressions, of columns with the types of a schema, or with any that are usual."""

    def __init__(self, schema: pa.Schema | None) -> None:
        self.schema = schema

    def condition(self, condition: _Condition) -> pc.Expression:
        if isinstance(condition, _Many):
            result = self.condition(condition.parts[0])
            for part in condition.parts[1:]:
                result = result & self.condition(part) if condition.every else result | self.condition(part)
            return result
        if isinstance(condition, _Compare):
            return self.compare(condition)
        if isinstance(condition, _In):
            return self.among(condition)
        value = self.value(condition.value)
        if isinstance(condition, _Flag):
            return value if condition.true else ~value
        if isinstance(condition, _Missing):
            return value.is_null() | (value != value) if condition.missing else value.is_valid() & (value == value)
        find = pc.match_substring if condition.how == "contains" else pc.match_substring_regex
        result = find(value, condition.pattern)
        return result if condition.found else ~result

    def compare(self, condition: _Compare) -> pc.Expression:
        one, other = self.value(condition.left), self.value(condition.right)
        # Arrow's own common types are float32 for an integer and 0.5, int64 for uint64 and 5: both lose values.
        types = [self.type(side) for side in (condition.left, condition.right)]
        literal = condition.right.value if isinstance(condition.right, _Literal) else None
        if types[0] == pa.uint64() and type(literal) is int and literal >= 0:
            other = pc.scalar(pa.scalar(literal, pa.uint64()))
        elif type(literal) is float or self.apart(*types) or (type(literal) is int and literal >= 1 << 63):
            one, other = one.cast(pa.float64(), safe=False), (
                pc.scalar(float(literal)) if literal is not None else other.cast(pa.float64(), safe=False))
        if condition.sign == "!=":
            # NaN differs from everything, and is not wanted. Of text and truth nothing does from itself.
            return (one != other) & (one == one) & (other == other)
        signs: dict[str, Callable[[pc.Expression, pc.Expression], pc.Expression]] = {
            "<": pc.Expression.__lt__, "<=": pc.Expression.__le__, ">": pc.Expression.__gt__,
            ">=": pc.Expression.__ge__, "==": pc.Expression.__eq__}
        return signs[condition.sign](one, other)

    def among(self, condition: _In) -> pc.Expression:
        value, values, type_ = self.value(condition.value), list(condition.list), self.type(condition.value)
        if type_ == pa.uint64() and all(type(each) is int for each in values):
            values, type_ = [each for each in values if each >= 0], pa.uint64()
        elif _literal_kind(_Literal(values[0])) == "number":
            whole = all(type(each) is int and each < 1 << 63 for each in values)
            type_ = pa.int64() if whole and (type_ is None or pa.types.is_integer(type_)) else pa.float64()
            if type_ == pa.float64():
                value, values = value.cast(type_, safe=False), list(map(float, values))
        else:
            type_ = None
        result = value.isin(pa.array(values, type_))
        # `isin` says false of a missing value, so its opposite has to be told.
        return result if condition.inside else ~result & (value == value)

    def value(self, value: _Value) -> pc.Expression:
        if isinstance(value, _Column):
            return pc.field(value.name)
        if isinstance(value, _Literal):
            large = isinstance(value.value, int) and value.value >= 1 << 63
            return pc.scalar(float(value.value) if large else value.value)
        if isinstance(value, _Call):
            return (pc.utf8_length if value.name == "len" else pc.utf8_lower)(self.value(value.value))
        left, right = (self.value(side).cast(pa.float64(), safe=False) for side in (value.left, value.right))
        if value.sign == "/":
            return pc.if_else(right == 0.0, pc.scalar(pa.scalar(None, pa.float64())), pc.divide(left, right))
        return {"+": pc.add, "-": pc.subtract, "*": pc.multiply}[value.sign](left, right)

    def type(self, value: _Value) -> pa.DataType | None:
        if isinstance(value, _Column):
            return self.schema.field(value.name).type if self.schema is not None else None
        if isinstance(value, _Literal):
            return pa.int64() if type(value.value) is int else None
        return pa.float64() if isinstance(value, _Math) else None

    @staticmethod
    def apart(*types: pa.DataType | None) -> bool:
        """Whether two types of numbers have none in common but float64: integers with floats, and the widest."""
        one, other = types
        if one is None or other is None or one == other:
            return False
        both = pa.types.is_integer(one) and pa.types.is_integer(other)
        return _kind(one) == _kind(other) == "number" and (not both or pa.uint64() in types)


def _numbers(column: pa.Array) -> pa.Array:
    """Texts as float64, null where they are none."""
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    valid = pc.match_substring_regex(text, r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$")
    return pc.utf8_ltrim(pc.if_else(valid, text, None), "+").cast(pa.float64())


def _plain(column: pa.ChunkedArray, use: str) -> pa.ChunkedArray:
    """A column in one of the types that Arrow can do everything with that is asked here."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        return column.cast({"text": pa.string(), "truth": pa.bool_()}.get(use, pa.float64()))
    if pa.types.is_string_view(column.type):
        return column.cast(pa.large_string())
    if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        return column.cast(pa.float64(), safe=False)
    return column


def _range(chunk: pq.ColumnChunkMetaData) -> tuple[Any, Any, int | None, int]:
    """Lowest and highest value (None: not known), number of nulls (None: not known), number of rows."""
    statistics, rows = chunk.statistics, chunk.num_values
    if statistics is None:
        return None, None, None, rows
    nulls = statistics.null_count if statistics.has_null_count else None
    if not statistics.has_min_max:
        return None, None, nulls, rows
    low, high = statistics.min, statistics.max
    known = type(low) is type(high) and type(low) in {bool, int, float, str} and low <= high  # not so of NaN
    # Unsigned 64-bit integers come with a sign.
    if known and type(low) is int and low < 0 and "UINT" in str(statistics.converted_type):
        known = False
    return (low, high, nulls, rows) if known else (None, None, nulls, rows)


def _possible(condition: _Condition, ranges: dict[str, tuple[Any, Any, int | None, int]]) -> bool:
    """Whether a row within these ranges can fulfil the condition; true if in doubt."""
    if isinstance(condition, _Many):
        return (all if condition.every else any)(_possible(part, ranges) for part in condition.parts)
    value = condition.left if isinstance(condition, _Compare) else condition.value
    if isinstance(value, _Literal):  # only True and False come here
        return not isinstance(condition, _Flag) or bool(value.value) == condition.true
    names = {inner.name for inner in _values(condition) if isinstance(inner, _Column) and inner.name in ranges}
    empty = any(ranges[name][2] == ranges[name][3] for name in names)
    if isinstance(condition, _Missing):
        return condition.missing or not empty  # a range says nothing of NaN
    if empty:
        return False
    if not isinstance(value, _Column) or value.name not in ranges:
        return True
    low, high = ranges[value.name][:2]
    if isinstance(condition, _Flag):
        return not isinstance(low, bool) or low == condition.true or high == condition.true
    if isinstance(condition, _In):
        return not condition.inside or any(_within("==", low, high, each) for each in condition.list)
    if isinstance(condition, _Compare) and isinstance(condition.right, _Literal):
        return _within(condition.sign, low, high, condition.right.value)
    return True


def _within(sign: str, low: Any, high: Any, value: Any) -> bool:
    alike = {bool: "truth", int: "number", float: "number", str: "text"}
    if low is None or alike[type(low)] != alike[type(value)]:
        return True
    # A float and an integer meet as floats in `mask` too.
    if isinstance(value, float):
        low, high = float(low), float(high)
    elif isinstance(low, float):
        value = float(value)
    if sign in {"<", "<="}:
        return low < value or (sign == "<=" and low == value)
    if sign in {">", ">="}:
        return high > value or (sign == ">=" and high == value)
    return low <= value <= high if sign == "==" else not low == high == value
