"""Export a trained network to a folder, and import such a folder as a run for sampling."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.runs.run import LINEAGE, Run, is_run_name
from jobs.training import latents
from model.config import from_dict
from model.weights import checkpoint, first_stage
from pipeline import storage
from pipeline.stages.documents import NUMBER, check_shape
from pipeline.stages.driver import run_stage
from pipeline.stages.stage import Stage
from pipeline.stages.types import Item, Output

WEIGHTS = "ema.safetensors"
BUNDLED = Path(__file__).parents[2] / "model" / "emoji_32"
BUNDLED_RUN = "emoji_32"
"""The name of the bundled model as a run of a root."""
_FIRST_STAGE = {"source": str, "sha256": str, "channels": int, "factor": int, "scale": NUMBER}
_ABOUT = {"config": dict, "step": int, "run": {
    "encoder": {"model": str, "pretrained": str, "dim": int}, "image_size": int, "name?": str, "dataset?": str,
    "database?": str, "lineage?": LINEAGE, "first_stage?": (_FIRST_STAGE, type(None))}}
_PIXELS = {"channels": 3, "factor": 1}
_KEPT = ("encoder", "image_size", "dataset", "database", "first_stage", "lineage")


def export_weights(run: Run, step: int, out: Path) -> dict[str, Any]:
    """Write what sampling needs of a checkpoint into a folder.

    That is the averaged weights in half precision, the first stage as it is, and the settings. ValueError if the first
    stage of the run is missing.
    """
    section, step = run.section() | {"lineage": run.lineage()}, run.choose_step(step)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty\nhint: another --out")
    run.refuse_replaced(step)
    autoencoder = latents.first_stage_of_run(run, "cpu")
    about = checkpoint.halve(run.fetch(step), out)
    if autoencoder:
        latents.save_first_stage(autoencoder, out / latents.IN_THE_RUN)
        section["first_stage"] |= {"source": latents.IN_THE_RUN}
    about["run"] = {name: section[name] for name in _KEPT if section.get(name)} | {"name": run.name}
    (out / "checkpoint.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    total_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"folder": str(out), "step": step, "bytes": total_bytes}


class Import(Stage):
    """The stage from an exported folder to runs/<run>: a checkpoint for sampling, and first_stage/ if it has one."""

    name = "import"

    def __init__(self, run: Run, source: Path) -> None:
        super().__init__(run.root, run.path, None)
        self.run, self.source = run, source
        path = source / "checkpoint.json"
        try:
            self.about = check_shape(storage.parse_json(path.read_bytes(), str(path)), str(path), _ABOUT, "")
            fault = "" if (source / WEIGHTS).is_file() else f"{WEIGHTS} is missing"
        except FileNotFoundError:
            fault = f"{path.name} is missing"
        except storage.DamagedFile as error:
            fault = storage.first_line(error)
        if fault:
            raise ValueError(f"{source} is not a folder that export wrote: {fault}\n"
                             f"hint: python -m jobs export RUN --out FOLDER")
        self.kept = self.about["run"]

    @property
    def command(self) -> str:
        return (f"python -m jobs convert {self.run.name} --checkpoint {storage.quote(str(self.source))} "
                f"--root {storage.quote(self.root)}")

    @property
    def alternative(self) -> str:
        return "give the run another name"

    def section(self) -> dict[str, Any]:
        return {name: self.kept[name] for name in _KEPT if name in self.kept} | {
            "train": self.about["config"], "step": self.about["step"],
            "weights": storage.sha256_file(self.source / WEIGHTS)}

    def plan(self) -> list[Item]:
        self._refuse_unusable()
        return [Item("checkpoint", {"step": self.about["step"]})]

    def process(self, item: Item, scratch: Path) -> Output:
        network, _ = checkpoint.load_denoiser(self.source)
        files = self._first_stage()
        kept = scratch / "checkpoint"
        checkpoint.write_converted(kept, network, from_dict(self.about["config"]), self.about["step"])
        self.run.publish(self.about["step"], kept)
        return Output(samples=sum(weight.numel() for weight in network.parameters()), files=files, info={
            "step": self.about["step"], "checkpoint": self.run.checkpoint(self.about["step"])["content"]})

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        return Output(info=records[0]["info"])

    def _refuse_unusable(self) -> None:
        """ValueError if the facts about the run do not go with its network, so that no image could be generated."""
        network, stage = checkpoint.read_config(self.source).unet, self.kept.get("first_stage") or _PIXELS
        step, size, dim = self.about["step"], self.kept["image_size"], self.kept["encoder"]["dim"]
        factor, side = stage["factor"], max(stage["factor"], 1) * network.stride
        for name, got, expected, fits in (
                ("step", step, "0 or more", step >= 0),
                ("run.first_stage.factor", factor, "1 or more", factor > 0),
                ("run.first_stage.channels", stage["channels"], f"{network.in_channels}, those of the network",
                 stage["channels"] == network.in_channels),
                ("run.image_size", size, f"a multiple of {side} above 0", size > 0 and not size % side),
                ("run.encoder.dim", dim, f"{network.context_dim}, as the network takes", dim == network.context_dim)):
            if not fits:
                raise ValueError(f"{self.source / 'checkpoint.json'}: {name} = {got}: expected {expected}\n"
                                 f"hint: python -m jobs export {self._exported_run} --out FOLDER")

    @property
    def _exported_run(self) -> str:
        """The name of the run where it was exported, RUN if the folder, perhaps of a stranger, has no such name."""
        name = self.kept.get("name", "")
        return name if is_run_name(name) else "RUN"

    def _first_stage(self) -> dict[str, Path]:
        """The files of the first stage by name; ValueError unless it is the one that was exported."""
        known = self.kept.get("first_stage")
        if not known or known["source"] != latents.IN_THE_RUN:  # the folder was named only, before it was carried along
            return {}
        folder = self.source / latents.IN_THE_RUN
        if latents.weights_digest(first_stage.load(folder)) != known["sha256"]:
            raise ValueError(f"{folder} is not the first stage that was exported with {self.source}\n"
                             f"hint: python -m jobs export {self._exported_run} --out FOLDER")
        return {f"{latents.IN_THE_RUN}/{path.name}": path for path in sorted(folder.iterdir())}


def import_run(run: Run, source: Path) -> dict[str, Any]:
    """Import an exported folder as a run, unless it is imported."""
    return run_stage(Import(run, source))
