"""CSV and TSV: each row that breaks the rules is named, and no other row is lost."""

import csv
import io
import random

import pytest

from pipeline.tables.delimited import check_delimiter
from pipeline.tables.text_tables import read_header, read_rows


def read(tmp_path, name, data, columns=()):
    """(cells of the good rows, places of the bad rows, remarks) of a file."""
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    rows = list(read_rows(str(path), columns))
    return ([row.cells for row in rows if not row.problem],
            [f"{row.place}: {row.problem}" for row in rows if row.problem],
            [remark for row in rows for remark in row.remarks])


def test_a_quote_that_is_never_closed_costs_its_own_row_only(tmp_path):
    lines = [f"http://x/{number}.jpg,caption {number}" for number in range(40)]
    for bad in (0, 7, 39):
        for others in ((), (20,), (5, 21, 30)):  # rows with quotes as they should be
            broken = list(lines)
            broken[bad] = f'http://x/{bad}.jpg,"caption {bad}'
            for number in set(others) - {bad}:
                broken[number] = f'http://x/{number}.jpg,"caption, {number}"'
            good, problems, remarks = read(tmp_path, "a.csv", "url,caption\n" + "\n".join(broken))
            assert [row["url"] for row in good] == [f"http://x/{n}.jpg" for n in range(40) if n != bad]
            assert len(problems) == 1 and problems[0].startswith(f"a.csv, row {bad + 1}, line {bad + 2}: ")
            assert "quote" in problems[0] and not remarks


def test_two_stray_quotes_that_would_balance_do_not_join_rows(tmp_path):
    for header, lines in (("url,caption", ['http://a,"hello', "http://b,foo", 'http://c,5"']),
                          ("caption,url", ['"hello,http://a', "foo,http://b", '5",http://c']),
                          ("caption,url", ["foo,http://b", '"hello,http://a', '5",http://c']),
                          ("file,caption", ['a.jpg,"hello', "b.jpg,foo", 'c.jpg,5"'])):
        good, problems, _ = read(tmp_path, "a.csv", "\n".join([header, *lines, ""]))
        assert len(good) == 2 and len(problems) == 1, header
        assert {cell for row in good for cell in row.values()} >= {"foo", '5"'}


@pytest.mark.parametrize(("header", "rows"), [
    ("url,caption", ['http://h/0.png,"open one', "http://h/0.png,two", 'http://h/0.png,a pipe of 12"']),  # one URL
    ("url,caption", ['http://h/a b/0.png,"open one', "http://h/a b/1.png,two", 'http://h/a b/2.png,a pipe of 12"']),
    ("url,caption", ['http://h/0.png,"open one', "http://h/1.png,two, three", 'http://h/2.png,a pipe of 12"']),
    ("caption,url", ['"open, one,http://h/0.png', "two,http://h/1.png", '12",http://h/2.png']),
    ("caption,url", ['"open one,http://h/0.png', '12",http://h/1.png']),
    ("id,caption", ['0,"open one', "1,two", '2,a pipe of 12"']),
    ("file,caption", ['im0,"open one', "im1,two", 'im2,a pipe of 12"']),
    ("file,caption", ['im 0,"open one', "im 1,two", 'im 2,a pipe of 12"']),
    ("file,caption,year", ['im 0.png,"open one,1900', "im 1.png,two,1901", 'im 2.png,12",1902']),
    ("id,caption,artist", ['a cat,"open one,A B', "a dog,two,C D", 'a bird,12",E F'])])
def test_an_open_quote_that_a_later_row_closes_costs_its_own_row_only(tmp_path, header, rows):
    good, problems, _ = read(tmp_path, "a.csv", "\n".join([header, *rows, rows[-1].replace('"', ""), ""]))
    is_bad = [row.count(",") != header.count(",") or number == 0 for number, row in enumerate(rows)]
    assert [list(row.values()) for row in good[:-1]] == [
        row.split(",") for row, bad in zip(rows, is_bad, strict=True) if not bad]
    assert len(problems) == sum(is_bad) and "a quote is not closed" in problems[0] and "hint: " in problems[0]


@pytest.mark.parametrize(("header", "ending", "row"), [
    ("url,caption", "\n", ["http://h/0.png", "a cat,\nblack, white\n1970, and\n,so on"]),
    ("caption,url", "\n", ["a cat,\nblack, white\n1970, and\n,so on", "http://h/0.png"]),
    ("caption,file", "\n", ["the cat, a black one\nhttp://h/1.png", "a b.jpg"]),
    ("file,caption", "\n", ["cat", "a cat\nsitting on a mat, happy"]),
    ("id,caption", "\n", ["17", "Haystacks\nPainting"]),
    ("id,caption", "\r\n", ["17", "Haystacks\nPainting, oil"]),  # as Python's csv writes
    ("id,caption,artist", "\n", ["17", "red\ngreen, blue", "A B"]),
    ("id,caption", "\r\n", ["17", "in 1907\r\n1908, and 1909"]),
    ("caption,artist", "\r\n", ["oil, canvas\r\nwood, glass", "A B"])])
def test_texts_with_line_breaks_and_commas_are_one_cell(tmp_path, header, ending, row):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=ending).writerows([header.split(","), row, row])
    good, problems, _ = read(tmp_path, "a.csv", text.getvalue())
    assert [list(each.values()) for each in good] == [row, row] and not problems


def test_lines_without_quotes_are_no_rows_of_a_quoted_file(tmp_path):
    rows = [["http://h/0.png", "see\r\nhttp://h/1.png,x"], ["http://h/2.png", "a\r\nb"]]
    around = [["a\nb", "http://h/0.png", "c\nd"], ["e", "http://h/1.png", "f"]]  # a line looks like a row
    for cells, header in ((rows, ["url", "caption"]), (around, ["title", "url", "caption"])):
        text = io.StringIO(newline="")
        csv.writer(text, quoting=csv.QUOTE_ALL).writerows([header, *cells])
        good, problems, _ = read(tmp_path, "a.csv", text.getvalue())
        assert [list(each.values()) for each in good] == cells and not problems
    numbered = '"id","url","caption"\n1,"http://h/0.png","a\n2,"http://h/1.png","b"\n'  # QUOTE_NONNUMERIC
    good, problems, _ = read(tmp_path, "a.csv", numbered)
    assert len(problems) == 1 and good == [{"id": "2", "url": "http://h/1.png", "caption": "b"}]
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([["url", "caption"], *rows])
    good, problems, _ = read(tmp_path, "a.csv", text.getvalue().replace('1.png,x"', '1.png,x').replace("see", '"see'))
    assert len(problems) == 1 and good[-1]["url"] == "http://h/2.png"  # a quote that is not closed


def test_rows_of_another_length_are_named(tmp_path):
    data = "url,caption,width\na,x,1\nb,x\nc,x,1,2\n\nd,\"x\ny\",1\ne,\"x\ny\"\nf,x,1\n"
    good, problems, _ = read(tmp_path, "a.csv", data)
    assert [row["url"] for row in good] == ["a", "d", "f"] and good[1]["caption"] == "x\ny"
    assert problems[:2] == ["a.csv, row 2, line 3: 2 cells, and the header has 3",
                            "a.csv, row 3, line 4: 4 cells, and the header has 3"]
    assert len(problems) == 4  # the record of two lines is read line by line once it is known to be wrong
    good, problems, _ = read(tmp_path, "a.tsv", data.replace(",", "\t").replace('"', ""))
    assert [row["url"] for row in good] == ["a", "f"] and len(problems) == 6


def test_quotes_of_spark_are_read_and_noted(tmp_path):
    good, problems, remarks = read(tmp_path, "a.csv", r'''url,caption,width
http://a,"he said \"hi\", then left",3
http://b,"a \\ b \"c\"",4
http://c,"plain, with a comma",5
http://d,"5\"",6
''')
    assert [row["caption"] for row in good] == ['he said "hi", then left', r'a \ b "c"', "plain, with a comma", '5"']
    assert [row["width"] for row in good] == ["3", "4", "5", "6"] and not problems
    assert remarks == ["backslash_quotes: read as Spark writes quotes"] * 3


def test_a_tsv_has_no_quotes(tmp_path):
    data = 'url\tcaption\nhttp://a\t"hello\nhttp://b\tfoo\nhttp://c\t"bar"\nhttp://d\t"two ""2"" pipes"\n'
    good, problems, remarks = read(tmp_path, "a.tsv", data)
    assert [row["caption"] for row in good] == ['"hello', "foo", '"bar"', '"two ""2"" pipes"'] and not problems
    assert [remark.split(":")[0] for remark in remarks] == ["quotes_kept"]
    # pandas quotes a cell with line breaks. In plain texts a quote may be open before another row.
    data = 'url\tcaption\na\t"two\nlines"\nb\t"open\nc\t"x"\nd\t"e\n\n f"\n'
    good, problems, remarks = read(tmp_path, "a.tsv", data)
    assert [row["caption"] for row in good] == ['"two', '"open', '"x"', '"e']
    assert len(problems) == 2 and [remark.split(":")[0] for remark in remarks] == ["quotes_kept"] * 2
    # R quotes the header too: then the file is quoted.
    good, _, remarks = read(tmp_path, "b.tsv", '"url"\t"caption"\n"http://a"\t"two ""2""\tpipes"\n')
    assert good == [{"url": "http://a", "caption": 'two "2"\tpipes'}] and not remarks


def test_repeated_and_missing_headers_are_named(tmp_path):
    good, _, remarks = read(tmp_path, "a.csv", "url,caption,caption,caption_2\na,1,2,3\nb,4,5,6\n")
    assert good[0] == {"url": "a", "caption": "1", "caption_3": "2", "caption_2": "3"}
    assert remarks == ["repeated_column: caption is stored as caption_3"]
    for name, separator in (("a.csv", ","), ("a.tsv", "\t"), ("a.txt", "\t")):
        data = f"a cat{separator}http://a\na dog{separator}http://b\n"
        good, _, _ = read(tmp_path, name, data, ("caption", "url"))
        assert good == [{"caption": "a cat", "url": "http://a"}, {"caption": "a dog", "url": "http://b"}]


def test_long_cells_and_odd_bytes_are_read(tmp_path):
    long = "x" * 200_000
    good, problems, remarks = read(tmp_path, "a.csv", f'url,caption\na,{long}\nb,"{long}"\n'.encode()
                                   + b"c,caf\xe9\nd,caf\xc3\xa9\ne,\xef\xbf\xbd\n")
    assert [row["caption"] for row in good] == [long, long, "caf\ufffd", "café", "\ufffd"] and not problems
    assert remarks == ["cell_changed: caption: bytes that are not UTF-8"]
    with pytest.raises(ValueError, match="UTF-16"):
        read(tmp_path, "b.csv", "url,caption\na,b\n".encode("utf-16"))


def test_a_file_of_a_strict_writer_is_read_unchanged(tmp_path):
    rng = random.Random(0)
    for _ in range(200):
        rows = [["".join(rng.choice('ab",\n\r \\é\t') for _ in range(rng.randint(0, 9))) for _ in range(3)]
                for _ in range(rng.randint(1, 9))]
        text = io.StringIO(newline="")
        # With "\n" alone, `csv` leaves cells with a carriage return unquoted.
        ending, quoting = rng.choice([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)])
        writer = csv.writer(text, lineterminator=ending, quoting=quoting)
        if quoting == csv.QUOTE_MINIMAL:  # a line of a cell may not end as rows do, or it may be one
            rows = [[cell.replace("\r\n", "\n") for cell in row] for row in rows]
        writer.writerows([["one", "two", "three"], *rows])
        good, problems, _ = read(tmp_path, "a.csv", text.getvalue())
        assert not problems
        expected = [[cell or None for cell in row] for row in rows]
        assert [list(row.values()) for row in good] == expected


def test_lines_may_end_with_carriage_returns(tmp_path):
    good, problems, _ = read(tmp_path, "a.csv", "url,caption\ra,one\rb,two\r")
    assert [row["caption"] for row in good] == ["one", "two"] and not problems
    good, problems, _ = read(tmp_path, "a.csv", "url,caption\r\na,one\rmore\r\nb,two\r\n")
    assert [row["caption"] for row in good] == ["one\rmore", "two"] and not problems


def test_captions_in_two_lines_are_one_cell(tmp_path):
    rows = [[f'the "{name}",\nin two lines', name] for name in ("a.jpg", "http://x/b.jpg")]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["caption", "file"], *rows])
    good, problems, _ = read(tmp_path, "a.csv", text.getvalue())
    assert [list(row.values()) for row in good] == rows and not problems


@pytest.mark.parametrize("first", ["sep=;\n", "SEP=;\r\n", '"sep=;"\n', "\ufeffsep=;\n", "sep=;\n\ufeff"])
def test_the_first_line_may_name_another_delimiter(tmp_path, first):
    path = tmp_path / "a.csv"
    path.write_bytes(f'{first}url;caption\nh://1;"one, ""two""; three"\nh://2;four, five\nh://3\n'.encode())
    rows = list(read_rows(str(path)))
    assert [row.cells for row in rows[:2]] == [{"url": "h://1", "caption": 'one, "two"; three'},
                                               {"url": "h://2", "caption": "four, five"}]
    assert (rows[2].place, rows[2].problem) == ("a.csv, row 3, line 5", "1 cells, and the header has 2")
    assert read_header(str(path)) == ["url", "caption"]
    path.write_bytes(b"sep=,\nh://1,one\n")
    [row] = read_rows(str(path), ("url", "caption"))
    assert row.cells == {"url": "h://1", "caption": "one"}


@pytest.mark.parametrize(("name", "header", "hint"), [
    ("a b.csv", ["url;caption"], "(echo 'sep=;'; cat 'a b.csv') > 'sep_a b.csv'"),
    ("a.csv", ["url\tcaption"], "end its name in .tsv"), ("a.tsv", ["url,caption"], "end its name in .csv"),
    ("a.csv.gz", ["url|caption"], "write a .csv that is not compressed, with the first line sep=|")])
def test_a_header_with_another_delimiter_has_a_hint(name, header, hint):
    with pytest.raises(ValueError, match="the header has") as error:
        check_delimiter(header, f"s3://b/{name}")
    assert str(error.value).endswith(f"\nhint: {hint}")
    for usual, names in (("a.csv", ["url", "caption;"]), ("a.csv", ["url"]), ("a.jsonl", ["a;b"]), ("a.csv", [])):
        check_delimiter(names, usual)


def test_many_open_quotes_take_linear_time(tmp_path):
    count = 3000
    data = "url,caption\n" + "".join(f'http://x/{number},"open ""{number}\n' for number in range(count))
    good, problems, _ = read(tmp_path, "a.csv", data)
    assert len(good) + len(problems) == count and not good
