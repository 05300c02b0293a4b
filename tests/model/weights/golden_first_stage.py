"""The small KL first stage of the golden weights."""

import json
from pathlib import Path

from model.weights import compvis, first_stage

GOLDEN = Path(__file__).parent / "golden" / "compvis_small.safetensors"


def save(folder: Path) -> None:
    """Write it as diffusers keeps it. It names no scaling factor."""
    weights = {name: tensor.float() for name, tensor in compvis.read(GOLDEN).first_stage.items()}
    first_stage.build(compvis.first_stage_config(weights),
                      compvis.first_stage_weights(weights)).network.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    del settings["scaling_factor"]
    (folder / "config.json").write_text(json.dumps(settings))
