"""JSON, lists of URLs and compressions."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pytest

from pipeline.tables.text_tables import read_rows

ROWS = [{"url": f"http://x/{number}", "caption": f"caption {number}, \"é\"", "n": number} for number in range(5)]


def cells(path, columns=()):
    return [row.cells for row in read_rows(str(path), columns)]


def packed(data, codec):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("layout", [
    "\n".join(map(json.dumps, ROWS)), json.dumps(ROWS), json.dumps(ROWS[:2]) + json.dumps(ROWS[2:]),
    json.dumps(ROWS, indent=2), "  [\n" + json.dumps(ROWS)[1:],
    "\n".join(json.dumps(row, indent=1) for row in ROWS),
    json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    json.dumps({"columns": [*ROWS[0]], "index": [0, 1, 2, 3, 4], "data": [[*row.values()] for row in ROWS]}),
    json.dumps({"schema": {"fields": []}, "data": ROWS}), json.dumps(dict(enumerate(ROWS))),
    json.dumps({name: {str(number): row[name] for number, row in enumerate(ROWS)} for name in ROWS[0]}),
    json.dumps({name: {str(number): ROWS[number][name] for number in sorted(range(5), key=lambda n: n * seed % 5)}
                for seed, name in zip((1, 2, 3), ROWS[0], strict=True)})])
def test_a_json_file_may_have_any_layout(tmp_path, layout):
    (tmp_path / "a.json").write_text(layout)
    assert cells(tmp_path / "a.json") == ROWS


@pytest.mark.parametrize(("table", "fault"), [
    ({"url": ["a", "b"], "caption": ["c"]}, "url has 2, caption has 1"),
    ({"url": {"0": "a", "7": "b"}, "caption": {"0": "c"}}, "url has 2, caption has 1"),
    ({"url": {"x": "a", "y": "b"}, "caption": {"y": "d", "x": "c"}}, "be rows or columns: all have the names x, y")])
def test_a_table_of_columns_that_do_not_fit_is_refused(tmp_path, table, fault):
    (tmp_path / "a.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=fault) as error:
        cells(tmp_path / "a.json")
    assert str(error.value).count("hint: ") == 1


def test_a_long_array_is_read_in_pieces(tmp_path):
    rows = [{"url": f"http://x/{number}", "text": "y" * (number * 7919 % 5000)} for number in range(2000)]
    rows[7]["text"] = "z" * 3_000_000  # longer than a piece
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert cells(tmp_path / "a.json") == rows
    (tmp_path / "b.json").write_text(json.dumps({"title": "one work", "tags": ["x"]}))
    assert cells(tmp_path / "b.json") == [{"title": "one work", "tags": ["x"]}]


@pytest.mark.parametrize("rest", ["]", "garbage", "\0\0", '{"url": ', "[{}", '\n"text" x'])
def test_nothing_after_an_array_is_dropped(tmp_path, rest):
    (tmp_path / "a.json").write_text(json.dumps(ROWS) + rest)
    with pytest.raises(ValueError, match="cannot be read after row"):
        cells(tmp_path / "a.json")


def test_invalid_lines_of_json_are_named(tmp_path):
    data = b'{"url": "a"}\nnonsense\n\n[1]\n{"url": "b", "t": "caf\xe9"}\n{"url": "c"'
    for name in ("a.jsonl", "a.ndjson", "a.txt"):
        (tmp_path / name).write_bytes(data)
        rows = list(read_rows(str(tmp_path / name)))
        assert [row.cells for row in rows if not row.problem] == [{"url": "a"}, {"url": "b", "t": "caf\ufffd"}]
        assert [row.place.partition(", ")[2] for row in rows if row.problem] == [
            "row 2, line 2", "row 3, line 4", "row 5, line 6"][:3] or name == "a.txt"
        assert rows[3].remarks == ["cell_changed: t: bytes that are not UTF-8"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst", ".lz4"])
def test_lists_may_be_compressed_and_in_several_frames(tmp_path, suffix):
    data = "http://x/1\n\nhttp://x/2 \r\nhttp://x/é\n".encode()
    compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
                ".zst": lambda piece: packed(piece, "zstd"), ".lz4": lambda piece: packed(piece, "lz4")}[suffix]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(data) + (compress(b"http://x/4") if suffix else b"http://x/4"))
    assert cells(path) == [{"url": url} for url in ("http://x/1", "http://x/2", "http://x/é", "http://x/4")]
    if suffix:
        path.write_bytes(compress(data)[:-9])
        with pytest.raises(ValueError, match=r"cannot be read after row(.|\n)*hint: .*copy it again"):
            cells(path)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, lambda data: packed(data, "zstd")])
def test_the_first_bytes_tell_the_compression(tmp_path, compress):
    for name in ("a.csv", "a.csv.gz"):
        (tmp_path / name).write_bytes(compress(b"url,caption\nhttp://x/1,one\n"))
        assert cells(tmp_path / name) == [{"url": "http://x/1", "caption": "one"}]
    (tmp_path / "b.csv").write_bytes(b"BZh,url\n1,http://x/1\n")
    assert cells(tmp_path / "b.csv") == [{"BZh": "1", "url": "http://x/1"}]


@pytest.mark.parametrize(("data", "fault"), [
    ("url,caption\n".encode("utf-16-le"), "UTF-16"), ("url,caption\n".encode("utf-16-be"), "UTF-16"),
    ("url,caption\n".encode("utf-16"), "UTF-16"), ("url,caption\n".encode("utf-32"), "UTF-32"),
    (b"PK\3\4\x14\0\6\0\x08\0\0\0!\0", "a zip archive, as .xlsx files are")])
def test_files_that_are_no_text_in_utf8_are_refused(tmp_path, data, fault):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(ValueError, match=fault) as error:
        cells(tmp_path / "a.csv")
    assert str(error.value).count("hint: ") == 1


def test_infinity_in_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"url": "a", "x": 1e400, "y": [{"z": -Infinity}], "n": NaN, "t": "Infinity"}\n')
    row, = read_rows(str(tmp_path / "a.jsonl"))
    assert row.remarks == [f"cell_changed: {name}: infinity is stored as null" for name in ("x", "y")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_repeated_names_and_half_characters_are_named(tmp_path, name):
    lines = ['{"url": "a", "url": "b", "in": {"x": 1, "x": 2}}',
             '{"url": "\\ud800", "t": ["\\udc00"], "u": "\\ud83d\\ude00"}',
             '{"url": "c"}']
    (tmp_path / name).write_text("\n".join(lines) if name == "a.jsonl" else f"[{','.join(lines)}]")
    rows = list(read_rows(str(tmp_path / name)))
    assert [row.cells["url"] for row in rows] == ["b", "\ud800", "c"]
    twice = "an object has it several times; the last one counts"
    assert [list(row.remarks) for row in rows] == [
        [f"cell_changed: x: {twice}", f"cell_changed: url: {twice}"],
        ["cell_changed: url: halves of characters", "cell_changed: t: halves of characters"], []]
