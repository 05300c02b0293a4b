"""`python -m jobs pipeline`: the verbs that bring a dataset all the way, one after another."""

from collections.abc import Iterator
from typing import Any

from jobs import commands
from jobs.runs.run import Run
from pipeline.datasets.dataset import Dataset


def pipeline_steps(command: commands.PipelineCommand) -> Iterator[tuple[str, Any, str]]:
    """Each verb with its own command, and the folder that is sealed when it has ended."""
    name, cluster, common, again = command.dataset, command.cluster, command.common, commands.Rebuild()
    dataset, database = Dataset.parse(common.root, name), Dataset.parse(common.root, command.database or name)
    yield "shard", commands.ShardCommand(name, command.shard, cluster, common, again), dataset.folder("shards")
    yield ("embed", commands.EmbedCommand(name, command.embed, cluster, common, again),
           dataset.folder("embeddings"))
    yield "index", commands.IndexCommand(name, command.index, cluster, common, again), dataset.folder("index")
    if command.database or command.trained:
        yield ("neighbors", commands.NeighborsCommand(name, command.neighbors, cluster, common, again, database.label),
               dataset.folder(f"neighbors/{database.label}"))
    if command.trained:
        yield ("train", commands.TrainCommand(command.trained, name, command.train, cluster, common, again,
                                              database.label), Run.parse(common.root, command.trained).folder)
