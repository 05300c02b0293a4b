#!/bin/sh
# Installs infra/tools/NAME.lock into an environment of its own below build/, and prints where it is. Does nothing when it is there.
#
#     infra/tools.sh docs|policy|supply       # PYTHON=... names a Python that has uv; by default that of .venv
#
# These tools are not in requirements.lock: they bring a hundred packages that the project does not need, in versions of
# their own.
set -eu
cd "$(dirname "$0")/.."
name=$1
python=${PYTHON:-.venv/bin/python}
lock=infra/tools/$name.lock
[ -f "$lock" ] || { echo "tools: there is no $lock. hint: infra/tools.sh policy" >&2 && exit 2; }
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
folder=build/tools/$name-$version-$(cksum <"$lock" | cut -d ' ' -f 1)
if [ ! -d "$folder" ]; then
  # Under another name until it is complete: two of these may run at once.
  unfinished=$folder.$$
  trap 'rm -rf "$unfinished"' EXIT
  mkdir -p build/tools
  "$python" -m uv venv --quiet --relocatable --python "$python" "$unfinished"
  "$python" -m uv pip install --quiet --no-deps --python "$unfinished/bin/python" -r "$lock"
  [ -d "$folder" ] || mv "$unfinished" "$folder"
fi
echo "$folder"
