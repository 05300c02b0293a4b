"""`python -m jobs demo`: images, datasets, samples of a bundled model, a training run, a report."""

from dataclasses import dataclass, replace
from typing import ClassVar

from jobs.cli.options import CommonOptions, Flat, Unflagged
from jobs.cli.run_stage import open_runner
from jobs.cluster.config import ClusterConfig
from jobs.config.settings import Settings
from jobs.telemetry import output
from pipeline import storage


@dataclass(frozen=True)
class DemoOptions:
    """Run everything on real images: eight style databases, a trained model, samples and a report."""

    examples: ClassVar = ("demo --root data/demo",
                          "demo --drawn --steps 600 --local")

    common: Flat[CommonOptions]
    cluster: Flat[ClusterConfig]
    settings: Unflagged[Settings]
    drawn: bool = False
    """Use the synthetic corpus instead of the emoji."""
    steps: int = 0
    """Training steps. 0: the recipe's, or 600 with a bundled model."""
    subjects: int = 300
    """Subjects of the synthetic corpus."""


def run_demo(options: DemoOptions) -> int:
    from jobs.cli.demo_stages import make_demo
    from jobs.cli.model import train
    settings = replace(options.settings, cluster=options.cluster,
                       pictures=replace(options.settings.pictures, subjects=options.subjects))
    with open_runner(options.common, options.cluster) as runner:
        report = make_demo(storage.normalize(options.common.root), settings, runner, without_emoji=options.drawn,
                           dry_run=options.common.dry_run, steps=options.steps,
                           train=lambda job: train(job, options.cluster, local=options.common.local))
    if report:
        output.print_text(report)
        if not output.wants_json(False):
            output.print_next("python -m jobs ls")
    return 0
