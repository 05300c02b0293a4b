"""Sizes: one parser, and a stored form that means the same as in plans of earlier versions."""

import pytest

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.formats.sizes import parse_size, stored_size
from pipeline.indices.config import SIZES, IndexConfig
from pipeline.indices.index import Index, build_index
from pipeline.sources.config import ShardConfig
from pipeline.stages.documents import FORMAT
from pipeline.stages.driver import run_stage
from pipeline.stages.plan import prepare
from pipeline.storage import cache
from tests.pipeline import synthetic

EARLIER_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@pytest.mark.parametrize("text", ["4Gi", "4gi", "4GiB", " 4 Gi ", "4096Mi", str(4 << 30), 4 << 30])
def test_binary_sizes_are_read(text):
    assert parse_size(text, "size") == 4 << 30


@pytest.mark.parametrize("text", ["4G", "4g", "4GB", " 4 G ", "4000M", "4000000K", "0.004T", str(4 * 10**9)])
def test_decimal_sizes_are_read(text):
    assert parse_size(text, "size") == 4 * 10**9


@pytest.mark.parametrize("text", ["", "four", "4X", "-1G", "4G5", "1e9", "4i", "4iB", "4 G i"])
def test_every_invalid_size_has_the_same_message(text, tmp_path, monkeypatch):
    config = {"source": ("pictures",), "shard_size": text or " "}
    monkeypatch.setenv("RDM_CACHE_BYTES", text or " ")
    for name, read in (("shard.shard_size", lambda: ShardConfig(**config)),
                       ("index.part_memory", lambda: IndexConfig(part_memory=text)),
                       ("RDM_CACHE_BYTES", cache._cache_bytes)):
        with pytest.raises(ValueError, match=rf"^{name} = '.*': must be a size\nhint: .*4Gi$"):
            read()


@pytest.mark.parametrize("number", ["1", "2.5", "512", "1000", "1024"])
@pytest.mark.parametrize("unit", ["K", "M", "G", "T"])
@pytest.mark.parametrize("end", ["", "B"])
def test_the_stored_form_means_the_same_bytes_as_in_earlier_versions(number, unit, end):
    binary, decimal = f"{number}{unit}i{end}", f"{number}{unit}{end}"
    assert stored_size(binary, "size") == decimal  # as earlier versions stored it, whose units were binary
    assert parse_size(binary, "size") == int(float(number) * EARLIER_UNITS[unit])
    # Digits meant bytes in all versions.
    assert stored_size(decimal, "size") == str(parse_size(decimal, "size")) == str(int(
        float(number) * 1000 ** "KMGT".index(unit) * 1000))
    assert stored_size(number, "size") == number


def test_the_size_of_a_shard_is_decimal_as_before():
    sides = [ShardConfig(source=("x",), shard_size=text).rows_per_shard for text in ("500M", "500000000", "500MB")]
    assert len(set(sides)) == 1
    assert ShardConfig(source=("x",), shard_size="500Mi").rows_per_shard > sides[0]


@pytest.fixture
def planned(tmp_path):
    """A dataset whose index was planned by an earlier version with `--max-memory 500K --part-memory 2M`."""
    dataset = synthetic.vector_dataset(tmp_path, "x", [synthetic.clustered(400, 16)])
    now = Index(dataset, IndexConfig(key="IVF4,SQ8", queries=50))
    prepare(now)
    address = storage.join(now.folder, "plan.json")
    plan = storage.read_json(address)
    plan["section"] |= {"max_memory": "500K", "part_memory": "2M"}
    plan["fingerprint"] = storage.digest([FORMAT, "index", plan["section"], plan["inputs"]])
    storage.put_json(plan, address)
    return dataset, plan["fingerprint"]


def test_a_plan_of_an_earlier_version_is_continued_with_the_same_bytes(planned):
    dataset, fingerprint = planned
    index = Index(dataset, IndexConfig(key="IVF4,SQ8", queries=50, max_memory="500Ki", part_memory="2Mi"))
    plan = storage.read_bytes(storage.join(index.folder, "plan.json"))
    manifest = build_index(index, run_stage)
    assert storage.read_bytes(storage.join(index.folder, "plan.json")) == plan
    assert manifest["fingerprint"] == fingerprint and manifest["info"]["budget"] == 500 << 10
    assert (manifest["section"]["max_memory"], manifest["section"]["part_memory"]) == ("500K", "2M")


def test_the_spelling_of_an_earlier_version_is_refused_with_a_hint(planned):
    dataset, _ = planned
    with pytest.raises(ValueError, match=r'(?s)max_memory: there "500K", now "500000".*\nhint: .*write .* as 4Gi'):
        prepare(Index(dataset, IndexConfig(key="IVF4,SQ8", queries=50, max_memory="500K", part_memory="2Mi")))


def test_defaults_are_stored_as_in_earlier_versions(tmp_path):
    section = Index(Dataset(str(tmp_path), "x"), IndexConfig()).section()
    assert section["max_memory"] == "4G" and section["part_memory"] == "512M" and "merge_memory" not in section
    sizes = {name: parse_size(getattr(IndexConfig(), name), name) for name in SIZES}
    assert sizes == {"max_memory": 4 << 30, "part_memory": 512 << 20, "merge_memory": 4 << 30}
