"""Rates: written, read, checked, and derived from two image sizes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.planning import rates, rates_from_manifests
from jobs.planning.cost_model import Cost, Prices
from jobs.planning.rates import Rates


def test_a_price_has_compute_transfer_and_storage():
    prices = Prices(gpu_hour=2.0, cpu_hour=0.5, gb_month=0.02, gb_moved=0.01, months=3)
    cost = Cost("x", 7200, 4, bytes_read=5e9, bytes_written=2e9, bytes_kept=1e9)
    assert prices.price_of(cost) == pytest.approx(2 * 0.5 + 7 * 0.01 + 3 * 0.02)
    assert prices.price_of(replace(cost, gpu=True)) == pytest.approx(2 * 2.0 + 7 * 0.01 + 3 * 0.02)
    assert Prices().price_of(cost) == 0 and not Prices().has_any and Prices(cpu_hour=0.0).has_any


def test_rates_are_written_and_read(known: Rates, tmp_path: Path):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(rates.document(known)))
    assert replace(rates.read(str(file)), defaults=known.defaults) == known
    file.write_text('{"machine": "ours", "embed": {"flop_per_s": 2e14, "gpu": true}, "approximate": {"nprobe": 8}}')
    file_rates, base = rates.read(str(file)), rates.built_in()
    assert file_rates.embed == replace(base.embed, flop_per_s=2e14, gpu=True) and file_rates.machine == "ours"
    assert file_rates.approximate == replace(base.approximate, nprobe=8) and file_rates.shard == base.shard
    assert set(rates.SECTIONS) - set(file_rates.defaults) == {"embed", "approximate"}
    assert rates.read(str(rates.BUILT_IN)).shard == base.shard


@pytest.mark.parametrize(("text", "sentence"), [
    ("{", "is not JSON"), ("[]", "must be an object of sections"),
    ('{"embedding": {}}', "'embedding' is no section of rates\nhint: here are shard, embed"),
    ('{"shard": 3}', "'shard' is no section"),
    ('{"shard": {"speed": 3}}', "there is no rate 'speed'\nhint: here are pictures_per_s"),
    ('{"shard": {"pictures_per_s": "fast"}}', "pictures_per_s = 'fast': must be of the type float"),
    ('{"shard": {"pictures_per_s": 0}}', "pictures_per_s = 0: must be more than 0"),
    ('{"embed": {"gpu": 1}}', "gpu = 1: must be of the type bool"),
    ('{"approximate": {"nprobe": 1.5}}', "nprobe = 1.5: must be of the type int"),
    ('{"exact": {"flop_per_s": NaN}}', "must be more than 0"),
])
def test_faulty_rates_are_named(text: str, sentence: str, tmp_path: Path):
    (tmp_path / "rates.json").write_text(text)
    with pytest.raises(ValueError, match=r"rates\.json") as raised:
        rates.read(str(tmp_path / "rates.json"))
    assert sentence in str(raised.value)


def test_two_image_sizes_give_the_cost_of_a_pixel(planned_root: Path, tmp_path: Path):
    shutil.copytree(planned_root / "datasets", tmp_path / "datasets")
    manifest = tmp_path / "datasets/twin/v1/shards/manifest.json"
    document = json.loads(manifest.read_text())
    document["section"]["image_size"], document["run"]["seconds"] = 64, 144 * 3.0
    manifest.write_text(json.dumps(document))
    manifest = tmp_path / "datasets/drawn/v1/shards/manifest.json"
    document = json.loads(manifest.read_text())
    document["run"]["seconds"] = 144.0
    manifest.write_text(json.dumps(document))
    shard_rates = rates_from_manifests.rates(str(tmp_path), rates.built_in()).shard
    assert (shard_rates.image_size, shard_rates.pictures_per_s) == (32, 1.0)
    assert shard_rates.seconds_per_pixel == pytest.approx(2 / (64 ** 2 - 32 ** 2))
