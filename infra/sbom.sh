#!/bin/sh
# Writes sbom.json (requirements.lock) and sbom-gpu.json (the additional packages of GPU machines) in CycloneDX's format.
#
#     infra/sbom.sh CYCLONEDX_PY FOLDER        # `make sbom`
#
# The same lock files give the same bytes.
set -eu
cd "$(dirname "$0")/.."
mkdir -p "$2"
for pair in requirements.lock=sbom.json infra/requirements-gpu.lock=sbom-gpu.json; do
  "$1" requirements "${pair%=*}" --pyproject pyproject.toml --output-reproducible --validate --output-file "$2/${pair#*=}"
done
