"""The stages of the demo: images, datasets, samples of a bundled model, a training run, a report."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jobs.config.recipes import RECIPES
from jobs.config.settings import Settings
from jobs.report import report
from jobs.runs.newest_run import DEMO_RUN
from jobs.runs.run import Run
from jobs.sampling.sample_stage import Sampling
from jobs.telemetry import heartbeat, output
from jobs.telemetry.observe import run_observed
from jobs.telemetry.units import format_bytes
from jobs.training.export import BUNDLED, BUNDLED_RUN, import_run
from jobs.training.train_stage import Job
from pipeline import storage
from pipeline.corpora import drawn as drawn_corpus
from pipeline.corpora import emoji
from pipeline.corpora.demo_corpus import DemoCorpus
from pipeline.datasets.dataset import Dataset
from pipeline.embeddings.embed import Embed
from pipeline.indices.index import Index
from pipeline.neighbors.neighbors import Neighbors
from pipeline.shards.shard import Shard
from pipeline.stages.driver import Runner
from pipeline.stages.plan import prepare
from pipeline.stages.stage import Stage

TRAIN, HELD_OUT = "train", "heldout"
_FEW_STEPS = 600  # beside a model that is trained already
# Some that training has seen, some of the held-out tenth; every style has an image of each.
EMOJI_PROMPTS = ("red apple", "house", "soccer ball", "sunflower", "red heart", "ghost", "rose", "trophy")
_log = logging.getLogger(__name__)


def make_demo(root: str, settings: Settings, runner: Runner, *, without_emoji: bool, dry_run: bool, steps: int = 0,
              train: Callable[[Job], Any]) -> str:
    """Bring everything below `root` to its sealed state. Returns the path of the report, or "" on a dry run.

    Sealed stages are skipped. `steps` of training: 0 takes the recipe's, or a few with a bundled model.
    """
    pictures = _pictures(root, settings, without_emoji)
    styles, bundled = _styles(pictures), pictures.config.corpus == "emoji" and BUNDLED.is_dir()
    settings = replace(settings, train=replace(settings.train, steps=steps or (
        _FEW_STEPS if bundled else settings.train.steps)))
    if dry_run:
        output.print_text(
            f"corpus {pictures.config.corpus}, datasets {', '.join([TRAIN, *styles])}, run {DEMO_RUN} of "
            f"{settings.train.steps} steps, report {storage.join(root, 'report.html')}")
        return ""
    did = [_seal(pictures, runner)]
    names = {name: Dataset.parse(root, name) for name in (TRAIN, HELD_OUT, *styles)}
    sources = storage.join(pictures.folder, "sources.json")
    for name, dataset in names.items():
        did.append(_seal(Shard(dataset, replace(
            settings.shard, source=(pictures.folder,), captions=storage.join(pictures.folder, f"{name}.csv"),
            sources=sources, only_captioned=True, image_size=pictures.config.size)), runner))
        did.append(_seal(Embed(dataset, settings.embed), runner))
        if name != HELD_OUT:
            did.append(_seal(Index(dataset, settings.index), runner))
    for name in (TRAIN, HELD_OUT):
        did.append(_seal(Neighbors(names[name], names[TRAIN], settings.neighbors), runner))
    databases = tuple(names[style] for style in styles)
    if bundled:
        did.append(_seal(Sampling(_bundled(root), 0, _prompts(pictures), databases, settings.embed.clip(),
                                  RECIPES[BUNDLED_RUN]().sample), runner))
    job = Job(Run.parse(root, DEMO_RUN), names[TRAIN], names[TRAIN], settings.train, validation=names[HELD_OUT])
    if not storage.exists(storage.join(job.run.folder, "manifest.json")):
        _log.info("train: %d steps of %d images", settings.train.steps, settings.train.global_batch)
        did.append(True)
    if train(job) is None:
        raise KeyboardInterrupt
    did.append(_seal(Sampling(job.run, 0, _prompts(pictures), databases, settings.embed.clip(), settings.sample),
                     runner))
    address = storage.join(root, "report.html")
    if any(did) or not storage.exists(address):
        report.write_report(root, address)
    else:
        _log.info("everything was there already")
    return address


def _bundled(root: str) -> Run:
    """The bundled model, as a run of the root."""
    run = Run.parse(root, BUNDLED_RUN)
    new = not storage.exists(storage.join(run.folder, "manifest.json"))
    import_run(run, BUNDLED)
    if new:
        _log.info("%s: the bundled model, trained for %d steps", run.path, run.latest_step())
    return run


def _seal(stage: Stage, runner: Runner) -> bool:
    """Run a stage unless it is sealed. Returns whether it ran."""
    if storage.exists(storage.join(stage.folder, "manifest.json")):
        prepare(stage)
        return False
    manifest = run_observed(stage, runner, name=stage.path)
    totals, info = manifest["totals"], manifest["info"]
    _log.info("%s: %d samples, %s%s", stage.path, totals["samples"], format_bytes(totals["bytes"]),
              f", {info['key']}, recall@10 {info['recall_at_10']}" if info.get("recall_at_10") is not None else "")
    return True


def _pictures(root: str, settings: Settings, without_emoji: bool) -> DemoCorpus:
    """The corpus that the root has. A new root gets the emoji, or the synthetic corpus if npm cannot fetch them."""
    cache = (storage.local_path(root) if storage.is_local(root) else storage.cache_folder()) / "cache" / "npm"
    there = [name for name in ("emoji", "drawn") if storage.exists(storage.join(root, "pictures", name, "plan.json"))]
    if not without_emoji and "drawn" not in there:
        try:
            with heartbeat.doing("fetching the emoji with npm"):
                emoji.fetch(cache)
            _log.info("corpus: emoji in eight styles, fetched with npm into %s", cache)
            return DemoCorpus(root, replace(settings.pictures, corpus="emoji"), cache)
        except emoji.NpmUnavailable as error:
            if "emoji" in there:
                raise
            _log.warning("corpus: synthetic images, because the emoji are not available: %s", error)
    else:
        _log.info("corpus: synthetic images")
    return DemoCorpus(root, replace(settings.pictures, corpus="drawn"), cache)


def _styles(pictures: DemoCorpus) -> list[str]:
    if pictures.config.corpus == "emoji":
        return sorted(emoji.STYLES)
    return list(drawn_corpus.catalog(1, pictures.config.seed).styles)


def _prompts(pictures: DemoCorpus) -> tuple[str, ...]:
    if pictures.config.corpus == "emoji":
        return EMOJI_PROMPTS
    subjects = drawn_corpus.catalog(pictures.config.subjects, pictures.config.seed).pictures
    captions = list(dict.fromkeys(subject.caption for subject in subjects if not subject.held_out))
    held_out = list(dict.fromkeys(subject.caption for subject in subjects if subject.held_out))
    return (*captions[::max(1, len(captions) // 5)][:5], *held_out[:3])

