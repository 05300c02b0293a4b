#!/usr/bin/env bash
# Installs what NCCL needs for AWS's EFA into an image, as root: libfabric, rdma-core and the plugin libnccl-net-ofi.so.
#
#     efa.sh VERSION        # of the EFA installer, such as 1.51.0; it brings the plugin
#
# Run it after the Python packages: the plugin opens libcudart.so, and torch brings a libcudart.so.13 alone.
# The machine has the kernel module and the limits. An image with EFA also runs on machines without it.
set -euo pipefail

VERSION=${1:?VERSION of the EFA installer is missing}
SITE=https://efa-installer.amazonaws.com
FINGERPRINT=4E9091BCBB97A96B26B15E59A05480B1DD2D3CCC  # the key that AWS documents for the installer
ARCHIVE=aws-efa-installer-$VERSION.tar.gz

fail() {
  printf 'error: %s\n%s\nhint: %s\n' "$1" "$2" "$3" >&2
  exit 1
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
export DEBIAN_FRONTEND=noninteractive GNUPGHOME=$scratch/gnupg
mkdir -m 700 "$GNUPGHOME"

apt-get update
apt-get install -y --no-install-recommends ca-certificates curl gnupg
curl --retry 3 -fsSLO "$SITE/aws-efa-installer.key" -fsSLO "$SITE/$ARCHIVE" -fsSLO "$SITE/$ARCHIVE.sig"
gpg --batch --import aws-efa-installer.key
# VALIDSIG names the key that signed, so a second key in the file does not help.
signer=$(gpg --batch --status-fd 1 --verify "$ARCHIVE.sig" "$ARCHIVE" | awk '$2 == "VALIDSIG" {print $NF}') || true
[ "$signer" = "$FINGERPRINT" ] || fail "$ARCHIVE is not signed by AWS's key" \
  "expected: a signature of $FINGERPRINT; got: ${signer:-no valid signature}" "look for a new key in AWS's documentation of EFA"

tar -xf "$ARCHIVE"
# --no-verify skips the search for devices, because a build has none. From 1.48 on the installer treats NVIDIA's base images
# as NGC images and leaves the plugin out, unless a flag forbids it.
(cd aws-efa-installer && ./efa_installer.sh -y --skip-kmod --skip-limit-conf --no-verify --disable-ngc)
rm -rf /var/lib/apt/lists/*

# The folder of the plugin changed between versions. The loader's cache keeps LD_LIBRARY_PATH out of manifests.
plugin=$(find /opt/amazon/ofi-nccl -name libnccl-net-ofi.so -print -quit)
[ -n "$plugin" ] || fail "EFA installer $VERSION left no plugin" "expected: libnccl-net-ofi.so below /opt/amazon/ofi-nccl; got: none" \
  "use another version of the installer"
cudart=$(find / -xdev -name 'libcudart.so.[0-9]*' -printf '%f %p\n' | sort -V | tail -n 1 | cut -d ' ' -f 2)
[ -n "$cudart" ] || fail "the image has no CUDA runtime" "expected: libcudart.so.NUMBER, which torch brings; got: none" \
  "run efa.sh after the Python packages are installed"
ln -sf "$cudart" "$(dirname "$plugin")/libcudart.so"
printf '%s\n' "$(dirname "$plugin")" /opt/amazon/efa/lib >/etc/ld.so.conf.d/rdm-efa.conf
ldconfig
if ldd "$plugin" | grep 'not found'; then
  fail "$plugin lacks the libraries above" "expected: all of them in ldconfig's cache; got: the list above" "ldd $plugin"
fi
