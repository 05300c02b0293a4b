"""Plans and manifests are read once in each process, and a change of them is never missed."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import storage
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.config import EmbedConfig
from pipeline.embeddings.embed import Embed
from pipeline.indices.config import IndexConfig
from pipeline.indices.index import Index
from pipeline.neighbors.config import NeighborsConfig
from pipeline.neighbors.neighbors import Neighbors
from pipeline.shards.shard import Shard
from pipeline.sources.config import ShardConfig
from pipeline.stages import manifest
from pipeline.stages.driver import run_in_process, run_stage
from pipeline.stages.plan import prepare
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Outcome, Output, StageFailed
from tests.pipeline import synthetic

_DOCUMENTS = ("/plan.json", "/manifest.json")
_recordings: list[Counter[str]] = []


def _record_open(event: str, arguments: Any) -> None:
    if event == "open" and _recordings and str(arguments[0]).endswith(_DOCUMENTS):
        _recordings[-1][str(arguments[0])] += 1


sys.addaudithook(_record_open)


@contextmanager
def count_opens() -> Iterator[Counter[str]]:
    """Counts how often this process opens each plan.json and manifest.json. It remembers none from before."""
    manifest._kept.clear()
    _recordings.append(Counter())
    try:
        yield _recordings[-1]
    finally:
        _recordings.pop()


def _count(opens: Counter[str], name: str) -> int:
    return sum(number for path, number in opens.items() if path.endswith(f"/{name}.json"))


def _stages(dataset: Dataset, images: Path) -> list[Stage]:
    return [Shard(dataset, ShardConfig(source=str(images), samples_per_shard=10, image_size=16, format="png")),
            Embed(dataset, EmbedConfig(batch_size=16)), Index(dataset, IndexConfig(key="IVF4,SQ8", queries=20)),
            Neighbors(dataset, dataset, NeighborsConfig(k=3))]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 images."""
    return synthetic.drawings(tmp_path_factory.mktemp("images"), subjects=10, size=16)


def test_each_stage_reads_each_manifest_once(tmp_path: Path, images: Path) -> None:
    manifests = {"shard": 0, "embed": 1, "index": 2, "neighbors": 3}
    for stage in _stages(Dataset.parse(str(tmp_path), "x"), images):
        with count_opens() as opens:
            sealed = run_stage(stage)
        assert len(sealed["items"]) == (1 if stage.name == "index" else 6)
        assert _count(opens, "plan") <= 2, opens
        assert _count(opens, "manifest") == manifests[stage.name], opens
        assert max((number for path, number in opens.items() if path.endswith("manifest.json")), default=1) == 1


def test_neighbors_in_another_dataset_read_five_manifests(tmp_path: Path) -> None:
    queries = synthetic.vector_dataset(tmp_path, "queries", np.split(synthetic.clustered(60, 16), 6))
    database = synthetic.vector_dataset(tmp_path, "database", np.split(synthetic.clustered(400, 16, seed=1), 4))
    run_stage(Index(database, IndexConfig(key="IVF4,SQ8", queries=20)))
    with count_opens() as opens:
        run_stage(Neighbors(queries, database, NeighborsConfig(k=3)))
    assert _count(opens, "plan") <= 2 and _count(opens, "manifest") == 5, opens
    assert {number for path, number in opens.items() if path.endswith("manifest.json")} == {1}


@dataclass(frozen=True)
class _LoggedConfig(NeighborsConfig):
    log: str = ""


class _Logged(Neighbors):
    """A neighbors stage whose workers log the plans and manifests that they open."""

    def section(self) -> dict[str, Any]:
        return {name: value for name, value in super().section().items() if name != "log"}

    def setup(self) -> None:
        descriptor = os.open(self.config.log, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

        def log(event: str, arguments: Any) -> None:
            if event == "open" and str(arguments[0]).endswith(("/plan.json", "/manifest.json")):
                os.write(descriptor, f"{os.getpid()} {arguments[0]}\n".encode())
        sys.addaudithook(log)


@pytest.mark.ray
def test_workers_of_ray_read_no_plan_and_each_manifest_once(cluster: Any, tmp_path: Path) -> None:
    from ray import cloudpickle

    from jobs.cluster.actor_pool import Pool
    from jobs.cluster.config import ClusterConfig
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    root, log = tmp_path / "root", tmp_path / "opened"
    dataset = synthetic.vector_dataset(root, "x", np.split(synthetic.clustered(400, 16), 8))
    run_stage(Index(dataset, IndexConfig(key="IVF4,SQ8", queries=20)))
    pool = Pool(ClusterConfig(workers=2))
    try:
        sealed = run_stage(_Logged(dataset, dataset, _LoggedConfig(k=3, log=str(log))), pool)
        opens = Counter(log.read_text().splitlines())
        assert len(sealed["items"]) == 8 and opens
        assert not [line for line in opens if line.endswith("plan.json")]
        assert set(opens.values()) == {1}, opens
        # The same workers, another version: nothing of the first one is used.
        other = synthetic.vector_dataset(root, "x@v2", np.split(synthetic.clustered(400, 16, seed=5), 8))
        run_stage(Index(other, IndexConfig(key="IVF4,SQ8", queries=20)))
        on_ray = run_stage(_Logged(other, other, _LoggedConfig(k=3, log=str(log))), pool)
    finally:
        pool.close()
    alone = run_stage(Neighbors(other, other, NeighborsConfig(k=3)), overwrite=True)
    assert manifest.without_run_facts(on_ray) == manifest.without_run_facts(alone)


def _replace_embeddings(dataset: Dataset, seed: int) -> None:
    vectors = np.split(synthetic.clustered(60, 16, seed=seed).astype(np.float16), 6)
    run_stage(synthetic.FixedStage(dataset, "embeddings", "embed", {
        f"{number:06d}": (10, {f"{number:06d}.npy": synthetic.npy(part)}) for number, part in enumerate(vectors)},
        {"encoder": synthetic.ENCODER}), overwrite=True)


def test_an_input_that_changes_while_a_stage_runs_is_not_sealed(tmp_path: Path) -> None:
    dataset = synthetic.vector_dataset(tmp_path, "x", np.split(synthetic.clustered(60, 16), 6))
    stage = Neighbors(dataset, dataset, NeighborsConfig(k=3, method="exact"))

    def changing(stage: Stage, items: Sequence[Item]) -> Iterator[Outcome | None]:
        for number, outcome in enumerate(run_in_process(stage, items)):
            if number == 3:
                _replace_embeddings(dataset, seed=3)
            yield outcome

    with pytest.raises(StageFailed, match=r"(?s)neighbors: database, embeddings changed since .* was planned: expected "
                                          r".*\nhint: .*neighbors x --database x"):
        run_stage(stage, changing)
    assert not storage.exists(storage.join(stage.folder, "manifest.json"))
    again = Neighbors(dataset, dataset, NeighborsConfig(k=3, method="exact"))
    with pytest.raises(ValueError, match="planned with other settings or inputs"):
        run_stage(again)
    run_stage(again, overwrite=True)
    assert again.claim and again.claim.inputs["embeddings"]["digest"] == dataset.manifest("embeddings")["content"]


def test_a_removed_input_is_not_reported_as_changed(tmp_path: Path) -> None:
    """Training may remove a checkpoint while another command samples from it."""
    dataset = synthetic.vector_dataset(tmp_path, "x", np.split(synthetic.clustered(60, 16), 6))
    stage = synthetic.FixedStage(dataset, "text_embeddings", "embed", {"000000": (1, {"a": b"x"})})
    stage.inputs = lambda: {"shards": {  # type: ignore[method-assign]
        "path": dataset.path("shards"), "digest": manifest.read_manifest(dataset.folder("shards"), "")["content"]}}
    prepare(stage)
    os.rename(dataset.folder("shards"), tmp_path / "aside")
    assert manifest.changed_inputs(dataset.root, {"inputs": stage.claim.inputs}) == ["shards"]  # type: ignore[union-attr]
    kept = stage.inputs
    stage.inputs = lambda: stage.claim.inputs  # type: ignore[method-assign, union-attr]
    run_stage(stage)
    # A folder that is planned again, and not yet sealed, did change.
    stage.inputs = kept  # type: ignore[method-assign]
    (tmp_path / "aside" / "manifest.json").unlink()
    os.rename(tmp_path / "aside", dataset.folder("shards"))
    assert "shards changed since" in manifest.stale_inputs(stage, stage.claim)  # type: ignore[arg-type]


def test_a_manifest_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    dataset = synthetic.vector_dataset(tmp_path, "x", np.split(synthetic.clustered(60, 16), 6))
    first = dataset.manifest("embeddings")
    assert dataset.manifest("embeddings") == first
    _replace_embeddings(dataset, seed=4)
    second = dataset.manifest("embeddings")
    assert second["content"] != first["content"]
    # The caller may change the returned document.
    second["items"].clear()
    assert len(dataset.manifest("embeddings")["items"]) == 6
    path = Path(dataset.folder("embeddings"), "manifest.json")
    path.write_bytes(path.read_bytes().replace(second["content"].encode(), first["content"].encode()))
    assert dataset.manifest("embeddings")["content"] == first["content"]


def test_a_published_manifest_is_compared_with_its_hash_each_time(tmp_path: Path) -> None:
    dataset = synthetic.vector_dataset(tmp_path, "x", [synthetic.clustered(30, 16)])
    path = Path(dataset.folder("embeddings"), "manifest.json")
    trusted = Dataset(dataset.root, "x", trusted=(("embeddings", storage.sha256_file(path)),))
    other = Dataset(dataset.root, "x", trusted=(("embeddings", "0" * 64),))
    trusted.manifest("embeddings")
    with pytest.raises(ValueError, match="is not the one that was published"):
        other.manifest("embeddings")
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match="is not the one that was published"):
        trusted.manifest("embeddings")


def test_on_an_object_store_a_manifest_that_was_replaced_is_read_again(s3: str) -> None:
    dataset = synthetic.vector_dataset(s3, "x", np.split(synthetic.clustered(60, 16), 6))  # type: ignore[arg-type]
    first = dataset.manifest("embeddings")["content"]
    _replace_embeddings(dataset, seed=4)
    assert dataset.manifest("embeddings")["content"] != first
    stage = Neighbors(dataset, dataset, NeighborsConfig(k=3, method="exact"))
    prepare(stage)
    _replace_embeddings(dataset, seed=5)
    assert stage.claim and "database, embeddings changed since" in manifest.stale_inputs(stage, stage.claim)


class _Carrying(Stage):
    """Items that carry files of a megabyte; the plan fails after some of them, if it is to."""

    name = "carrying"

    def __init__(self, root: str, items: int, fails: bool = False) -> None:
        super().__init__(root, "carrying", None)
        self.items, self.fails, self.planned = items, fails, 0

    def section(self) -> dict[str, Any]:
        return {}

    def plan(self) -> Iterator[Item]:
        self.planned += 1
        for number in range(self.items):
            yield Item(f"{number:06d}", {}, ((f"lists/{number:06d}", os.urandom(1 << 20)),))
        if self.fails:
            raise ValueError("the source cannot be read")

    def process(self, item: Item, scratch: Path) -> Output:
        return Output(len(storage.read_bytes(storage.join(self.folder, f"lists/{item.id}"))))


def test_overwriting_plans_once_and_holds_little(tmp_path: Path) -> None:
    import tracemalloc
    run_stage(_Carrying(str(tmp_path), 2))
    stage = _Carrying(str(tmp_path), 64)
    tracemalloc.start()
    try:
        sealed = run_stage(stage, overwrite=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert stage.planned == 1 and peak < 16 << 20, peak
    assert [record["samples"] for record in sealed["items"]] == [1 << 20] * 64


@pytest.mark.parametrize("options", [{"items": 3, "fails": True}, {"items": 0}])
def test_a_plan_that_fails_removes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    run_stage(_Carrying(str(tmp_path), 2))
    before = synthetic.files_below(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read|nothing to do"):
        run_stage(_Carrying(str(tmp_path), **options), overwrite=True)
    assert synthetic.files_below(tmp_path) == before
