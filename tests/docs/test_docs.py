"""Tables of the documents agree with the code."""

import re
from pathlib import Path

from jobs.cli.verbs import VERBS
from jobs.inspection import prometheus
from jobs.telemetry import ray_metrics
from pipeline.layouts import known
from tests.docs.pages import ROOT


def test_each_reason_for_leaving_out_an_image_is_explained() -> None:
    text = (ROOT / "docs/reference/ledger.md").read_text()
    used = {reason for file in (ROOT / "pipeline").rglob("*.py")
            for reason in re.findall(r'(?:BadImage|NotFetched)\("(\w+)"', file.read_text())}
    assert "too_many_scans" in used and {reason for reason in used if f"`{reason}`" not in text} == set()


def test_the_table_of_corpora_has_every_layout_and_its_columns() -> None:
    text = (ROOT / "docs/guides/ingest/corpora.md").read_text()
    rows = {cells[1].strip(): cells for line in text.splitlines() if len(cells := line.split("|")) == 7}
    for layout in known.TABLES:
        name, recognized, url, caption, *_ = rows[layout.name][1:]
        assert re.findall("`(.+?)`", recognized) == list(layout.has), name
        assert layout.url in url.replace("`", "").strip() and layout.caption in caption, name


def test_the_page_of_metrics_has_every_metric_and_no_other() -> None:
    files, ray = ((ROOT / "docs/reference/metrics.md").read_text().split("\n## ")[part] for part in (1, 2))
    served = {f"rdm_{group}_{name}" for group, names in (("stage", prometheus._STAGE), ("train", prometheus._TRAIN),
                                                        ("database", prometheus._DATABASE)) for name in names}
    served |= set(re.findall(r'"(rdm_\w+[a-z])"', Path(prometheus.__file__).read_text()))
    assert set(re.findall(r"`(rdm_\w+)`", files)) == served
    exported = {f"rdm_{name}_total" for name in ray_metrics._DONE}
    exported |= {f"rdm_train_{name}" for name in ray_metrics._CURVE}
    exported |= set(re.findall(r'"(rdm_\w+[a-z])"', Path(ray_metrics.__file__).read_text()))
    assert set(re.findall(r"`(rdm_\w+)`", ray)) == exported


def test_the_readme_is_short_and_its_table_has_every_verb() -> None:
    text = (ROOT / "README.md").read_text()
    table = text.split("## Verbs\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(verb for cell in cells for verb in re.findall(r"`(.+?)`", cell)) == sorted(VERBS)
    assert len(text.encode()) <= 8_000 and len((ROOT / "ARCHITECTURE.md").read_bytes()) <= 10_000
