"""Deduplication keeps the first of equal images and accounts for all others."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.shards import deduplicate, shard
from pipeline.shards.deduplicate import Deduplicate
from pipeline.shards.shard import Shard
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.stages.plan import prepare
from pipeline.stages.worker import process_and_commit
from tests.laws.rows.row_accounting import check_accounting, config, write_url_list
from tests.pipeline import synthetic
from tests.pipeline.shards.test_shard import ledger, table
from tests.pipeline.synthetic import encoded, noise

pytestmark = pytest.mark.usefixtures("private_cache")


def blot(number: int, shade: int = 0) -> Image.Image:
    """A different image for each number, a little darker with `shade`."""
    rng = np.random.default_rng(number)
    image = Image.new("RGB", (64, 64), tuple(map(int, rng.integers(0, 256, 3))))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, width, height = map(int, rng.integers(0, 50, 4))
        draw.rectangle((x, y, x + width, y + height), tuple(map(int, rng.integers(0, 256, 3))))
    return Image.fromarray((np.asarray(image).astype(int) - shade).clip(0, 255).astype(np.uint8))


# Numbers of images, and how each is stored: the same file, the same pixels, or nearly the same.
KINDS = [(0, "png"), (1, "png"), (0, "png"), (2, "png"), (1, "webp"), (3, "png"), (0, "dark"), (4, "png"), (3, "dark"),
         (2, "png"), (5, "png"), (5, "webp"), (5, "dark"), (6, "png")]


def blots(folder: Path) -> Path:
    folder.mkdir()
    for place, (number, kind) in enumerate(KINDS):
        image = blot(number, 2 if kind == "dark" else 0)
        data = encoded(image, "WEBP", lossless=True) if kind == "webp" else encoded(image, "PNG")
        (folder / f"{place:02d}.{'webp' if kind == 'webp' else 'png'}").write_bytes(data)
    (folder / "05 broken.png").write_bytes(b"no picture")
    return folder


def kept_positions(how: str) -> list[int]:
    """The positions of the images that stay; None for the broken one."""
    seen, kept = set(), []
    for position, (number, kind) in enumerate(KINDS):
        sign = number if how == "near" else (number, kind == "dark")
        if sign not in seen:
            seen.add(sign)
            kept.append(position)
    return kept


@pytest.mark.parametrize("how", ["exact", "near"])
def test_the_first_of_several_duplicates_stays(tmp_path, how):
    source, results = blots(tmp_path / "source"), []
    for size in (3, 100, 1):
        dataset = Dataset.parse(str(tmp_path / f"{size}"), "x")
        final_stage = Deduplicate(dataset, config(source, duplicates=how, samples_per_shard=size, image_size=64))
        manifest = deduplicate.deduplicate_shards(final_stage, run_stage)
        reasons = check_accounting(dataset, manifest, len(KINDS) + 1)
        lines = table(dataset, manifest)
        assert [int(line["url"][:2]) for line in lines if line["status"] == "success"] == kept_positions(how)
        assert reasons[5] == "not_a_picture"
        assert sum(reason == "duplicate" for reason in reasons.values()) == len(KINDS) - len(kept_positions(how))
        duplicates = [line for line in lines if line["status"] == "duplicate"]
        assert all(line["error_message"].startswith("duplicate: of sample ") for line in duplicates)
        assert sorted(line["key"] for line in ledger(dataset, manifest)) == sorted(
            ["05 broken.png", *(line["url"] for line in duplicates)])
        assert not storage.exists(storage.join(dataset.folder("unsifted"), "plan.json"))
        assert not (tmp_path / f"{size}" / "datasets" / "x" / "v1" / "unsifted").exists()
        before = synthetic.files_below(tmp_path / f"{size}")
        assert without_run_facts(deduplicate.deduplicate_shards(final_stage, run_stage)) == without_run_facts(manifest)
        assert synthetic.files_below(tmp_path / f"{size}") == before
        results.append([(line["url"], line["status"]) for line in lines])
    assert results[0] == results[1] == results[2]


def test_removed_duplicates_name_the_sample_that_stays(tmp_path):
    dataset = Dataset.parse(str(tmp_path), "x")
    manifest = deduplicate.deduplicate_shards(Deduplicate(dataset, config(
        blots(tmp_path / "source"), duplicates="exact", samples_per_shard=3, image_size=64)), run_stage)
    details = {line["url"]: line["error_message"] for line in table(dataset, manifest) if line["status"] == "duplicate"}
    assert details["02.png"] == "duplicate: of sample 0 of shard 000000"
    assert details["11.webp"] == "duplicate: of sample 2 of shard 000003"


def test_duplicates_among_patches_are_removed(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name, image in (("a.png", noise(32, 32)), ("b.png", Image.new("RGB", (32, 32), "red")),
                        ("c.png", Image.new("RGB", (40, 40), "red"))):
        (source / name).write_bytes(encoded(image, "PNG"))
    dataset = Dataset.parse(str(tmp_path), "x")
    manifest = deduplicate.deduplicate_shards(Deduplicate(dataset, config(
        source, duplicates="exact", samples_per_shard=2, patches=3, patch_side=32,
                                             image_size=8)), run_stage)
    assert manifest["totals"]["samples"] == 4 and manifest["totals"]["skipped"] == {"duplicate": 5}
    assert shard.count_rows(manifest, table(dataset, manifest)) == {"rows": 3, "good": 2, "failed": 1, "filtered": 0}
    stats = [storage.read_json(storage.join(dataset.folder("shards"), f"00000{number}_stats.json"))
             for number in range(2)]
    assert [shard_stats["successes"] for shard_stats in stats] == [2, 0]
    assert [shard_stats["status_dict"] for shard_stats in stats] == [{"success": 2, "duplicate": 0},
                                                                     {"success": 0, "duplicate": 1}]


def test_deduplication_resumes_from_any_point(tmp_path):
    source = blots(tmp_path / "source")

    def make(name: str) -> Deduplicate:
        return Deduplicate(Dataset.parse(str(tmp_path / name), "x"), config(
            source, duplicates="near", samples_per_shard=4, image_size=64))
    expected = without_run_facts(deduplicate.deduplicate_shards(make("whole"), run_stage))

    class Killed(BaseException):
        pass

    def seal_until(stages: int, items: int):
        """Seal some stages, and process some items of the next one."""
        done = []

        def seal(stage):
            if len(done) < stages:
                done.append(stage)
                return run_stage(stage)
            for item in prepare(stage)[:items]:
                process_and_commit(stage, item)
            raise Killed
        return seal
    for stages in (0, 1):
        for items in (0, 1, 3):
            name = f"{stages}-{items}"
            with pytest.raises(Killed):
                deduplicate.deduplicate_shards(make(name), seal_until(stages, items))
            assert without_run_facts(deduplicate.deduplicate_shards(make(name), run_stage)) == expected
    # Sealed, and what it was made from not yet removed.
    interrupted = make("late")
    run_stage(interrupted.whole)
    run_stage(interrupted)
    assert without_run_facts(deduplicate.deduplicate_shards(make("late"), run_stage)) == expected
    assert not (tmp_path / "late" / "datasets" / "x" / "v1" / "unsifted").exists()
    assert without_run_facts(deduplicate.deduplicate_shards(make("late"), run_stage, overwrite=True)) == expected
    with pytest.raises(ValueError, match="duplicate_bits"):
        deduplicate.deduplicate_shards(Deduplicate(interrupted.dataset, config(
            source, duplicates="near", samples_per_shard=4, image_size=64, duplicate_bits=2)), run_stage)


def test_a_retried_row_stays_if_it_is_first_in_the_source(tmp_path, image_site):
    addresses = [f"http://{image_site}/{path}" for path in ("flaky?n=1&name=sift&file=00.png", "01.png", "00.png")]
    final_stage = Deduplicate(Dataset.parse(str(tmp_path), "x"),
                              config(write_url_list(tmp_path / "list.csv", addresses), duplicates="exact"))
    manifest = deduplicate.deduplicate_shards(
        final_stage, lambda stage: run_stage(stage, retry=stage is final_stage.whole))
    lines = table(final_stage.dataset, manifest)
    assert [(line["source_row"], line["status"]) for line in lines] == [
        (0, "failed_to_download"), (1, "success"), (2, "duplicate"), (0, "success")]
    with pytest.raises(ValueError, match="duplicates are compared among all"):
        prepare(Shard(final_stage.dataset.next_version(), final_stage.config, base=final_stage.dataset))
