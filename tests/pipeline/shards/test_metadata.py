"""Cells keep their values in the parquet file of a shard."""

import pyarrow as pa
import pytest

from pipeline.shards.metadata import metadata_table


@pytest.mark.parametrize(("kind", "cells", "stored", "stored_type"), [
    ("int64", [1, None], [1, None], pa.int64()), ("int64", [1, 0.5], [1.0, 0.5], pa.float64()),
    ("int64", [2**60 + 1, 0.5], ["1152921504606846977", "0.5"], pa.string()),
    ("int64", [1, True], ["1", "true"], pa.string()), ("int64", [1, 2**64], ["1", "18446744073709551616"], pa.string()),
    ("double", [1, 0.5], [1.0, 0.5], pa.float64()), ("double", [0.5, True], ["0.5", "true"], pa.string()),
    ("bool", [True, 1], ["true", "1"], pa.string()), (None, [1, 0.5], [1.0, 0.5], pa.float64())])
def test_cells_that_do_not_fit_their_type_are_not_changed(kind, cells, stored, stored_type):
    column = metadata_table([{"x": cell} for cell in cells], {}, {"x": kind} if kind else {})["x"]
    assert column.to_pylist() == stored and column.type == stored_type
