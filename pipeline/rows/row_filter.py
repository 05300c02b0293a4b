"""The row filter of `--where`: which rows of a table to keep, as in `punsafe < 0.1 and AESTHETIC_SCORE > 5`.

docs/guides/ingest/row-filter.md describes the language. sqlglot parses the text, and pyarrow evaluates the result,
batch by batch. The same Arrow expression prunes the row groups of a parquet file.

sqlglot was chosen over DuckDB and Polars SQL because it executes nothing. So an expression cannot open a file, read
the environment or run a second statement. DuckDB and Polars also order NaN above all numbers: `score > 5` keeps NaN.
"""

import contextlib
import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from sqlglot import exp

from pipeline.rows import row_filter_syntax as syntax
from pipeline.rows.column_types import text_to_numbers

_ARGUMENTS = {"len": 1, "lower": 1, "contains": 2, "match": 2, "col": 1}
_ARITHMETIC: dict[type[exp.Expr], Callable[..., Any]] = {
    exp.Add: operator.add, exp.Sub: operator.sub, exp.Mul: operator.mul, exp.Div: operator.truediv,
    exp.Neg: lambda side: pc.negate(side) if isinstance(side, pc.Expression) else -side}
_APPLY: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}
_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
_SWAPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_HELD_BY_INT64 = {pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32()}
_MISSING = pc.scalar(pa.scalar(None, pa.bool_()))


class _Value(NamedTuple):
    """One side of a comparison."""

    kind: str
    """number, text, truth, nothing (a column of nulls), or "" for a column without a schema."""
    name: str
    arrow: pc.Expression
    type: pa.DataType | None = None
    literal: Any = None
    column: str = ""


@dataclass(frozen=True)
class RowFilter:
    """An expression that says of every row of a table whether to keep it."""

    text: str
    columns: tuple[str, ...]
    """The columns that it names, in order of appearance."""

    @staticmethod
    def parse(text: str) -> "RowFilter":
        """Read an expression; ValueError says what is wrong with it."""
        columns = tuple(_translate(text, None).columns)
        if not columns:
            raise syntax.syntax_error(text, "names no column, so it says the same of every row", syntax.EXAMPLE)
        return RowFilter(text, columns)

    def expression(self, schema: pa.Schema) -> pc.Expression:
        """True for the rows to keep, as pyarrow's filters take it."""
        return _translate(self.text, schema).expression

    def check(self, schema: pa.Schema) -> None:
        """Refuse columns that a table does not have, or whose type does not suit, before a row is read."""
        self.expression(schema)

    def cast(self, table: pa.Table) -> pa.Table:
        """The table of a CSV file with its text columns as float64 where the expression uses them as numbers.

        Text is a number if it is compared with one or calculated with, or if two columns are put in order
        (`width > height`). A cell that is no number becomes a missing value.
        """
        for name in _number_columns(_translate(self.text, None), table.schema):
            index = table.schema.get_field_index(name)
            if index >= 0 and _kind(table.schema.field(index).type) == "text":
                numbers = [text_to_numbers(chunk) for chunk in table.column(index).chunks]
                table = table.set_column(index, name, pa.chunked_array(numbers, pa.float64()))
        return table

    def mask(self, table: pa.Table) -> np.ndarray:
        """Whether to keep each row, as bool (N,)."""
        columns, rows = {"mask": self.expression(table.schema)}, table.select(list(self.columns))
        try:
            kept = ds.dataset(rows).to_table(columns=columns, use_threads=False)["mask"]
        except pa.ArrowException as problem:
            raise ValueError(f"{syntax.shorten(self.text)} cannot be evaluated: {problem}") from None
        return kept.fill_null(False).to_numpy(zero_copy_only=False).astype(bool, copy=False)

    def row_groups(self, file: pq.ParquetFile | ds.ParquetFileFragment) -> list[int]:
        """The numbers of the row groups that can have a row to keep, by their statistics alone."""
        if isinstance(file, pq.ParquetFile):
            footer = pa.BufferOutputStream()
            file.metadata.write_metadata_file(footer)  # a fragment of the file itself would read the footer again
            file = ds.ParquetFileFormat().make_fragment(footer.getvalue())
        translation = _translate(self.text, file.physical_schema, prunes=True)
        with contextlib.suppress(pa.ArrowInvalid):  # float64 cannot hold a statistic: all row groups are read
            file = file.subset(filter=translation.expression)
        return [group.id for group in file.row_groups]


class _Translation:
    """The Arrow expression of a text for the columns of a schema; without a schema it only checks the text.

    `prunes`: the expression may also be true of rows to leave out, so that no row group to read is lost.
    """

    def __init__(self, text: str, schema: pa.Schema | None, prunes: bool = False) -> None:
        self.schema, self.prunes, self.text = schema, prunes, text
        self.error = functools.partial(syntax.syntax_error, text)
        self.columns: dict[str, None] = {}
        self.uses: dict[str, str] = {}
        """Columns by name, as number, text or truth."""
        self.compared: list[tuple[_Value, str, _Value]] = []
        self.expression = self.condition(syntax.parse(text), True)

    def condition(self, node: exp.Expr, true: bool) -> pc.Expression:
        """`node`, or its negation, which is applied to each comparison: a missing value makes neither true."""
        if isinstance(node, exp.Paren):
            return self.condition(node.this, true)
        if isinstance(node, exp.Connector):
            parts = [self.condition(part, true) for part in node.flatten(unnest=False)]
            return functools.reduce(operator.and_ if isinstance(node, exp.And) == true else operator.or_, parts)
        if pairs := syntax.pairs(node):
            parts = [self.pair(first_node, sign, second_node, true) for first_node, sign, second_node in pairs]
            return functools.reduce(operator.and_ if true else operator.or_, parts)
        if isinstance(node, exp.Not):
            return self.condition(node.this, not true)
        if isinstance(node, exp.Anonymous) and node.name in {"contains", "match"}:
            return self.find(node) if true else ~self.find(node)
        value = self.use(self.value(node), "truth")
        if value.kind not in {"truth", "nothing", ""}:
            what = ", which is neither true nor false" if value.column else " where a condition is wanted"
            raise self.error(f"has {value.name}{what}", f"compare it: {syntax.source_text(node)} > 0")
        return _MISSING if value.kind == "nothing" else value.arrow == pc.scalar(true)

    def pair(self, first_node: exp.Expr, sign: str, second_node: exp.Expr, true: bool) -> pc.Expression:
        negated = sign.startswith("not ") == true
        if sign.endswith("is"):
            return self.missing(first_node, second_node, negated)
        if isinstance(first_node, exp.Null) or isinstance(second_node, exp.Null):
            raise self.error("compares with None", "write `is None` or `is not None`")
        if sign.endswith("in"):
            return self.member(first_node, second_node, negated)
        first, second = self.value(first_node), self.value(second_node)
        self.same_kind(first, second)
        if first.literal is not None:
            first, second, sign = second, first, _SWAPPED[sign]
        if first.literal is not None:
            raise self.error(f"compares {second.name} with {first.name}, no column among them", syntax.OPERATORS)
        self.compared.append((first, sign, second))
        if "truth" in {first.kind, second.kind} and sign not in {"==", "!="}:
            raise self.error(f"puts {first.name} and {second.name} in an order", "== and != compare True and False")
        if {"nothing", ""} & {first.kind, second.kind}:
            return _MISSING
        return _compare(first, sign if true else _NEGATED[sign], second)

    def same_kind(self, first: _Value, second: _Value) -> None:
        if len({first.kind, second.kind} - {"nothing", ""}) > 1:
            column_of_text = first.kind == "text" and second.literal is not None
            raise self.error(f"is wrong: {first.name} is compared with {second.name}, {first.kind} with {second.kind}",
                             f'text is compared with text: "{second.literal}"' if column_of_text else
                             "both sides must be numbers, or texts")

    def missing(self, value_node: exp.Expr, none_node: exp.Expr, negated: bool) -> pc.Expression:
        if not isinstance(none_node, exp.Null):
            raise self.error("has `is` with something other than None", syntax.foreign_hint(self.text) or
                             "== compares, `is None` finds missing values")
        value = self.value(value_node)
        if value.literal is not None:
            raise self.error(f"asks whether {value.name} is None", "write `is None` of columns")
        if value.type is None or not pa.types.is_floating(value.type):
            return value.arrow.is_valid() if negated else value.arrow.is_null()
        if negated:
            return value.arrow == value.arrow
        # Statistics leave NaN out, and pyarrow does not allow for that: it would prune the row groups of NaN.
        return pc.scalar(True) if self.prunes else value.arrow.is_null(nan_is_null=True)

    def member(self, value_node: exp.Expr, list_node: exp.Expr, negated: bool) -> pc.Expression:
        if not isinstance(list_node, exp.Tuple | exp.Struct) or not list_node.expressions:
            raise self.error("has `in` without a list; a list is wanted, as in x in [1, 2]",
                             'contains(x, "a") looks into text')
        if any(isinstance(element, exp.Null) for element in list_node.expressions):
            raise self.error("has None in a list", "write `or x is None`")
        value, elements = self.value(value_node), [self.value(element) for element in list_node.expressions]
        if wrong := [element.name for element in elements if element.literal is None]:
            raise self.error(f"has {wrong[0]} in a list", "lists hold numbers or texts")
        if len(kinds := sorted({element.kind for element in elements})) > 1:
            raise self.error(f"mixes {' and '.join(kinds)} in a list", 'text is written "in quotes"')
        if value.literal is not None:
            raise self.error(f"looks for {value.name}, which is no column, in a list", "the column comes first")
        self.same_kind(self.use(value, kinds[0]), elements[0])
        if value.kind in {"nothing", ""}:
            return _MISSING
        contained = self.is_in(value, elements)
        # `isin` is false of a missing value, and its negation must be too.
        return ~contained & (value.arrow == value.arrow) if negated else contained

    def is_in(self, value: _Value, elements: list[_Value]) -> pc.Expression:
        literals = [element.literal for element in elements]
        if value.kind != "number":
            return value.arrow.isin(pa.array(literals))
        whole = not any(isinstance(literal, float) for literal in literals)
        if value.type == pa.uint64() and whole:
            return value.arrow.isin(pa.array([literal for literal in literals if literal >= 0], pa.uint64()))
        if value.type in _HELD_BY_INT64 and {element.type for element in elements} == {pa.int64()}:
            return value.arrow.isin(pa.array(literals, pa.int64()))
        # `isin` tells -0.0 from 0.0, which `==` and statistics do not.
        numbers = [*map(float, literals), *[-0.0, 0.0] * (0 in literals)]
        return _float64(value).isin(pa.array(numbers, pa.float64()))

    def find(self, node: exp.Anonymous) -> pc.Expression:
        value, pattern = self.text_argument(node), self.value(node.expressions[1])
        if not isinstance(pattern.literal, str):
            raise self.error(f"has {pattern.name} as the second of {node.name}", f'{node.name}(caption, "text")')
        search = pc.match_substring if node.name == "contains" else pc.match_substring_regex
        try:
            search(pa.array([""]), pattern.literal)
        except pa.ArrowException as problem:
            raise self.error(f"has a pattern that cannot be read: {problem}", "patterns are those of RE2") from None
        return search(value, pattern.literal)

    def value(self, node: exp.Expr) -> _Value:
        if isinstance(node, exp.Paren):
            return self.value(node.this)
        if isinstance(node, exp.Column) and len(node.parts) == 1 and isinstance(node.this, exp.Identifier):
            return self.column(node.name)
        if isinstance(node, exp.Boolean | exp.Literal | exp.Concat):
            return self.literal(node)
        if type(node) in _ARITHMETIC:
            return self.arithmetic(node)
        if isinstance(node, exp.Anonymous):
            name = self.function(node)
            if name == "col":
                if not isinstance(node.expressions[0], exp.Literal) or not node.expressions[0].is_string:
                    raise self.error("calls col with something other than a text", 'col("the name")')
                return self.column(node.expressions[0].name)
            if name == "len":
                length = pc.utf8_length(self.text_argument(node)).cast(pa.int64())
                return _Value("number", "len(..)", length, pa.int64())
            if name == "lower":
                return _Value("text", "lower(..)", pc.utf8_lower(self.text_argument(node)))
        hint = syntax.OPERATORS
        if isinstance(node, exp.Column | exp.Dot):
            hint = syntax.foreign_hint(self.text) or (
                f"a column of that name goes into backticks: `{syntax.source_text(node)}`")
        elif isinstance(node, exp.Predicate | exp.Not | exp.Connector):
            hint = "join two conditions with `and`, as in a < b and b is None"
        raise self.error(f"has {syntax.source_text(node)}, which is not among what is understood", hint)

    def column(self, name: str) -> _Value:
        self.columns.setdefault(name)
        if self.schema is None:
            return _Value("", f"the column {name}", pc.field(name), column=name)
        indices = self.schema.get_all_field_indices(name)
        if not indices:
            same = [f"it is written {other}" for other in self.schema.names if other.lower() == name.lower()]
            raise self.error(f"finds no column {name} in the table", *same[:1] or [
                syntax.foreign_name(name) or f"the columns are {syntax.join_names(self.schema.names)}"])
        if len(indices) > 1:
            raise self.error(f"names the column {name}, which the table has {len(indices)} times", "rename all but one")
        stored, arrow = self.schema.field(indices[0]).type, pc.field(name)
        kind, plain, shown = _kind(stored), _plain_type(stored), f"the column {name} ({stored})"
        if not kind:
            raise self.error(f"has {shown}, which is neither number nor text nor truth", "name another column")
        return _Value(kind, shown, arrow if plain == stored else arrow.cast(plain, safe=False), plain, column=name)

    def literal(self, node: exp.Expr) -> _Value:
        if isinstance(node, exp.Boolean):
            return _Value("truth", f"the truth {node.this}", pc.scalar(node.this), literal=node.this)
        if isinstance(node, exp.Concat) or node.is_string:
            text = "".join(part.name for part in node.expressions) if isinstance(node, exp.Concat) else node.name
            return _Value("text", f"the text {text!r}", pc.scalar(text), literal=text)
        try:
            number = int(node.name) if node.name.isdigit() else float(node.name)
        except ValueError:  # int() refuses thousands of digits
            raise self.error("has a number that cannot be read", "write it with an exponent: 1e20") from None
        return self.number(number)

    def number(self, value: int | float) -> _Value:
        if isinstance(value, int) and abs(value) >= 1 << 64:
            raise self.error("has an integer of more than 64 bits", "write it with an exponent: 1e20")
        if not math.isfinite(value):
            raise self.error("has a number that is too large", "1e308 is the limit")
        if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
            return _Value("number", f"the number {value}", pc.scalar(value), pa.int64(), value)
        return _Value("number", f"the number {value}", pc.scalar(float(value)), pa.float64(), value)

    def arithmetic(self, node: exp.Expr) -> _Value:
        sides = [self.use(self.value(node.args[key]), "number") for key in ("this", "expression") if key in node.args]
        for side in sides:
            if side.kind not in {"number", "nothing", ""}:
                raise self.error(f"calculates with {side.name}, which is no number", self.suggestion("number"))
        work = _ARITHMETIC[type(node)]
        if all(side.literal is not None for side in sides):
            try:
                return self.number(work(*(side.literal for side in sides)))
            except ZeroDivisionError:
                raise self.error(f"divides by zero: {syntax.source_text(node)}", "use a number other than 0") from None
        parts = [_float64(side) for side in sides]
        if isinstance(node, exp.Div):  # by zero: missing
            parts[1] = pc.if_else(parts[1] == 0.0, pc.scalar(pa.scalar(None, pa.float64())), parts[1])
        return _Value("number", f"the calculation {syntax.source_text(node)}", work(*parts), pa.float64())

    def function(self, node: exp.Anonymous) -> str:
        if node.name not in _ARGUMENTS:
            raise self.error(f"calls {node.name}", syntax.foreign_name(node.name) or syntax.foreign_hint(node.name) or
                             f"functions are {', '.join(sorted(_ARGUMENTS))}")
        if len(node.expressions) != _ARGUMENTS[node.name]:
            raise self.error(f"calls {node.name} with {len(node.expressions)} values",
                             f"it takes {_ARGUMENTS[node.name]}")
        return str(node.name)

    def text_argument(self, node: exp.Anonymous) -> pc.Expression:
        """The first value of a function of text."""
        name = self.function(node)
        value = self.use(self.value(node.expressions[0]), "text")
        if value.literal is not None or value.kind not in {"text", "nothing", ""}:
            example = f"{name}(caption)" if _ARGUMENTS[name] == 1 else f'{name}(caption, "text")'
            raise self.error(f"is wrong: {value.name} is no text, which {name}(..) takes as the first",
                             self.suggestion("text") if self.schema is not None else example)
        return value.arrow.cast(pa.string()) if value.kind == "nothing" else value.arrow

    def use(self, value: _Value, kind: str) -> _Value:
        self.uses.setdefault(value.column, kind)  # "" if it is no column
        return value

    def suggestion(self, kind: str) -> str:
        names = [field.name for field in self.schema or () if _kind(field.type) == kind]
        return f"{syntax.join_names(names) or kind} would do"


_translate = functools.lru_cache(64)(_Translation)


def _compare(first: _Value, sign: str, second: _Value) -> pc.Expression:
    """A comparison that is never true of NaN."""
    first_operand, second_operand, types = first.arrow, second.arrow, {first.type, second.type}
    if first.type == pa.uint64() and isinstance(second.literal, int) and second.literal >= 0:
        second_operand = pc.scalar(pa.scalar(second.literal, pa.uint64()))
    elif first.kind == "number" and len(types) > 1 and not types <= _HELD_BY_INT64:
        # Arrow's own common types are float32 for an integer and a float32, int64 for uint64 and 5: both lose values.
        first_operand, second_operand = _float64(first), _float64(second)
    result = _APPLY[sign](first_operand, second_operand)
    return result & (first_operand == first_operand) & (second_operand == second_operand) if sign == "!=" else result


def _float64(value: _Value) -> pc.Expression:
    if value.literal is not None:
        return pc.scalar(float(value.literal))
    return value.arrow if value.type == pa.float64() else value.arrow.cast(pa.float64(), safe=False)


def _kind(data_type: pa.DataType) -> str:
    """number, text, truth, nothing (a column of nulls), or "" for a type that no expression can use."""
    data_type = data_type.value_type if pa.types.is_dictionary(data_type) else data_type
    if pa.types.is_integer(data_type) or pa.types.is_floating(data_type) or pa.types.is_decimal(data_type):
        return "number"
    if pa.types.is_string(data_type) or pa.types.is_large_string(data_type) or pa.types.is_string_view(data_type):
        return "text"
    return "truth" if pa.types.is_boolean(data_type) else "nothing" if pa.types.is_null(data_type) else ""


def _plain_type(data_type: pa.DataType) -> pa.DataType:
    """The type to cast a column to, one for which Arrow has all functions."""
    data_type = data_type.value_type if pa.types.is_dictionary(data_type) else data_type
    if pa.types.is_float16(data_type) or pa.types.is_decimal(data_type):
        return pa.float64()
    return pa.large_string() if pa.types.is_string_view(data_type) else data_type


def _number_columns(translation: _Translation, schema: pa.Schema) -> list[str]:
    """The columns that an expression uses as numbers."""
    uses = {column: kind for column, kind in translation.uses.items() if column}

    def kind_of(value: _Value) -> str:
        index = schema.get_field_index(value.column) if value.column else -1
        known = _kind(schema.field(index).type) if index >= 0 else value.kind
        return uses.get(value.column, "") or (known if index < 0 or known in {"number", "truth"} else "")

    # `a < b and b < 5`: b is a number, so a is one too. The order of the comparisons does not matter.
    both_orders = [pair for first, _, second in translation.compared for pair in ((first, second), (second, first))]
    for _ in range(1 + len(translation.columns)):
        for value, other in both_orders:
            if value.column and kind_of(other):
                uses.setdefault(value.column, kind_of(other))
    for first, sign, second in translation.compared:
        if sign not in {"==", "!="} and not kind_of(first) and not kind_of(second):
            uses |= {value.column: "number" for value in (first, second)}
    return [name for name, kind in uses.items() if kind == "number"]
