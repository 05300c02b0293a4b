import io
import math
import pickle
import random
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from pipeline.rows.row_filter import RowFilter

TABLE = pa.table({
    "a": pa.array([1, 2, None, 4], pa.int32()), "f": pa.array([0.1, math.nan, None, 3.5], pa.float32()),
    "t": ["cat", "Dog", None, "äöü"], "b": [True, False, None, True], "n": pa.nulls(4), "W E": [1, 2, 3, 4],
    "list": [[1], [2], None, []]})


def matching_rows(text: str, table: pa.Table = TABLE) -> list[int]:
    return np.flatnonzero(RowFilter.parse(text).mask(table)).tolist()


@pytest.mark.parametrize(("text", "rows"), [
    ("a < 3", [0, 1]), ("a <= 1", [0]), ("3 < a", [3]), ("a == 2", [1]), ("a != 2", [0, 3]), ("0 < a <= 2", [0, 1]),
    ("a < 3 and a > 1", [1]), ("a < 2 or a > 2", [0, 3]), ("True and a > 1 or False", [1, 3]),
    ("a in [1, 2, 999999999999]", [0, 1]), ("a in (1.5, 4)", [3]), ("a not in {1, 2}", [3]), ("f in [3.5]", [3]),
    ("t in ['cat', 'x']", [0]), ("t not in ['cat', 'x']", [1, 3]), ("f not in [3.5]", [0]), ("b in [True]", [0, 3]),
    ("a is None", [2]), ("a is not None", [0, 1, 3]), ("f is None", [1, 2]), ("f is not None", [0, 3]),
    ("t is None", [2]), ("n is None", [0, 1, 2, 3]), ("n < 3", []), ("n == 'x'", []), ("len(n) > 1", []), ("n", []),
    ("b", [0, 3]), ("not b", [1]), ("b == False", [1]), ("b != True", [1]), ("a > 0 and b", [0, 3]),
    ("f < 0.1", []), ("f > 0.1", [0, 3]), ("f != 3.5", [0]), ("a > 1.5", [1, 3]), ("a == 2.0", [1]),
    ("a + `W E` * 2 >= 6", [1, 3]), ("-a < -1", [1, 3]), ("-(a - 1) == 0", [0]), ("+a == 1", [0]),
    ("a < 2*2-1", [0, 1]),
    ("a / 0 > 1", []), ("not a / 0 > 1", []), ("a / (a - 2) > -100", [0, 3]), ("a * 3000000000 > 3000000000", [1, 3]),
    ("(a / (a - 2)) is None", [1, 2]), ("a / 2 == 0.5", [0]), ("col('W E') > 3", [3]),
    ("`W E` == a", [0, 1, 3]), ("f < a", [0, 3]), ("`W E` > f", [0, 3]),
    ("a != `W E`", []), ("len(t) == 3 and lower(t) != 'dog'", [0, 3]), ("lower(t) == 'dog'", [1]), ("t < 'b'", [1]),
    ("match(t, '^[cä]')", [0, 3]), ("contains(t, 'o')", [1]), ("not contains(t, 'o')", [0, 3]),
    ("not match(lower(t), '^d')", [0, 3]), ('match(t, "\\bcat\\b")', [0]), ('match(t, r"\\bcat\\b")', [0]),
    ("a <\n 3\n", [0, 1]), ("t == '''cat'''", [0]), ("((a)) == (1)", [0]), ("a<3 and(b)", [0])])
def test_expressions_select_the_expected_rows(text, rows):
    assert matching_rows(text) == rows
    again = pickle.loads(pickle.dumps(RowFilter.parse(text)))
    assert np.flatnonzero(again.mask(TABLE)).tolist() == rows and again == RowFilter.parse(text)


@pytest.mark.parametrize("text", ["a < 3", "a == 2", "f > 1", "0 < a <= 2", "a in [1]", "a not in [1]", "f != 3.5", "b",
                                  "t == 'cat'", "match(t, 'o')", "a < 3 and f > 0", "a < `W E`", "len(t) > 1"])
def test_a_missing_value_meets_neither_a_condition_nor_its_opposite(text):
    rows, others = matching_rows(text), matching_rows(f"not ({text})")
    assert not set(rows) & set(others) and matching_rows(f"not not ({text})") == rows
    assert 2 not in rows + others and (1 not in rows + others or "f" not in text)


def test_columns_are_named_in_order():
    where = RowFilter.parse("len(caption) > `W E` and (b or not caption in ['b']) and col(\"x.y\") is None")
    assert where.columns == ("caption", "W E", "b", "x.y") and where.text.startswith("len(")
    assert where == RowFilter.parse(where.text) and hash(where) == hash(RowFilter.parse(where.text))


@pytest.mark.parametrize(("text", "message"), [
    ("", "is empty"), ("  \n", "is empty"), ("1 < 2", "no column among them"), ("True", "names no column"),
    ("a = 3", "cannot be read"), ("a <", "cannot be read"), ("a < 3)", "cannot be read"), ("not", "cannot be read"),
    ("`a` `b`", "backticks"), ("`a", "no second"), ("t == 'x", "no second"), ("a < 1 # b", "#"), ("a\0 < 1", "cannot"),
    ("a == None", "`is None`"), ("None != a", "`is None`"), ("a is True", "a == True"), ("1 is None", "of columns"),
    ("a in []", "a list is wanted"), ("a in b", "a list is wanted"), ("'x' in t", "looks into text"),
    ("a in [1, None]", "or x is None"), ("a in [1, 'x']", "mixes number and text"), ("a in [b]", "numbers or texts"),
    ("1 in [1]", "no column"), ("a", "neither true nor false"), ("a + 1", "a condition is wanted"),
    ("lower(t)", "a condition is wanted"), ("'x'", "a condition is wanted"), ("b < True", "an order"),
    ("a < 'x' < 2", "text with number"), ("'x' + a < 2", "calculates with"), ("a + True < 2", "calculates with"),
    ("a < 1e999", "too large"), ("a < 1e200 * 1e200", "too large"), ("a < 1" + "0" * 30, "1e20"),
    ("a < 1/0", "divides"),
    ("a < 1" + "0" * 5000, "cannot be read"), ("len('x') > 1", "len(caption)"), ("len(a, b) > 1", "with 2 values"),
    ("len() > 1", "with 0 values"), ("contains(t, b)", "as the second of contains"),
    ("contains('x', 'x')", "the first"),
    ("contains(t, text='x')", "cannot be read at 'text='"), ("match(t, '(')", "RE2"),
    ("match(a + 1, 'x')", "the first"),
    ("col(a) > 1", 'col("the name")'), ("contains(t, 'x') > 1", "not among"), ("a.b > 1", "`a.b`"),
    ("A < 2", "it is written a"), ("width < 2", "the columns are a, f, t, b, n, W E, list"),
    ("t < 5", r"the column t \(string\) is compared with the number 5.*\n.*\"5\""),
    ("a == 'x'", "the column a (int32) is compared with the text 'x'"), ("a < t", "both sides"),
    ("t in [1]", "the column t (string) is compared with the number 1"),
    ("len(a) > 3", r"is no text, which len.*\n.*t would do"),
    ("contains(a, 'x')", "is no text"), ("t + 1 > 2", "is no number"),
    ("len(t) == 'x'", "len(..) is compared with the text 'x'"),
    ("list is None", "neither number nor text"), ("t", "neither true nor false"), ("b < b", "an order")])
def test_an_invalid_expression_has_a_clear_message(text, message):
    with pytest.raises(ValueError, match=f"(?s){message}" if "|" in message or ".*" in message else None) as caught:
        RowFilter.parse(text).check(TABLE.schema)
    assert ".*" in message or "|" in message or message in str(caught.value)
    assert str(caught.value).count("\nhint: ") == (0 if "characters" in str(caught.value) else 1)


@pytest.mark.parametrize("text", [
    "__import__('os').system('x')", "(lambda: 1)() > a", "a if b else b", "f'{a}' == t", "a == b'x'", "a < 1j",
    "a ** 2 > 1", "a // 2 > 1", "a % 2 == 1", "a @ b > 1", "a & b", "~b", "a[0] > 1", "a[1:2] > 1", "[x for x in a]",
    "(a := 3) > 1",
    "{1: 2} == a", "a == ...", "*a", "await a", "yield", "print(a)", "a.__class__ == 1", "(a, b) == 1", "eval('1') < a",
    "len.x(t) > 1", "open('x') < a", "a; b", "import os", "a is b", "a is not b"])
def test_other_syntax_is_refused(text):
    with pytest.raises(ValueError, match=r"\nhint: "):
        RowFilter.parse(text)


@pytest.mark.parametrize("text", [
    "a < " + "-" * 9000 + "1", "not " * 2400 + "b", "(" * 4000 + "a" + ")" * 4000, "a" + " + 1" * 2400 + " > 2",
    "a < 1" + "0" * 9990, "a > 1 and " * 5000 + "b", "b and (" * 100 + "b" + ")" * 100, "`" * 9999, "'" * 9998,
    "[" * 9000])
def test_huge_expressions_are_refused(text):
    with pytest.raises(ValueError):
        RowFilter.parse(text)


def test_duplicate_columns_are_refused():
    with pytest.raises(ValueError, match="2 times"):
        RowFilter.parse("a < 1").check(pa.schema([("a", pa.int32()), ("a", pa.int32()), ("b", pa.int32())]))
    assert RowFilter.parse("b < 1").mask(pa.table([pa.array([0, 1])] * 2, ["b", "c"])).tolist() == [True, False]


@pytest.mark.parametrize("arrow_type", [pa.int8(), pa.uint8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(),
                                        pa.float64(), pa.decimal128(25, 2), pa.dictionary(pa.int8(), pa.int32())])
def test_all_number_types_are_compared(arrow_type):
    values = pa.array([0, 5, 100, None]).cast(pa.int32())
    if pa.types.is_dictionary(arrow_type):
        values = values.dictionary_encode()
    elif arrow_type == pa.float16():
        values = pa.array(np.array([0, 5, 100, 0], np.float16), mask=np.array([False, False, False, True]))
    table = pa.table({"x": values.cast(arrow_type)})
    for text, rows in (("x > 4", [1, 2]), ("x > 0.5", [1, 2]), ("x < 1e15", [0, 1, 2]), ("x == 5", [1]),
                       ("x > -1", [0, 1, 2]), ("x < 9007199254740993", [0, 1, 2]), ("x in [5, -1]", [1]),
                       ("x < 18446744073709551615", [0, 1, 2]), ("x in [5, 18446744073709551615]", [1]),
                       ("x in [5, 7]", [1]), ("x not in [5, 0.5]", [0, 2]), ("x * 2 == 10", [1]), ("x is None", [3])):
        assert matching_rows(text, table) == rows, text


@pytest.mark.parametrize("arrow_type", [pa.string(), pa.large_string(), pa.string_view(),
                                        pa.dictionary(pa.int8(), pa.string())])
def test_all_text_types_are_compared(arrow_type):
    plain = pa.array(["a", "B", "", None])
    table = pa.table({"x": plain.dictionary_encode() if pa.types.is_dictionary(arrow_type) else plain.cast(arrow_type)})
    for text, rows in (("x == 'a'", [0]), ("x != 'a'", [1, 2]), ("x in ['a', 'B']", [0, 1]), ("len(x) > 0", [0, 1]),
                       ("lower(x) == 'b'", [1]), ("match(x, '^.$')", [0, 1]), ("x < 'a'", [1, 2]), ("x is None", [3])):
        assert matching_rows(text, table) == rows, text


def test_large_integers_are_exact():
    table = pa.table({"x": pa.array([2**53, 2**53 + 1, -2**63, 2**63 - 1])})
    assert matching_rows("x == 9007199254740993", table) == [1] and matching_rows("x > 0.5", table) == [0, 1, 3]
    assert matching_rows("x in [9007199254740993]", table) == [1] and matching_rows("x < 1e30", table) == [0, 1, 2, 3]
    huge = pa.table({"x": pa.array([2**64 - 1, 1, 2**63], pa.uint64())})
    assert matching_rows("x == 18446744073709551615", huge) == [0] and matching_rows("x > 5", huge) == [0, 2]
    assert matching_rows("x > 5.5", huge) == [0, 2] and matching_rows("x > -1", huge) == [0, 1, 2]
    assert matching_rows("x in [-1, 1, 9223372036854775808]", huge) == [1, 2]
    assert matching_rows("x not in [-1]", huge) == [0, 1, 2]
    both = pa.table({"u": huge["x"], "i": pa.array([-1, 1, 2**63 - 1]), "f": [0.5, 1.0, 2.0**63]})
    assert matching_rows("u > i", both) == [0] and matching_rows("u == f", both) == [1, 2]
    assert matching_rows("i < f", both) == [0]
    large = pa.table({"f": [2.0**53, 2.0**64, 1.0]})
    assert matching_rows("f >= 9007199254740993", large) == [0, 1]
    assert matching_rows("f in [9007199254740993, 1]", large) == [0, 2]


def test_text_of_a_csv_is_compared_as_numbers_if_needed():
    table = pa.table({
        "punsafe": ["0.05", " 1e-2 ", "", "n/a", None, "+.5", "-1.", "nan", "inf", "1,5", "0x10", "1_0"],
        "width": ["900", "1000"] * 6, "height": ["1000", "900"] * 6, "name": ["5"] * 12,
        "score": pa.array(["7", "x"] * 6).dictionary_encode()})
    where = RowFilter.parse("punsafe < 0.1 and width > height and len(name) == 1 and score != 6")
    with pytest.raises(ValueError, match=r"punsafe \(string\) is compared with the number"):
        where.check(table.schema)
    cast = where.cast(table)
    assert cast.column_names == table.column_names and cast["name"].type == pa.string()
    assert [cast[name].type for name in ("punsafe", "width", "height", "score")] == [pa.float64()] * 4
    assert cast["punsafe"].to_pylist() == [0.05, 0.01, None, None, None, 0.5, -1.0] + [None] * 5
    assert matching_rows("punsafe < 0.1 and width < height", cast) == [0, 6]
    assert where.cast(cast).equals(cast)
    assert RowFilter.parse("name == '5' and width != height").cast(table).equals(table)
    chained = RowFilter.parse("width == height and height == score and score < 3").cast(table)
    assert [chained[name].type for name in ("width", "height", "score")] == [pa.float64()] * 3
    both = RowFilter.parse("len(name) > 0 and name > 3")
    with pytest.raises(ValueError, match="is compared with the number 3"):
        both.check(both.cast(table).schema)
    empty = RowFilter.parse("x > 1").cast(pa.table({"x": pa.chunked_array([], pa.string())}))
    assert empty["x"].type == pa.float64() and RowFilter.parse("x > 1").mask(empty).shape == (0,)


def test_masks_follow_the_order_of_many_chunks():
    values = np.random.default_rng(0).permutation(500_000)
    table = pa.table({"x": pa.chunked_array(np.array_split(values, 37))})
    assert (RowFilter.parse("x < 1000 or x in [70000]").mask(table) == ((values < 1000) | (values == 70000))).all()


# Rows as Python sees them: an oracle for expressions made at random.
def python(node: Any, row: dict[str, Any]) -> Any:
    """True, False or None (missing)."""
    how, *parts = node
    if how in {"and", "or"}:
        values = [python(part, row) for part in parts]
        decisive = how == "or"
        return decisive if decisive in values else None if None in values else not decisive
    if how == "not":
        value = python(parts[0], row)
        return None if value is None else not value
    value = row[parts[0]]
    if isinstance(value, float) and math.isnan(value):
        value = None
    if how == "is None":
        return value is None
    if value is None:
        return None
    if how == "in":
        return value in parts[1]
    if how == "contains":
        return parts[1] in value
    return {"<": value < parts[1], "<=": value <= parts[1], ">": value > parts[1], ">=": value >= parts[1],
            "==": value == parts[1], "!=": value != parts[1]}[how]


def to_text(node: Any) -> str:
    how, *parts = node
    if how in {"and", "or"}:
        return f" {how} ".join(f"({to_text(part)})" for part in parts)
    if how == "not":
        return f"not ({to_text(parts[0])})"
    if how == "is None":
        return f"{parts[0]} is None"
    return f"contains({parts[0]}, {parts[1]!r})" if how == "contains" else f"{parts[0]} {how} {parts[1]!r}"


def random_expression(chance: random.Random, depth: int) -> Any:
    if depth and chance.random() < 0.7:
        how = chance.choice(["and", "or", "not"])
        count = 1 if how == "not" else chance.choice([2, 3])
        return (how, *(random_expression(chance, depth - 1) for _ in range(count)))
    name = chance.choice("ifst")
    how = chance.choice(["<", "<=", ">", ">=", "==", "!=", "in", "is None", *(["contains"] if name == "t" else [])])
    def value():
        if name == "t":
            return chance.choice("abcdefgh")
        return chance.choice([chance.randrange(-3, 12), chance.randrange(-3, 12), chance.randrange(-6, 24) / 2])
    return (how, name) if how == "is None" else (how, name, [value() for _ in range(2)] if how == "in" else value())


@pytest.fixture(scope="module")
def grouped() -> pa.Table:
    """Partly sorted rows, so that groups of five rows have ranges. Some have NaN, nulls or a single value."""
    chance = random.Random(0)
    rows: dict[str, list[Any]] = {"i": [], "f": [], "s": [], "t": []}
    for group in range(40):
        base = chance.randrange(10)
        kinds = [chance.choice(["some", "null", "same", "nulls"]) for _ in range(4)]
        for _ in range(5):
            values = [base + chance.randrange(3), float(base + chance.randrange(3)) / 2, chance.randrange(-2, 3),
                      chance.choice("abcdefgh")]
            values = [[base, base / 2, 1, "abcdefgh"[base % 8]][n] if kinds[n] == "same" else value
                      for n, value in enumerate(values)]
            if group % 3 == 0 and chance.random() < 0.4:
                values[1] = math.nan
            for n, name in enumerate(rows):
                missing = kinds[n] == "nulls" or (kinds[n] == "null" and chance.random() < 0.3)
                rows[name].append(None if missing else values[n])
    return pa.table({"i": pa.array(rows["i"], pa.uint32()), "f": pa.array(rows["f"], pa.float32()),
                     "s": pa.array(rows["s"], pa.int64()), "t": rows["t"]})


def test_random_expressions_agree_with_python_and_no_row_group_is_lost(grouped):
    data = io.BytesIO()
    pq.write_table(grouped, data, row_group_size=5)
    file = pq.ParquetFile(data)
    rows, chance, left_out = grouped.to_pylist(), random.Random(1), 0
    for _ in range(600):
        node = random_expression(chance, 3)
        where = RowFilter.parse(to_text(node))
        expected = [python(node, row) is True for row in rows]
        assert where.mask(grouped).tolist() == expected, where.text
        groups = where.row_groups(file)
        assert {row // 5 for row, passes in enumerate(expected) if passes} <= set(groups), where.text
        left_out += 40 - len(groups)
    assert left_out > 4000


def test_statistics_decide_which_row_groups_are_read(tmp_path):
    table = pa.table({"x": pa.array(range(100)), "u": pa.array([2**63 + n for n in range(100)], pa.uint64()),
                      "t": [f"{n:03d}" for n in range(100)], "b": [n >= 50 for n in range(100)],
                      "n": pa.array([None] * 50 + list(range(50)), pa.float64()), "s": [{"x": 5}] * 100})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    local = pq.ParquetFile(tmp_path / "a.parquet")
    memory = fsspec.filesystem("memory")
    memory.pipe("/where/a.parquet", (tmp_path / "a.parquet").read_bytes())
    remote = pq.ParquetFile(memory.open("/where/a.parquet"))
    arrows = fs.PyFileSystem(fs.FSSpecHandler(memory))
    fragment = ds.ParquetFileFormat().make_fragment("where/a.parquet", arrows)
    for text, groups in (("x < 15", [0, 1]), ("85 <= x", [8, 9]), ("x in [5, 55.0]", [0, 5]), ("x == 1000", []),
                         ("t > '089'", [9]), ("t == '042'", [4]), ("b", [5, 6, 7, 8, 9]), ("not b", [0, 1, 2, 3, 4]),
                         ("b != True", [0, 1, 2, 3, 4]), ("n is not None", [5, 6, 7, 8, 9]), ("n > 41", [9]),
                         ("not (x >= 15 or b)", [0, 1]), ("x < 15 and t > '1'", []), ("u > 5 and x < 5", [0]),
                         ("x + 1 < 15 and x < 45", [0, 1, 2, 3, 4]), ("n + 1 > 0", [5, 6, 7, 8, 9]),
                         ("x < 1e9 and False", [])):
        where = RowFilter.parse(text)
        assert where.row_groups(local) == where.row_groups(remote) == where.row_groups(fragment) == groups, text
        assert set(np.flatnonzero(where.mask(table)) // 10) <= set(groups)
    assert RowFilter.parse("x < 25").row_groups(fragment.subset(row_group_ids=[1, 2, 7])) == [1, 2]
    assert RowFilter.parse("u < 9223372036854775818").row_groups(local) == [0]
    for text in ("u > 5", "n is None", "len(t) > 5", "contains(t, 'x')"):
        assert RowFilter.parse(text).row_groups(local) == list(range(10))
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=10, write_statistics=False)
    assert RowFilter.parse("x < 15").row_groups(pq.ParquetFile(tmp_path / "b.parquet")) == list(range(10))


def test_the_expression_works_as_a_filter_of_a_dataset(tmp_path):
    pq.write_table(pa.table({"x": pa.array(range(100), pa.int32()), "t": ["a", "b"] * 50}), tmp_path / "a.parquet")
    where, dataset = RowFilter.parse("x > 90.5 and t != 'a'"), ds.dataset(tmp_path / "a.parquet")
    assert dataset.to_table(filter=where.expression(dataset.schema))["x"].to_pylist() == [91, 93, 95, 97, 99]


@pytest.mark.parametrize("text", [
    "read_csv('/etc/passwd') is not None", "getenv('HOME') == caption", "env('HOME') == caption",
    "current_setting('x') == caption", "a in (select 1)", "exists(select 1)", "a < 1; select 1", "a < 1;",
    "a < 1 -- x", "a < 1 /* b */", "a < 1 {# b #}", "a < 1 union select 1", "case when b then b end",
    "cast(a as text) == t", "a::text == t", "t like 'a%'", "a between 1 and 2", "date '2020-01-01' < t",
    "@a < 1", "$1 < a", "? < a", "a < :b",
    "'/etc/passwd' in t", "`/etc/passwd`", "a.b.c.d < 1", "* < 1", "count(*) > 1", "sum(a) > 1", "a < 1 limit 3",
    "b over (a)", "(a, b) in [1]", "[1, 2] == a", "{1} == a", "t[0] == 'x'", "a <=> 1", "a <> 1", "a := 1"])
def test_other_sql_is_refused(text):
    with pytest.raises(ValueError, match=r"\nhint: "):
        RowFilter.parse(text).check(TABLE.schema)


def test_the_examples_of_the_documents_work():
    guides = Path(__file__).parents[3] / "docs/guides"
    table = (guides / "ingest/row-filter.md").read_text().split("## Language")[1].split("\n\n")[1].splitlines()[2:]
    examples = [re.findall(r"`` (.*?) ``|`([^`]+)`|(`[^`]+` > [\d.]+)", line)[-1] for line in table]
    texts = ["".join(example).replace("\\|", "|") for example in examples]
    texts += re.findall(r"--where '([^']*)'", (guides / "ingest.md").read_text())
    assert len(texts) >= 9 and all(RowFilter.parse(text).columns for text in texts)


@pytest.mark.parametrize(("text", "hint"), [
    ("a = 3", "write == instead of ="), ("a < 3 AND b", "and, or, not"), ("a is NULL", "a is None"),
    ("a IS NULL", "lower case"), ("a > 1 && b", "write and"), ("a > 1 || b", "write or"), ("!b", "write not"),
    ("!(a > 1)", "write not"), ("t =~ 'x'", "match(a"), ("t !~ 'x'", "not match(a"), ("t ~ 'x'", "match(a"),
    ("t ilike '%x%'", "contains(lower(a)"), ("t like 'x%'", "contains(a"), ("t not like 'x%'", "not contains(a"),
    ("t contains 'x'", "contains(a"), ("t.contains('x')", "contains(a"), ("t startswith 'x'", 'match(a, "^TEXT")'),
    ("t endswith 'x'", 'match(a, "TEXT$")'), ("t regexp 'x'", "match(a"), ("a <> 1", "write !="),
    ("a === 1", "write =="), ("a !== 1", "write !="), ("a => 1", "write >="), ("a =< 1", "write <="),
    ("a eq 1", "write =="), ("a gte 1", "write >="), ("a between 1 and 3", "1 <= a <= 3"),
    ("a BETWEEN 1 AND 3", "1 <= a <= 3"), ("a % 2 == 0", "+ - * /"), ("a ** 2 > 3", "+ - * /"),
    ("b == true", "write True"), ("a == null", "write None"), ("length(t) > 1", "write len"),
    ("t.lower() == 'x'", "lower(a)"), ("isnull(a)", "a is None"), ("b is true", "a == True"),
    ("a > 1, b", "write and"), ("a ? b : b", "conditional"),
    ("a < 3;", "without ;"), ("a < 3 # c", "comment"), ("a < 0x10", "decimal"), ("1a < 3", "`backticks`"),
    ("a < f is None", "with `and`"), ("class == 'x'", "`backticks`"), ("A < 1", "it is written a")])
def test_the_hint_has_the_right_spelling(text, hint):
    with pytest.raises(ValueError, match=r"\nhint: ") as caught:
        RowFilter.parse(text).check(TABLE.schema)
    assert hint in str(caught.value).split("\nhint: ")[1]


def test_an_expression_of_the_greatest_depth_is_evaluated():
    brackets = "(" * 19 + "a < 3" + ")" * 19
    assert matching_rows(brackets) == [0, 1] and matching_rows("not " * 18 + "a < 3") == [0, 1]
    assert matching_rows(" and ".join(["a < 3"] * 900)) == matching_rows("a < 3 or " * 800 + "a < 2") == [0, 1]
    assert matching_rows(f"a in [{', '.join(map(str, range(2, 1700)))}]") == [1, 3]
    with pytest.raises(ValueError, match="20 brackets"):
        RowFilter.parse(f"(({brackets}))")
