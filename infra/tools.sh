#!/bin/sh
# Installs infra/tools/NAME.lock into a separate environment below build/ and prints its path. Does nothing if it exists.
#
#     infra/tools.sh docs|policy|supply       # PYTHON=... names a Python that has uv; by default that of .venv
#
# These tools are not in requirements.lock: they need a hundred packages that the project does not need, in other versions.
set -eu
cd "$(dirname "$0")/.."
name=$1
python=${PYTHON:-.venv/bin/python}
lock=infra/tools/$name.lock
[ -f "$lock" ] || { echo "tools: there is no $lock. hint: infra/tools.sh policy" >&2 && exit 2; }
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
folder=build/tools/$name-$version-$(cksum <"$lock" | cut -d ' ' -f 1)
if [ ! -d "$folder" ]; then
  # It has another name until it is complete, because two of these may run at the same time.
  unfinished=$folder.$$
  trap 'rm -rf "$unfinished"' EXIT
  mkdir -p build/tools
  "$python" -m uv venv --quiet --relocatable --python "$python" "$unfinished"
  "$python" -m uv pip install --quiet --no-deps --python "$unfinished/bin/python" -r "$lock"
  [ -d "$folder" ] || mv "$unfinished" "$folder"
fi
echo "$folder"
