"""The lock files: complete, the same everywhere, and the only bounds that they break are those of autofaiss."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
OPTIONAL = PROJECT["project"]["optional-dependencies"]


def _pins(name: str) -> list[Requirement]:
    lines = (REPOSITORY / name).read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


LOCK, GPU = _pins("requirements.lock"), _pins("infra/requirements-gpu.lock")
HERE = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in LOCK
        if not pin.marker or pin.marker.evaluate()}


def _needed(roots: list[str]) -> set[tuple[str, Requirement]]:
    """Pairs (package, its requirement) that apply here: those of this project and of all that they need."""
    pending = [("retrieval-diffusion", Requirement(root)) for root in roots]
    pairs: set[tuple[str, Requirement]] = set()
    seen: set[tuple[str, str]] = set()
    while pending:
        package, requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        pairs.add((package, requirement))
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in importlib.metadata.requires(name) or []:
                marker = Requirement(text).marker
                if not marker or marker.evaluate({**default_environment(), "extra": extra}):
                    pending.append((name, Requirement(text)))
    return pairs


def _roots() -> list[str]:
    roots = [*PROJECT["project"]["dependencies"], *OPTIONAL["autofaiss"], *OPTIONAL["dev"]]
    return [root for root in roots if not (marker := Requirement(root).marker) or marker.evaluate()]


@pytest.mark.parametrize("pins", [LOCK, GPU], ids=["lock", "gpu"])
def test_a_lock_has_one_exact_version_of_each_package_and_nothing_else(pins: list[Requirement]) -> None:
    assert pins and all(re.fullmatch(r"==[\w.+]+", str(pin.specifier)) and not pin.url for pin in pins)
    for python in ("3.11", "3.12", "3.13", "3.14"):
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        names = [canonicalize_name(pin.name) for pin in pins if not pin.marker or pin.marker.evaluate(environment)]
        assert len(names) == len(set(names))


def test_the_lock_is_complete() -> None:
    assert {canonicalize_name(requirement.name) for _, requirement in _needed(_roots())} <= set(HERE)


def test_installed_versions_are_the_locked_ones() -> None:
    installed = {canonicalize_name(distribution.name): distribution.version
                 for distribution in importlib.metadata.distributions()}
    locked = dict(HERE)
    if "faiss-gpu" in installed:
        del locked["faiss-cpu"]
        locked |= {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in GPU}
    assert {name: installed.get(name) for name in locked} == locked


def test_only_the_bounds_of_autofaiss_are_exceeded() -> None:
    broken = {(package, canonicalize_name(needed.name)) for package, needed in _needed(_roots())
              if not needed.specifier.contains(HERE[canonicalize_name(needed.name)], prereleases=True)}
    assert broken == {("autofaiss", "numpy"), ("autofaiss", "pandas"), ("autofaiss", "fire"),
                      ("embedding-reader", "pandas")}
    overridden = {Requirement(text).name for text in PROJECT["tool"]["uv"]["override-dependencies"]}
    assert overridden == {name for _, name in broken}


def test_faiss_is_the_same_with_and_without_gpus() -> None:
    versions = {pin.name: str(pin.specifier) for pin in (*LOCK, *GPU)}
    assert versions["faiss-gpu"] == versions["faiss-cpu"]
    assert not {pin.name for pin in GPU} & {pin.name for pin in LOCK}
    (cpu,) = (text for text in PROJECT["project"]["dependencies"] if text.startswith("faiss"))
    assert OPTIONAL["gpu"] == [cpu.replace("cpu", "gpu")]


def test_supported_versions_are_the_same_everywhere() -> None:
    oldest, after = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["project"]["requires-python"]).groups()
    newest = int(after) - 1
    steps = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert steps["strategy"]["matrix"]["python"] == [f"3.{oldest}", f"3.{newest}"]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{oldest}"
    assert f"--python-version 3.{oldest} " in (REPOSITORY / "Makefile").read_text()
    image = re.search(r"^FROM python:(\S+)-slim", (REPOSITORY / "infra/Dockerfile").read_text(), re.M)[1]
    assert image in (f"3.{oldest}", f"3.{newest}")
    for name in ("README.md", "docs/reference/dependencies.md"):
        assert f"3.{oldest} to 3.{newest}" in (REPOSITORY / name).read_text()


def test_the_hint_and_the_documents_name_the_locked_autofaiss() -> None:
    command = f"pip install --no-deps autofaiss=={HERE['autofaiss']} embedding-reader=={HERE['embedding-reader']}"
    for name in ("pipeline/indices/choose.py", "README.md", "docs/reference/dependencies.md"):
        assert command in (REPOSITORY / name).read_text(), name


def test_each_direct_dependency_is_explained_with_its_version() -> None:
    text = (REPOSITORY / "docs/reference/dependencies.md").read_text()
    rows = {row[0]: row[1] for row in re.findall(r"^\| ([\w.-]+) \| ([^|]+) \|", text, re.M)}
    groups = [PROJECT["project"]["dependencies"], OPTIONAL["autofaiss"], OPTIONAL["gpu"], OPTIONAL["dev"]]
    direct = {Requirement(text).name for group in groups for text in group}
    assert direct <= set(rows)
    versions: dict[str, set[str]] = {}
    for pin in (*LOCK, *GPU):
        versions.setdefault(canonicalize_name(pin.name), set()).add(str(pin.specifier).removeprefix("=="))
    for name in direct:
        assert set(rows[name].strip().split(", ")) == versions[canonicalize_name(name)], name
