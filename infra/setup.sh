#!/bin/sh
# Makes .venv with the packages of requirements.lock. `make setup` runs it; PYTHON=... names the interpreter to use.
#
# Checks the interpreter before it creates anything. Does nothing when .venv is complete. Plain POSIX sh, because a
# fresh machine may have no Python that could run a Python file.
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)
venv=.venv
done_file=$venv/.ready
asked=${PYTHON:-}

# pyproject.toml is the one place that states the supported versions.
bounds=$(sed -n 's/^requires-python = ">=3\.\([0-9]*\),<3\.\([0-9]*\)"$/\1 \2/p' pyproject.toml)
oldest=${bounds% *}
newest=$((${bounds#* } - 1))

# Runs under every Python since 2.6. Prints the version, then what is missing from the interpreter, if anything.
probe='
import sys, sysconfig
lacks = []
for module in ("venv", "ensurepip", "pyexpat", "ssl", "zlib"):
    try:
        __import__(module)
    except ImportError:
        lacks.append(module)
if getattr(getattr(sys, "implementation", None), "name", "") != "cpython":
    lacks = ["CPython"]
elif sysconfig.get_config_var("Py_GIL_DISABLED"):
    lacks = ["the global interpreter lock, which some packages need"]
print(" ".join(["%d.%d" % sys.version_info[:2], ", ".join(lacks)]).strip())
'

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

# Sets `version`, and sets `problem` to the reason why interpreter $1 cannot be used, or to nothing.
inspect() {
  problem= version=
  facts=$("$1" -c "$probe" 2>/dev/null </dev/null) || facts=
  case $facts in
    [0-9]*.[0-9]*) version=${facts%% *} ;;
    *) problem="$1 does not run" && return ;;
  esac
  minor=${version#*.} lacks=${facts#"$version"}
  if [ "${version%.*}" != 3 ] || [ "$minor" -lt "$oldest" ] || [ "$minor" -gt "$newest" ]; then
    problem="$1 is Python $version"
  elif [ -n "$lacks" ]; then
    problem="$1 (Python $version) lacks$lacks"
  fi
}

# What to do about it: $1 is the version of an interpreter that is only incomplete, or empty.
remedy() {
  if [ -n "$asked" ] && [ -z "$1" ]; then
    echo "leave PYTHON out, or name another one"
  elif ! command -v apt-get >/dev/null; then
    echo "install Python 3.$oldest to 3.$newest with venv and pip, for example from python.org"
  elif [ -n "$1" ]; then
    echo "apt-get install python$1-venv"
  else
    echo "apt-get install python3 python3-venv, or on an older system: uv python install 3.$newest"
  fi
}

# Sets `python` and `version`: PYTHON if it was given, else python3, else the newest supported python3.X.
choose() {
  first= incomplete=
  if [ -n "$asked" ]; then
    set -- "$asked"
  else
    set -- python3
    number=$newest
    while [ "$number" -ge "$oldest" ]; do
      set -- "$@" "python3.$number"
      number=$((number - 1))
    done
  fi
  for python; do
    command -v "$python" >/dev/null || { first=${first:-"there is no $python"} && continue; }
    inspect "$python"
    [ -n "$problem" ] || return 0
    first=${first:-$problem}
    case $problem in *" lacks "*) [ -n "$incomplete" ] || { first=$problem && incomplete=$version; } ;; esac
  done
  fail "Python 3.$oldest to 3.$newest with venv and pip is needed, but $first. hint: $(remedy "$incomplete")"
}

# Sets `unusable` to the reason why .venv cannot stay, or to nothing.
judge() {
  unusable=
  runs=$("$venv/bin/python" -c 'import pip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null) || runs=
  made=$(sed -n 's/^version[_a-z]* *= *\([0-9]*\.[0-9]*\).*/\1/p' "$venv/pyvenv.cfg" 2>/dev/null) || made=
  # Python 3.11 and newer write down the folder. An interrupted install leaves no .ready that could tell.
  origin=$(sed -n 's/^command = .* -m venv //p' "$venv/pyvenv.cfg" 2>/dev/null) || origin=
  minor=${runs#3.}
  if [ -z "$runs" ] || [ -z "$made" ]; then
    unusable="is incomplete"
  elif [ "$runs" != "$made" ]; then
    unusable="was made for Python $made, and its python is $runs now"
  elif [ "$minor" -lt "$oldest" ] || [ "$minor" -gt "$newest" ]; then
    unusable="has Python $runs"
  elif [ -n "$asked" ] && [ "$runs" != "$version" ]; then
    unusable="has Python $runs, and PYTHON=$asked is $version"
  elif [ -f "$done_file" ] && [ "$(sed -n 2p "$done_file")" != "$here" ]; then
    unusable="was made in another folder"
  elif [ -n "$origin" ] && [ "$origin" != "$here/$venv" ]; then
    unusable="was made in another folder"
  fi
}

version=
[ -z "$asked" ] || choose
if [ -e "$venv" ] || [ -L "$venv" ]; then
  judge
  state=$(cat requirements.lock pyproject.toml | cksum)
  copy=$(echo "$venv"/lib/python3*/site-packages/jobs)  # `pip install .` replaces the editable installation by a copy
  if [ -z "$unusable" ] && [ -f "$done_file" ] && [ "$(sed -n 1p "$done_file")" = "$state" ] && [ ! -d "$copy" ]; then
    exit 0
  fi
else
  unusable=missing
fi
if [ -n "$unusable" ]; then
  [ -n "$version" ] || choose
  if [ "$unusable" != missing ]; then
    say "$venv $unusable: it is made again"
    rm -rf "$venv"
  fi
  # A folder left by a failed attempt would only have to be explained.
  "$python" -m venv "$venv" || { rm -rf "$venv" && fail "$python -m venv failed. hint: $(remedy "$version")"; }
  say "$venv with Python $version ($python)"
fi

# Says every ten seconds that the installation continues, until the process $$ ends or `stop_beat` runs.
start_beat() {
  (
    seconds=0
    while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
      seconds=$((seconds + 10))
      say "still installing, $seconds s"
    done
  ) &
  beat=$!
}

stop_beat() { kill "$beat" 2>/dev/null || true; }

rm -f "$done_file"
trap stop_beat EXIT
start_beat
say "installing the packages of requirements.lock, which takes one to three minutes"
state=$(cat requirements.lock pyproject.toml | cksum)
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"
# The lock is complete, so nothing is resolved (--no-deps); resolving would stop at autofaiss, whose bounds are outdated.
# uv takes a third of pip's time; where uv cannot install, pip does. The bytecode is compiled now: later, a process that
# may not write to .venv would compile it again at every start.
if ! { $pip --no-deps "$(sed -n 's/^\(uv==[^ ]*\).*/\1/p' requirements.lock)" &&
       "$venv/bin/uv" pip install --quiet --no-deps --compile-bytecode --python "$venv/bin/python" -r requirements.lock; }; then
  say "uv could not install the packages, so pip does"
  $pip --no-deps -r requirements.lock ||
    fail "the packages could not be installed. hint: look at the network and pip config list, then run make setup again"
fi
$pip --no-deps --no-build-isolation --editable .
stop_beat
printf '%s\n%s\n' "$state" "$here" >"$done_file"
say "done. To call rdm in this shell: . $venv/bin/activate"
