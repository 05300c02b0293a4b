#!/usr/bin/env bash
# Checks the GPUs of a node before Ray starts there. Prints the reason and ends with 1 if a worker on this node would compute
# on the CPU, or if its collectives would leave the fast network.
#
#     check-driver.sh [GPUS [EFA]]
#
# GPUS  how many GPUs this node must have; by default what `ray up` announces for it, else the NVIDIA GPUs on the PCI bus.
# EFA   how many EFA devices this container must have; by default 0, which skips the check of the network.
#
# ALLOW_MIG=1 accepts MIG slices on a node that needs one GPU. CHECK_ROOT replaces / for /sys and /dev (tests).
set -euo pipefail

MIN_DRIVER=580                              # torch's CUDA 13 needs this NVIDIA driver
MIN_MEMLOCK_KIB=${MIN_MEMLOCK_KIB:-8388608}  # EFA registers several GiB of host memory on a node of eight GPUs
ROOT=${CHECK_ROOT:-}

fail() { # what, expected and got, hint
  printf 'error: %s: %s\n%s\nhint: %s\n' "$HOSTNAME" "$1" "$2" "$3" >&2
  exit 1
}

# The resources of the node type, which `ray up` sets for the start command, such as {"CPU": 8, "GPU": 1}.
announced_gpus() { sed -nE 's/.*"GPU\\?": *([0-9]+).*/\1/p' <<<"${RAY_OVERRIDE_RESOURCES:-}"; }

# Display controllers (class 0x03....) of NVIDIA (vendor 0x10de). They are on the bus without a driver too.
gpus_on_bus() {
  local device count=0
  for device in "$ROOT"/sys/bus/pci/devices/*; do
    if [ -f "$device/vendor" ] && grep -q 0x10de "$device/vendor" && grep -q '^0x03' "$device/class"; then
      count=$((count + 1))
    fi
  done
  echo "$count"
}

smi() { # NVML can hang on a broken card
  timeout 60 nvidia-smi "$@" 2>&1
}

check_gpus() {
  local wanted=$1 answer version devices slices
  if ! command -v nvidia-smi >/dev/null; then
    fail "nvidia-smi is not there" "expected: $wanted GPUs with an NVIDIA driver of at least $MIN_DRIVER; got: no driver" \
      "install the driver on the machine; in a container, start it with the NVIDIA container runtime"
  fi
  if ! answer=$(smi --query-gpu=driver_version --format=csv,noheader); then
    answer=${answer:-no answer within 60 s}
    fail "nvidia-smi failed: ${answer//$'\n'/ }" "expected: an NVIDIA driver of at least $MIN_DRIVER; got: none that works" \
      "run nvidia-smi on the machine; after a driver update, reboot it"
  fi
  version=$(head -n 1 <<<"$answer")
  if ! [[ $version =~ ^([0-9]+)(\.[0-9]+)*$ ]]; then
    fail "nvidia-smi did not print a driver version" "expected: a number such as $MIN_DRIVER.82.07; got: ${version:-nothing}" \
      "run nvidia-smi on the machine"
  fi
  if [ "${BASH_REMATCH[1]}" -lt "$MIN_DRIVER" ]; then
    fail "the NVIDIA driver is too old" "expected: at least $MIN_DRIVER (torch's CUDA 13); got: $version" \
      "update the driver of the machine, or its image"
  fi
  devices=$(smi -L) || fail "nvidia-smi -L failed" "expected: a list of GPUs; got: ${devices//$'\n'/ }" "run nvidia-smi -L on the machine"
  slices=$(grep -cE '^ +MIG ' <<<"$devices" || true)
  devices=$(grep -cE '^GPU ' <<<"$devices" || true)
  [ "$slices" = 0 ] || check_mig "$wanted" "$slices"
  if [ "$slices" = 0 ] && [ "$devices" -lt "$wanted" ]; then
    fail "GPUs are missing" "expected: $wanted; got: $devices" "look for 'NVRM: Xid' in the kernel log of the machine"
  fi
  echo "$HOSTNAME: driver $version, $devices GPUs, $slices MIG slices"
}

# Ray counts a slice as a whole GPU, and NCCL cannot connect slices.
check_mig() {
  local wanted=$1 slices=$2
  if [ "$wanted" -gt 1 ]; then
    fail "GPUs are split by MIG" "expected: $wanted whole GPUs, because NCCL cannot connect slices; got: $slices slices" \
      "nvidia-smi -mig 0 on the machine"
  fi
  if [ "${ALLOW_MIG:-0}" != 1 ]; then
    fail "the GPU is split by MIG" "expected: a whole GPU; got: a slice, which Ray and the cost estimates count as a whole one" \
      "nvidia-smi -mig 0 on the machine, or ALLOW_MIG=1 to accept slices"
  fi
  echo "warning: $HOSTNAME: a MIG slice is used, and counts as a whole GPU" >&2
}

check_efa() {
  local wanted=$1 device count=0 memlock
  for device in "$ROOT"/dev/infiniband/uverbs*; do
    if [ -r "$device" ] && [ -w "$device" ]; then count=$((count + 1)); fi
  done
  if [ "$count" -lt "$wanted" ]; then
    fail "EFA devices are missing" "expected: $wanted in $ROOT/dev/infiniband that this user can open; got: $count" \
      "kubectl -n kube-system get daemonsets, for EFA's device plugin"
  fi
  memlock=$(ulimit -l)
  if [ "$memlock" != unlimited ] && [ "$memlock" -lt "$MIN_MEMLOCK_KIB" ]; then
    fail "the limit of locked memory is too small for EFA" "expected: at least $MIN_MEMLOCK_KIB KiB; got: $memlock KiB" \
      "set LimitMEMLOCK=infinity for containerd on the machine"
  fi
  if ! grep -q libnccl-net-ofi.so <<<"$(ldconfig -p)"; then
    fail "the image has no libnccl-net-ofi.so" "expected: NCCL's plugin for EFA; got: nothing in ldconfig's cache" \
      "build the image with the EFA installer (infra/efa.sh)"
  fi
  echo "$HOSTNAME: $count EFA devices, locked memory $memlock"
}

for number; do
  [[ $number =~ ^[0-9]+$ ]] || fail "$number is not a number of devices" "expected: check-driver.sh [GPUS [EFA]]; got: $*" \
    "check-driver.sh 1"
done
gpus=${1:-$(announced_gpus)}
gpus=${gpus:-$(gpus_on_bus)}
[ "$gpus" = 0 ] || check_gpus "$gpus"
[ "${2:-0}" = 0 ] || check_efa "$2"
