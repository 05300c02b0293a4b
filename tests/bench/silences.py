"""The longest time without output of each verb on a terminal, as a table of Markdown.

    python tests/bench/silences.py [--work FOLDER] [--only WORD]

The commands run one after another on a pseudo terminal of 80 columns: with `--local`, with Ray, under torchrun, and as
a job of a cluster on this machine. The time from the start to the first output counts, and that from the last output
to the end.
"""

import argparse
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from harness import CHECKOUT

from pipeline import storage

sys.path.insert(0, str(CHECKOUT / "tests/laws"))
from terminal import set_columns

_SETTINGS = """[train]
steps = 60
global_batch = 8
k = 4
precision = "fp32"
image_size = 16
[train.unet]
model_channels = 32
"""
_UP = {"PORT": "6411", "DASHBOARD_PORT": "8311"}  # beside a cluster of the user
_TORCHRUN = shlex.join([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "jobs"])
_VERBS = shlex.join([sys.executable, "-m", "jobs"])
# Names in braces are folders; {n} is 1 with --local and 2 with Ray.
_BOTH = ("style mine{n} --source {images}", "rebuild art{n} --source {images} --image-size 32 --format png",
         "pipeline piped{n} --source {images} --image-size 32 --format png --train piped{n} --config {settings}",
         "shard set{n} --source {images} --image-size 32 --format png", "embed set{n}",
         "score set{n} --head first=first_head:score", "index set{n}",
         "neighbors set{n} --database set{n}", "latents set{n} --first-stage {stage}",
         "train run{n} --dataset set{n} --database set{n} --config {settings}",
         "sample run{n} --prompt apple --database set{n} --steps 10 --k 4 --name apple",
         "evaluate run{n} --database set{n} --database mine{n} --prompt apple --judge-steps 5 --steps 4 --sweep-k 1 "
         "--sweep-guidance 1", "demo --drawn --steps 60 --subjects 12 --root demo{n}")
_ONCE = ("search set1 apple", "recipes", "plan", "export run1 --out out",
         "convert run4 --checkpoint out --database set1", "credits root/runs/run1/samples/apple/samples.json",
         "versions art1", "rollback art1 --to v1", "repair art1", "gc art1", "forget --url apple --dry-run",
         "rm runs/run4 --yes", "ls", "ls set1", "show {key}", "status", "report", "verify", "init demo demo.toml",
         "doctor")
_ROOTLESS = ("recipes", "init", "demo", "plan")
_HEAD = """def score(shard):
    return shard.vectors[:, 0]
"""


@dataclass(frozen=True)
class Silence:
    """The longest silence of a command."""

    seconds: float
    began: float
    total: float
    code: int
    after: str


def measure(command: str, folder: Path, log: Path, **environment: str) -> Silence:
    """Run a command of a shell on a terminal, and write what it shows to `log` with the moment of each piece."""
    ours, theirs = pty.openpty()
    set_columns(theirs, 80)
    began = last = time.monotonic()
    process = subprocess.Popen(["bash", "-c", command], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder,
                               start_new_session=True, env=os.environ | {"TERM": "xterm"} | environment)
    os.close(theirs)
    longest, text, after = (0.0, 0.0), "", ""
    with open(log, "w") as file:
        while True:
            try:
                piece = os.read(ours, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                piece = ""
            now = time.monotonic()
            if now - last > longest[0]:
                longest, after = (now - last, last - began), text
            last, text = now, piece or text
            print(f"{now - began:7.2f} {piece!r}", file=file)
            if not piece:
                break
    code = process.wait()
    os.close(ours)
    end = time.monotonic()
    if end - last > longest[0]:
        longest, after = (end - last, last - began), text
    return Silence(*longest, end - began, code, after)


def commands(folder: Path) -> list[tuple[str, str]]:
    """Names and command lines, in the order in which each finds what it needs."""
    names = {"images": folder / "images", "settings": folder / "settings.toml", "stage": folder / "first-stage",
             "key": f"flat/{next((folder / 'images/flat').glob('*.png')).name}"}

    def line(words: str, more: str = "", program: str = _VERBS) -> str:
        root = "" if words.split()[0] in _ROOTLESS else f" --root {folder}/root"
        return f"{program} {words}{root}{more}"

    both = [(f"{words.split()[0]}, {how}", line(words.format(n=number, **names), more))
            for words in _BOTH for number, how, more in ((1, "`--local`", " --local"), (2, "Ray", ""))]
    trained = "train run3 --dataset set1 --database set1 --config {settings}".format(**names)
    once = [(words.split()[0], line(words.format(**names))) for words in _ONCE]
    infra = f"{CHECKOUT}/infra/one-machine.sh"
    submitted = "submit --wait style sent --source {images}".format(**names)
    return [*both, ("train, torchrun", line(trained, program=_TORCHRUN)), *once,
            ("`infra/one-machine.sh up`", f"{infra} up >{folder}/cluster.env"),
            ("submit --wait", f". {folder}/cluster.env; {line(submitted)}"),
            ("`infra/one-machine.sh down`", f"{infra} down")]


def prepare(folder: Path) -> None:
    """Write the images, the settings and a first stage into the folder."""
    from model.weights import compvis, first_stage
    from pipeline.corpora.config import DemoCorpusConfig
    from pipeline.corpora.demo_corpus import DemoCorpus
    from pipeline.stages.driver import run_stage
    corpus = DemoCorpus(str(folder / "corpus"), DemoCorpusConfig(corpus="drawn", subjects=24, size=32,
                                                                 pictures_per_item=50), folder / "cache")
    run_stage(corpus)
    (folder / "images").symlink_to(corpus.folder)
    (folder / "settings.toml").write_text(_SETTINGS)
    (folder / "first_head.py").write_text(_HEAD)
    weights = {name: tensor.float() for name, tensor in compvis.read(
        CHECKOUT / "tests/model/weights/golden/compvis_small.safetensors").first_stage.items()}
    first_stage.build(compvis.first_stage_config(weights), compvis.first_stage_weights(weights)
                      ).network.save_pretrained(folder / "first-stage")


def main() -> None:
    """Measure, and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--work", help="folder for the root and the logs (default: a new one)")
    options.add_argument("--only", default="", help="only commands whose name matches this regular expression")
    words = options.parse_args()
    folder = Path(words.work or tempfile.mkdtemp(prefix="rdm-silences-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "images").exists():
        prepare(folder)
    environment = _UP | {"PYTHONPATH": f"{CHECKOUT}:{folder}", "RDM_STATE": str(folder / "cluster"),
                         "RDM_CACHE": str(folder / "cache"), "WANDB_MODE": "disabled",
                         "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    print("| command | exit | whole, s | longest silence, s | from, s | after |\n|---|---|---|---|---|---|")
    for name, command in commands(folder):
        if re.search(words.only, name):
            log = folder / f"{re.sub(r'[^a-z]+', '-', name)}.log"
            seen = measure(command, folder, log, **environment)
            print(f"| {name} | {seen.code} | {seen.total:.1f} | {seen.seconds:.1f} | {seen.began:.1f} | "
                  f"{storage.escape_controls(seen.after)[-60:]} |", flush=True)


if __name__ == "__main__":
    main()
