#!/usr/bin/env bash
# A Ray cluster on this machine, with a dashboard, a job server and a token: a small version of the other clusters here.
#
#     eval "$(infra/one-machine.sh up)"              # a head without work, and a worker with all cores and GPUs
#     python -m jobs submit --wait demo --root "$PWD/data/demo"
#     eval "$(infra/one-machine.sh down)"
#
# `up 3` makes three workers that share the cores, to try the loss of one. The dashboard listens on 127.0.0.1. Ray's other
# ports listen on all interfaces of this machine, and need the token.
# PORT and DASHBOARD_PORT set these ports, the others are free ones. RDM_STATE has the token, logs and process ids.
set -euo pipefail

PORT=${PORT:-6379} DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
STATE=${RDM_STATE:-$HOME/.local/state/rdm/$PORT}
RAY_FOLDER=/tmp/rdm-ray-$(id -u)-$PORT  # paths of sockets must be short; of its own, or jobs would find another cluster
HERE=$(cd "$(dirname "$0")" && pwd)
BIN=$HERE/../.venv/bin
STORE=200000000  # bytes of each node's object store
[ -x "$BIN/ray" ] && PATH=$BIN:$PATH
export PATH RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$STATE/token RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # all nodes end, so no node can take over work
unset RAY_ADDRESS RAY_AUTH_TOKEN

said=0
say() { echo "one-machine: $*" >&2 && said=$SECONDS; }

# Says every five seconds what it waits for.
wait_for() {
  sleep 0.2
  [ $((SECONDS - said)) -lt 5 ] || say "waiting for $1, $SECONDS s after the start"
}

alive() { [ -f "$STATE/$1.pid" ] && kill -0 "$(cat "$STATE/$1.pid")" 2>/dev/null; }

# A node in the background: with --block `ray start` ends its own processes on SIGTERM, and no others. On a busy machine a
# node may need more than Ray's half a minute; then it is started again.
node() {
  local name=$1 left
  alive "$name" && return
  for left in 2 1 0; do
    start "$@"
    say "starting $name"
    while alive "$name"; do
      grep -q "Ray runtime started" "$STATE/$name.log" && return
      wait_for "$name"
    done
  done
  tail -n 5 "$STATE/$name.log" >&2
  exit 1
}

# Ray puts its object stores in /tmp if they do not fit into shared memory, which NCCL needs too. A container has 64 MB.
check_shared_memory() {
  local wanted=$((STORE * ($1 + 1))) left
  left=$(df --output=avail -B1 /dev/shm | tail -n 1)
  [ "$left" -ge "$wanted" ] || printf 'warning: /dev/shm is small, Ray will be slow\nexpected: %s bytes free; got: %s\n%s\n' \
    "$wanted" "$left" "hint: in a container, docker run --shm-size=8g" >&2
}

# A port that the system chooses. With Ray's own choice (52365 for an agent) two clusters collide, and the second one starts,
# but takes no jobs.
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

TARGETS=prom_metrics_service_discovery

check_ports() {
  local port
  for port in "$PORT" "$DASHBOARD_PORT"; do
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue
    printf 'error: port %s of this machine is in use, perhaps by another Ray\nhint: %s\n' "$port" \
      "PORT=$(free_port) DASHBOARD_PORT=$(free_port) infra/one-machine.sh up; down needs the same PORT" >&2
    exit 1
  done
}

# Each node has its own folder. In a common one the worker would replace the code of a job under its running driver, as
# both call the folder of that code by the same name.
start() {
  local name=$1
  shift
  : >"$STATE/$name.log"
  nohup ray start "$@" --block --node-ip-address=127.0.0.1 --min-worker-port=0 --max-worker-port=0 \
    --dashboard-agent-listen-port="$(free_port)" --temp-dir="$RAY_FOLDER/$name" --object-store-memory=$STORE \
    --disable-usage-stats >"$STATE/$name.log" 2>&1 </dev/null &
  echo $! >"$STATE/$name.pid"
}

up() {
  local workers=${1:-1} cores
  alive head || check_ports
  check_shared_memory "$workers"
  mkdir -p "$STATE" "$RAY_FOLDER"
  # Every user can create names in /tmp, also this one.
  if [ -L "$RAY_FOLDER" ] || [ ! -O "$RAY_FOLDER" ]; then
    printf 'error: %s is a link or belongs to another user\nhint: another PORT\n' "$RAY_FOLDER" >&2
    exit 2
  fi
  chmod 700 "$STATE" "$RAY_FOLDER"
  [ -s "$STATE/token" ] || (umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' >"$STATE/token")
  cores=$(nproc)
  # At least four logical cores: with fewer, workers, their driver and Ray itself starve each other on small machines.
  cores=$(((cores > 4 ? cores : 4) / workers))
  node head --head --num-cpus=0 --num-gpus=0 --port="$PORT" --dashboard-host=127.0.0.1 \
    --dashboard-port="$DASHBOARD_PORT" --ray-client-server-port="$(free_port)"
  until python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$DASHBOARD_PORT/api/gcs_healthz')" 2>/dev/null; do
    alive head || { tail -n 5 "$STATE/head.log" >&2 && exit 1; }
    wait_for "the dashboard"
  done
  # A broken GPU is not offered, so --gpus 1 fails instead of computing on the CPU.
  local gpus=()
  "$HERE/kubernetes/base/check-driver.sh" >&2 || gpus=(--num-gpus=0)
  for number in $(seq "$workers"); do
    local more=("${gpus[@]}")
    [ "$number" = 1 ] || more=(--num-gpus=0)
    node "worker-$number" --address="127.0.0.1:$PORT" --num-cpus=$((cores > 1 ? cores : 1)) "${more[@]}"
  done
  # infra/prometheus/prometheus.yaml looks there.
  mkdir -p -m 1777 /tmp/ray 2>/dev/null && ln -sfn "$RAY_FOLDER/head/$TARGETS.json" "/tmp/ray/$TARGETS-$PORT.json" ||
    say "Prometheus does not find this cluster by itself: $RAY_FOLDER/head/$TARGETS.json has its targets"
  say "ready after $SECONDS s: $workers worker(s), dashboard http://127.0.0.1:$DASHBOARD_PORT"
  echo "export RAY_ADDRESS=127.0.0.1:$PORT RAY_API_SERVER_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT"
  echo "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$STATE/token"
}

down() {
  local pids=()
  rm -f "/tmp/ray/$TARGETS-$PORT.json"
  for file in "$STATE"/worker-*.pid "$STATE/head.pid"; do
    [ -f "$file" ] || continue
    kill -TERM "$(cat "$file")" 2>/dev/null && pids+=("$(cat "$file")")
    rm "$file"
  done
  for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait_for "the end of Ray"; done
  done
  say "ended"
  echo "unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH"
}

case ${1:-} in
  up) up "${2:-1}" ;;
  down) down ;;
  *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
