#!/usr/bin/env bash
# The life of published databases on this machine, in five to ten minutes. Prints each event with its result.
#
#     make setup && infra/local.sh [FOLDER]          # files and logs are in FOLDER (data/local)
#
# It starts a server that speaks S3, a Ray cluster of a head and three workers with a token, and Prometheus if that is
# installed. Jobs publish four style databases. Images are added, changed and removed, and one database is rebuilt while a
# node and the driver are killed. Half of another source becomes noise. A version is rolled back. A reader samples from
# one of the databases all the time. Ends with 1 if a result is wrong.
set -euo pipefail

HERE=$(cd "$(dirname "$0")/.." && pwd)
FOLDER=$(mkdir -p "${1:-$HERE/data/local}" && cd "${1:-$HERE/data/local}" && pwd)
BIN=$HERE/.venv/bin
export PORT=${PORT:-6399} DASHBOARD_PORT=${DASHBOARD_PORT:-8299} RDM_STATE=$FOLDER/cluster
S3_PORT=${S3_PORT:-5599} PROMETHEUS_PORT=${PROMETHEUS_PORT:-9599} EXPORTER_PORT=${EXPORTER_PORT:-9598}
export AWS_ENDPOINT_URL=http://127.0.0.1:$S3_PORT AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local
export AWS_DEFAULT_REGION=us-east-1 RDM_CACHE=$FOLDER/cache WANDB_MODE=disabled PYTHONPATH=$HERE
unset AWS_PROFILE AWS_SESSION_TOKEN RAY_ADDRESS
cd "$HERE"

pids=()
finish() {
  "$HERE/infra/one-machine.sh" down >/dev/null || true
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
}
trap finish EXIT
trap 'exit 130' INT TERM

"$BIN/python" -m moto.server -H 127.0.0.1 -p "$S3_PORT" >"$FOLDER/s3.log" 2>&1 &
pids+=($!)
cluster=$("$HERE/infra/one-machine.sh" up 3)
eval "$cluster"
if command -v prometheus >/dev/null && [ -f infra/prometheus/prometheus.yaml ]; then
  "$BIN/python" -m jobs status --root s3://local/rdm --serve "$EXPORTER_PORT" >"$FOLDER/exporter.log" 2>&1 &
  pids+=($!)
  sed "s|/tmp/ray/|/tmp/rdm-ray-$(id -u)-$PORT/head/|; s|127.0.0.1:9108|127.0.0.1:$EXPORTER_PORT|" infra/prometheus/prometheus.yaml \
    >"$FOLDER/prometheus.yaml"
  cp infra/prometheus/rules.yaml "$FOLDER/"
  export RDM_PROMETHEUS=http://127.0.0.1:$PROMETHEUS_PORT
  prometheus --config.file="$FOLDER/prometheus.yaml" --storage.tsdb.path="$FOLDER/prometheus" \
    --web.listen-address="127.0.0.1:$PROMETHEUS_PORT" >"$FOLDER/prometheus.log" 2>&1 &
  pids+=($!)
fi
"$BIN/python" infra/local.py "$FOLDER"
