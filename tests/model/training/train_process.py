"""One process of a shared toy run: `python train_process.py RANK WORLD PORT FOLDER ddp|fsdp`.

It resumes from FOLDER/0000002 if that exists.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[3]))

import toy_run  # by its own folder: an installed package may be called `tests`

from model.training.train import train


def main(rank: int, world: int, port: int, folder: Path, fsdp: bool) -> None:
    """Train the toy run as this rank and leave checkpoint and log in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    # Accumulation is on, because it must not change the result either.
    config, records = toy_run.config(steps=5, accumulate=world, fsdp=fsdp), []
    started = folder / "0000002"
    train(
        config,
        toy_run.batches(config.global_batch, rank, world),
        device="cpu",
        save=lambda step, write: write(folder / f"{step:07d}"),
        log=records.append,
        # One process gets the signal to stop after the fourth step, and all must stop then.
        stop=iter([rank == world - 1 and step == 3 for step in range(2 if started.exists() else 0, 5)]).__next__,
        resume=started if started.exists() else None,
    )
    dist.destroy_process_group()
    (folder / f"records{rank}.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5] == "fsdp")
