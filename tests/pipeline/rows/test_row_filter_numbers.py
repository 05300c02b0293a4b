"""NaN, signed zeros and large integers in expressions of rows."""

import io
import math

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.rows.row_filter import RowFilter
from tests.pipeline.rows.test_row_filter import matching_rows


def test_nan_is_never_equal_below_or_above():
    table = pa.table({"f": [math.nan, math.inf, -math.inf, None], "g": [1.0, math.nan, 0.0, 0.0]})
    for sign in ("<", "<=", ">", ">=", "==", "!="):
        for text in (f"f {sign} 5", f"not f {sign} 5", f"5 {sign} f", f"f {sign} f", f"f + 1 {sign} 5"):
            assert not {0, 3} & set(matching_rows(text, table)), text
        assert 1 not in matching_rows(f"f {sign} g", table) + matching_rows(f"not f {sign} g", table)
    assert matching_rows("f > 5", table) == matching_rows("f not in [5] and f > 0", table) == [1]
    assert matching_rows("not f > 5", table) == [2] and matching_rows("f in [5, 7]", table) == []
    assert matching_rows("f is None", table) == [0, 3] and matching_rows("f - f is None", table) == [0, 1, 2, 3]


def test_zero_has_no_sign():
    table = pa.table({"f": pa.array([0.0, -0.0, 1.0], pa.float32())})
    for text in ("f == 0", "f == -0.0", "f in [0]", "f in [-0.0, 7.5]", "not f != 0", "not f not in [0]"):
        assert matching_rows(text, table) == [0, 1], text
        data = io.BytesIO()
        pq.write_table(table, data, row_group_size=1)
        assert RowFilter.parse(text).row_groups(pq.ParquetFile(data)) == [0, 1], text


def test_a_row_group_of_one_value_and_nan_is_not_pruned():
    data = io.BytesIO()
    pq.write_table(pa.table({"f": [1.0, math.nan, 2.0, 2.0, math.nan, math.nan], "i": [1, 1, 1, 2, 3, 3]}), data,
                   row_group_size=2)
    file = pq.ParquetFile(data)
    for text, groups in (("f is None", [0, 1, 2]), ("f + 1 is None and i < 3", [0, 1]), ("i is None", []),
                         ("not f is not None", [0, 1, 2]), ("i == 2", [1])):
        assert RowFilter.parse(text).row_groups(file) == groups, text


def test_statistics_that_float64_cannot_hold_prune_nothing():
    data = io.BytesIO()
    pq.write_table(pa.table({"i": [2**53 + 1] * 2 + [1] * 2, "f": [0.5] * 4}), data, row_group_size=2)
    where = RowFilter.parse("i > f and i > 1e3")
    assert where.mask(pq.read_table(data)).tolist() == [True, True, False, False]
    assert 0 in where.row_groups(pq.ParquetFile(data))
