"""Reading parquet leaves no thread behind."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.formats import parquet

_READ = """
import sys
from pathlib import Path
from pipeline.formats import parquet
data = Path(sys.argv[1])
before = len(list(Path("/proc/self/task").iterdir()))
assert parquet.read(data).equals(parquet.read(data.read_bytes()))
assert len(list(Path("/proc/self/task").iterdir())) == before
"""


@pytest.fixture
def path(tmp_path):
    table = pa.table({name: [f"{name} {number}" for number in range(1000)] for name in "abcdefgh"})
    pq.write_table(table, tmp_path / "some.parquet", row_group_size=100)
    return tmp_path / "some.parquet"


def test_written_tables_are_read_back(path):
    assert parquet.read(path) == pq.read_table(path)
    assert parquet.read(str(path), ["b", "a"]).column_names == ["b", "a"]
    with pytest.raises(pa.ArrowException):
        parquet.read(path.read_bytes()[:-1])


def test_no_thread_is_left_that_could_abort_the_end_of_the_process(path):
    subprocess.run([sys.executable, "-c", _READ, str(path)], check=True)
