"""Each row of a source becomes one sample or line of the ledger, however often it is tried."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.datasets.dataset import Dataset
from pipeline.shards.shard import Shard
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from tests.laws.rows.row_accounting import (
    PICTURES,
    check_accounting,
    config,
    shard_source,
    stored_images,
    write_list,
    write_url_list,
)
from tests.pipeline import synthetic
from tests.pipeline.shards.test_shard import ledger, table

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.mark.parametrize("kind", ["parquet", pytest.param("csv", marks=pytest.mark.slow),
                                  pytest.param("jsonl", marks=pytest.mark.slow)])
def test_every_row_is_a_sample_or_has_a_reason(tmp_path, image_site, kind):
    expected = {"00.png": "", "absent.png": "http_404", "status/403": "http_403", "status/204": "empty_file",
                "text.jpg": "not_a_picture", "empty.png": "empty_file", "cut.jpg": "corrupt", "small.png": "too_small",
                "long.png": "too_small", "loop": "too_many_redirects", "hops/3?file=01.png": "",
                "redirect?to=%2F02.png": "", "redirect?to=http://127.0.0.2/": "forbidden_address",
                "redirect?to=file:///etc/passwd": "bad_url", "robots?value=noai&file=03.png": "robots",
                "robots?value=all&file=03.png": "", "cut?file=04.png": "cut", "garbage": "protocol",
                "status/500": "http_500", "type-lie?file=05.png": "", "chunked?file=06.png": "",
                "gzipped?file=07.png": "", "private?user:word": "http_401"}
    addresses = [f"http://{image_site}/{path}" for path in expected]
    more = {"": "bad_url", "no address": "bad_url", "ftp://example.org/a.png": "bad_url",
            "http://localhost/a.png": "forbidden_address", "http://169.254.169.254/latest": "forbidden_address"}
    dataset, manifest = shard_source(tmp_path, write_url_list(tmp_path / f"list.{kind}", [*addresses, *more]),
                                     min_size=10, where='not contains(caption, "row 0")')
    reasons = check_accounting(dataset, manifest, len(expected) + len(more))
    assert reasons == dict(list(enumerate([*expected.values(), *more.values()]))[1:])
    late = {"not_a_picture", "empty_file", "corrupt", "too_small"}
    for line in table(dataset, manifest):
        reason = reasons[line["source_row"]]
        assert line["status"] == ("success" if not reason else "failed_to_resize" if reason in late
                                  else "failed_to_download"), line
        assert line["caption"] == f"row {line['source_row']}"
    assert Counter(line["reason"] for line in ledger(dataset, manifest) if not line["kept"]) == Counter(
        filter(None, reasons.values())) == manifest["totals"]["skipped"]


def test_hashes_of_the_list_are_checked(tmp_path, image_site):
    def hash_cells(algorithm: str) -> list[str]:
        right = [hashlib.new(algorithm, PICTURES[f"{number:02d}.png"]).hexdigest() for number in range(8)]
        return [right[0], right[1].upper(), f" {right[2]}\n", right[0], "0" * len(right[0]), "garbage", "", "z" * len(
            right[0])]
    for name in ("sha256", "md5", "original_sha256"):
        cells = hash_cells(name.removeprefix("original_"))
        rows = [{"url": f"http://{image_site}/{number:02d}.png", name: cell} for number, cell in enumerate(cells)]
        for kind in ("csv", "parquet"):
            root = tmp_path / f"{name}-{kind}"
            dataset, manifest = shard_source(root, write_list(tmp_path / f"{name}.{kind}", rows))
            reasons = check_accounting(dataset, manifest, 8)
            assert [row for row, reason in reasons.items() if reason] == [3, 4]
            assert manifest["totals"]["skipped"] == {"hash_mismatch": 2}
            assert manifest["totals"]["noted"] == {"hash_unreadable": 2}
            assert [line["status"] for line in table(dataset, manifest)][3] == "failed_to_download"
        dataset, manifest = shard_source(tmp_path / f"{name}-none", tmp_path / f"{name}.csv", hash_column="none")
        assert manifest["totals"]["samples"] == 8 and manifest["totals"]["noted"] == {}
    raw = [{"url": f"http://{image_site}/{number:02d}.png", "sha256": hashlib.sha256(PICTURES["00.png"]).digest()}
           for number in range(2)]
    _, manifest = shard_source(tmp_path / "raw", write_list(tmp_path / "raw.parquet", raw))
    assert manifest["totals"]["skipped"] == {"hash_mismatch": 1} and manifest["totals"]["noted"] == {}


def file_texts(folder: Path) -> dict[str, str]:
    """Every file below a folder as text, parquet and tars with what is in them."""
    texts = {}
    for name, data in synthetic.files_below(folder).items():
        texts[name] = data.decode("latin-1")
        if name.endswith(".parquet"):
            texts[name] += json.dumps(pq.read_table(io.BytesIO(data)).to_pylist(), default=str)
    return texts


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl.gz"])
def test_passwords_in_urls_appear_nowhere(tmp_path, image_site, kind):
    import gzip
    rows = [{"url": url, "caption": f"row {number}", "mirror": url} for number, url in enumerate((
        f"http://somebody:hidden-word@{image_site}/00.png",
        # The test server needs the expected credentials in the query. Escapes keep them out of the search below.
        f"http://somebody:hidden-word@{image_site}/private?%73omebody:%68idden-word",
        f"http://somebody:hidden-word@{image_site}/absent.png", f"http://hidden-word@{image_site}/text.jpg",
        f"http://{image_site}/01.png", f"http://somebody:hidden%2Dword@{image_site}/garbage", "http://a:hidden-word@[::1/",
        "ftp://a:hidden-word@example.org/", f"http://other:hidden-word@{image_site}/flaky?name={kind}&file=02.png",
        f"http://{image_site}/03.png?x-amz-signature=hidden-word"))]
    path = write_list(tmp_path / f"list.{kind.partition('.')[0]}", rows)
    if kind.endswith(".gz"):
        (tmp_path / "list.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    dataset = Dataset.parse(str(tmp_path / "root"), "x")
    stage = Shard(dataset, config(tmp_path / f"list.{kind}", samples_per_shard=4))
    manifest = run_stage(stage, retry=True)
    reasons = [line["error_message"] and line["error_message"].split(":")[0] for line in table(dataset, manifest)]
    # The password reached its server: what it answers to it is no image, but not 401.
    assert reasons[:10] == [None, "not_a_picture", "http_404", "not_a_picture", None, "protocol", "bad_url", "bad_url",
                            "http_500", None]
    assert reasons[-1] is None  # so it did at the second try
    # Rows of a list of text are copied beside the plan as they are: workers need them in full.
    texts = {name: text for name, text in file_texts(tmp_path / "root").items() if "/rows/" not in name}
    assert any("http://***@" in text for text in texts.values())
    for word in ("hidden-word", "hidden%2Dword", "somebody"):
        assert [name for name, text in texts.items() if word in text] == []


@pytest.mark.slow
def test_the_order_of_downloads_does_not_change_the_tars(tmp_path, image_site, monkeypatch):
    from pipeline.downloads import downloader
    monkeypatch.setattr(downloader, "_FIRST_WAIT", 0.05)
    folder = tmp_path / "source"
    folder.mkdir()
    for name, data in PICTURES.items():
        (folder / name).write_bytes(data)
    ways = ["{0}", "flaky?n={2}&name={1}{0}&file={0}", "hops/{2}?file={0}", "chunked?file={0}",
            "busy?after=0&n=1&name={1}{0}&file={0}"]
    runs = []
    for run in range(2):
        addresses = [f"http://{image_site}/{ways[number % len(ways)].format(name, run, number % 3 + 1)}"
                     for number, name in enumerate(sorted(PICTURES))]
        dataset, manifest = shard_source(tmp_path / f"{run}", write_url_list(tmp_path / f"{run}.csv", addresses),
                                         samples_per_shard=24, download={"retries": 3, "connections": 24})
        assert set(check_accounting(dataset, manifest, 24).values()) == {""}
        runs.append((dataset, manifest))
    local = shard_source(tmp_path / "local", folder, samples_per_shard=24)
    assert stored_images(*runs[0]) == stored_images(*runs[1]) == stored_images(*local)
    assert [line["source_row"] for line in table(*runs[0])] == list(range(24))
    # The same list twice: the same bytes.
    paths = ("00.png", "hops/2?file=01.png", "02.png", "absent.png")
    plain = write_url_list(tmp_path / "plain.csv", [f"http://{image_site}/{path}" for path in paths])
    twice = [shard_source(tmp_path / name, plain, samples_per_shard=3) for name in ("one", "other")]
    assert without_run_facts(twice[0][1]) == without_run_facts(twice[1][1])
    first, second = (synthetic.files_below(tmp_path / name) for name in ("one", "other"))
    for name in first:
        if name.endswith((".tar", ".parquet", ".jsonl")):
            assert first[name] == second[name]
