"""Writes docs/reference/licenses.md: the license of every package of the two lock files, as its metadata states it.

    .venv/bin/python infra/licenses.py            # `make licenses`
    .venv/bin/python infra/licenses.py --check    # ends with 1 if the file is stale

A package that this machine does not install (another platform, another Python, a GPU) keeps the row that it has.
"""

import collections
import importlib.metadata
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/reference/licenses.md"
LOCKS = {"requirements.lock": "everywhere", "infra/requirements-gpu.lock": "GPU"}
# Packages without a license in their metadata, and packages of other platforms.
KNOWN = {
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary",  # it has no files: it names the libraries that it goes with
    "resvg-py": "MIT",
    "colorama": "BSD-3-Clause",
    "faiss-gpu": "MIT",
    "httpx2-jsfetch": "BSD-3-Clause",
    "nvidia-cublas-cu12": "LicenseRef-NVIDIA-Proprietary",
    "nvidia-cuda-nvrtc-cu12": "LicenseRef-NVIDIA-Proprietary",
    "nvidia-cuda-runtime-cu12": "LicenseRef-NVIDIA-Proprietary",
    "nvidia-curand-cu12": "LicenseRef-NVIDIA-Proprietary",
    "pywin32": "PSF-2.0",
    "tzdata": "Apache-2.0",
}
# Spellings of the same license.
NAMES = {
    "2-clause bsd license": "BSD-2-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD",
    "bsd 2-clause license": "BSD-2-Clause",
    "bsd license": "BSD",
    "dfsg approved": "",
    "dual license": "",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "nvidia proprietary software": "LicenseRef-NVIDIA-Proprietary",
    "python software foundation license": "PSF-2.0",
    "unknown": "",
}


def stated_license(name: str) -> str:
    """The license in the metadata of an installed package, as an SPDX expression where it can be had; or nothing."""
    metadata = importlib.metadata.metadata(name)
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    text = (metadata.get("License") or "").strip()
    if len(text) <= 40 and "\n" not in text and (short := NAMES.get(text.lower(), text)):
        return short
    classifiers = [each for each in metadata.get_all("Classifier") or [] if each.startswith("License ::")]
    names = {NAMES.get(last.lower(), last) for last in (each.split(" :: ")[-1] for each in classifiers)}
    return " OR ".join(sorted(names - {""})) or KNOWN.get(canonicalize_name(name), "")


def installed_version(name: str) -> str | None:
    """The version of a package on this machine, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def render(existing: str) -> str:
    """The document. Rows of packages that are not installed here are those of the existing one."""
    old = {(row[0], row[1]): row[2] for row in re.findall(r"^\| (\S+) \| (\S+) \| ([^|]+) \|", existing, re.M)}
    rows = []
    for lock, where in LOCKS.items():
        for line in (ROOT / lock).read_text().splitlines():
            if line.startswith("#"):
                continue
            pin = Requirement(line)
            version = str(pin.specifier).removeprefix("==")
            here = installed_version(pin.name)
            stated = "" if here != version else stated_license(pin.name)
            stated = stated or old.get((pin.name, version), "") or KNOWN.get(canonicalize_name(pin.name), "")
            if not stated and here:
                stated = stated_license(pin.name)  # of another version, which another Python installs
            if not stated:
                sys.exit(f"licenses: the license of {pin.name} {version} is not known\n"
                         "hint: look it up, and add it to KNOWN in infra/licenses.py")
            condition = f"{where}, if {pin.marker}" if pin.marker else where
            rows.append((pin.name, version, stated, condition))
    counts = collections.Counter(row[2] for row in rows)
    lines = [
        "# Licenses of the dependencies", "",
        "`make licenses` writes this table from the metadata of the packages. A test says when it is stale.",
        "If the metadata of a package says BSD without a number, so does the table.",
        "The project has the Apache License 2.0 (`LICENSE`).",
        "The image contains the packages of requirements.lock and those for GPUs. Tools of `infra/tools/`",
        "are not listed: they are not shipped.", "",
        "| license | packages |", "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))), "",
        "| package | version | license | installed |", "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> int:
    """Writes the document, or checks it."""
    existing = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    text = render(existing)
    if words == ["--check"]:
        if text != existing:
            print("licenses: docs/reference/licenses.md is stale\nhint: make licenses", file=sys.stderr)
        return int(text != existing)
    DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
