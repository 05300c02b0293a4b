"""Training with `--compile`. Compilation takes minutes, so this part runs only if `--only` names it."""

from dataclasses import replace

from gpu_parts.model.train import measure_rate, without_checkpointing
from gpu_parts.report import Report

from model import recipes


def run(report: Report) -> None:
    """Measure RDM-256 with channels last, compiled."""
    if report.small:
        report.skip("imagenet_400m, compiled", "takes hours on a CPU")
        return
    recipe = without_checkpointing(recipes.imagenet_400m())
    config = replace(recipe, steps=12, log_every=6, k=4, random_k=False, checkpoint_every=10**6, global_batch=40,
                     compile=True, channels_last=True)
    with report.attempt("imagenet_400m, compiled"):
        measure_rate(report, "imagenet_400m, compiled", config, 64, 0.35)
