#!/bin/sh
# Prints the manifests of a folder below infra/kubernetes, or of a file, if they are ready to be applied.
#
#     infra/render.sh infra/kubernetes/overlays/on-prem | kubectl apply -f -
#     infra/render.sh infra/kubernetes/kueue/embed | kubectl create -f -
#
# Ends with 1 and prints nothing if a word in capitals was not replaced, or if an image is not named by its digest. A tag can
# be moved to another image, a digest cannot.
set -eu
[ $# = 1 ] || { echo "render: one folder or file, and $# were given. hint: infra/render.sh infra/kubernetes/overlays/on-prem" >&2 && exit 2; }
if [ -d "$1" ]; then text=$(kubectl kustomize "$1"); else text=$(cat "$1"); fi

words=$(printf '%s\n' "$text" | sed 's/#.*//' | grep -oE '\b(REGISTRY|ACCOUNT|REGION|BUCKET|DIGEST)\b' | sort -u | tr '\n' ' ') || true
if [ -n "$words" ]; then
  echo "render: not replaced in $1: $words" >&2
  echo "hint: edit its kustomization.yaml; the digest is what docker inspect --format '{{index .RepoDigests 0}}' IMAGE prints" >&2
  exit 1
fi
tags=$(printf '%s\n' "$text" | sed -nE 's/^[ -]*image: *//p' | grep -vE '@sha256:[0-9a-f]{64}$' | sort -u) || true
if [ -n "$tags" ]; then
  echo "render: images that are not named by their digest: $tags" >&2
  echo "hint: write digest: sha256:... in kustomization.yaml, and no newTag" >&2
  exit 1
fi
printf '%s\n' "$text"
