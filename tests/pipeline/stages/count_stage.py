"""A small stage that counts, and the files that it leaves."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.stages.driver import run_stage
from pipeline.stages.manifest import without_run_facts
from pipeline.stages.stage import Stage
from pipeline.stages.types import Entry, Item, Output
from tests.pipeline import synthetic


@dataclass(frozen=True)
class CountConfig:
    step: int = 1
    text: str = "x"


class Count(Stage):
    """Six items of two files each. `broken` names items that fail."""

    name = "count"

    def __init__(self, root, config=None, broken=()):
        super().__init__(str(root), "count", config or CountConfig())
        self.broken, self.processed = broken, []

    def inputs(self):
        return {"numbers": {"path": "", "digest": "1"}}

    def plan(self):
        named = [(storage.name_by_content(f"lists/{number}.txt", data), data) for number, data in
                 ((number, str(number * self.config.step).encode()) for number in range(6))]
        return [Item(f"{number:06d}", {"list": name}, ((name, data),)) for number, (name, data) in enumerate(named)]

    def process(self, item, scratch):
        self.processed.append(item.id)
        error = self.broken.get(item.id) if self.broken else None
        if error:
            raise error
        number = storage.read_bytes(storage.join(self.folder, item.inputs["list"]))
        for name in "ab":
            (scratch / name).write_bytes(name.encode() + number * 100)
        return Output(2, {f"{item.id}.{name}": scratch / name for name in "ab"},
                      [Entry("k", "odd", "left out"), Entry("k", "remark", kept=True)] if number == b"1" else [])

    def finish(self, records, scratch):
        (scratch / "all").write_text(" ".join(record["id"] for record in records))
        return Output(files={"all.txt": scratch / "all"}, info={"records": len(records)})


def lasting_files(folder) -> dict[str, bytes]:
    """The lasting content of a folder: without leftovers of a killed process, seconds and dates."""
    files = {name: data for name, data in synthetic.files_below(Path(folder)).items()
             if not any(part.startswith(".") for part in Path(name).parts) and not name.endswith("_stats.json")}
    for name, data in files.items():
        document = json.loads(data) if name.endswith(".json") else None
        if name == "manifest.json":
            document = without_run_facts(document)
        if isinstance(document, dict):
            document.pop("run", None)
            files[name] = json.dumps(document, sort_keys=True).encode()
    return files


def stage_folder(stage: Stage) -> str:
    run_stage(stage)
    return stage.folder
