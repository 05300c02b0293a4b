"""Make one device fail in one way, and print what `pipeline.devices` says of the exception as a line of JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[4]))

import torch


def provoke(failure: str) -> None:
    """Cause the failure that `failure` names."""
    from pipeline.hardware import devices

    if failure in ("hidden card", "absent card"):
        devices.reserve("cuda")
        devices.choose_device()
    if failure == "device-side assert":
        torch.zeros(4, device="cuda")[torch.tensor([1 << 20], device="cuda")].cpu()
    if failure == "out of memory":
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
    if failure == "after out of memory":
        try:
            torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            torch.ones(8, device="cuda").sum().item()
    if failure == "after an assert":
        try:
            provoke("device-side assert")
        except RuntimeError:
            torch.ones(8, device="cuda").sum().item()


def main() -> None:
    """Print kind, type and text."""
    from pipeline.hardware import devices

    try:
        provoke(sys.argv[1])
        outcome = {"kind": "fine", "type": "", "text": ""}
    except Exception as error:
        outcome = {"kind": devices.failure_kind(error), "type": type(error).__name__,
                   "text": " ".join(str(error).split("\n")[:2])}
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
