#!/usr/bin/env bash
# Makes a release of the committed tree, in dist/: sdist, wheels, the built-in bundle, both images for both processors,
# what is in them (CycloneDX), SHA256SUMS and its signature. `make release` runs it; docs/releasing.md has the list.
#
#   service/deploy/release.sh [STEP …]        default: packages wheels bundle images sboms sums sign verify, in this order
#
# RELEASE_KEY: the private SSH key that signs; service/deploy/allowed_signers has its public half. Only `sign` needs it.
# A step may run again: it makes the same files anew. The images need Docker with BuildKit, and QEMU's binfmt handler
# for the processor that is not this one's.
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3}
PLATFORMS=${PLATFORMS:-amd64 arm64}
SIGNERS=${SIGNERS:-service/deploy/allowed_signers}
IMAGES="service export"
IDENTITY=release@calmclip NAMESPACE=calmclip-release
VERSION=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' calmclip/__init__.py)
NAME=calmclip-$VERSION
export SOURCE_DATE_EPOCH
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
OUT=$PWD/dist WORK=$PWD/build/release
SOURCE=$WORK/source TOOLS=$WORK/tools

fail() { echo "release: $*" >&2; exit 1; }

# The commit, and nothing that lies beside it.
source_tree() {
  [ -z "$(git status --porcelain)" ] || fail "the tree has changes that are not committed; commit or stash them"
  mkdir -p "$OUT" "$SOURCE"
  [ "$(cat "$WORK/commit" 2>/dev/null)" = "$(git rev-parse HEAD)" ] && return
  rm -rf "$SOURCE" && mkdir -p "$SOURCE"
  git archive HEAD | tar -x -C "$SOURCE"
  git rev-parse HEAD >"$WORK/commit"
}

packages() { # sdist, and the wheel from it, with pinned tools
  [ -x "$TOOLS/bin/python" ] || "$PYTHON" -m venv "$TOOLS"
  "$TOOLS/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes \
    -r "$SOURCE/service/deploy/requirements-build.txt"
  (cd "$SOURCE" && umask 022 && "$TOOLS/bin/python" -m build --no-isolation --outdir "$OUT" .)
  rm -rf "$WORK/sdist" && mkdir "$WORK/sdist" && tar -xf "$OUT/$NAME.tar.gz" -C "$WORK/sdist"
  archive "$OUT/$NAME.tar.gz" -C "$WORK/sdist" "$NAME" # setuptools writes the time of the build into it
}

# For each processor one with the op library inside, which the image's compilers make.
wheels() {
  [ -f "$OUT/$NAME-py3-none-any.whl" ] || fail "there is no wheel; run the step packages first"
  rm -rf "$WORK/libraries"
  build --target libraries --output "type=local,dest=$WORK/libraries"
  "$PYTHON" "$SOURCE/service/deploy/platform_wheels.py" --libraries "$WORK/libraries" \
    "$OUT/$NAME-py3-none-any.whl" "$OUT"
}

# The platform of the builder: a bundle is the same for every processor.
bundle() {
  rm -rf "$WORK/bundle"
  build --target bundle --output "type=local,dest=$WORK/bundle"
  for made in "$WORK"/bundle/bundles/*/; do
    archive "$OUT/$NAME-$(basename "$made").tar.gz" -C "$WORK/bundle/bundles" "$(basename "$made")"
  done
}

images() {
  [ -d "$WORK/bundle" ] || fail "there is no bundle; run the step bundle first"
  for platform in $PLATFORMS; do for image in $IMAGES; do
    build --target "$image" --platform "linux/$platform" --build-context "bundle=$WORK/bundle" --load \
      --tag "$(tag "$image" "$platform")"
    docker save "$(tag "$image" "$platform")" | gzip -n >"$OUT/$NAME-$image-$platform.docker.tar.gz"
  done; done
}

sboms() { # out of the images, without running them
  for platform in $PLATFORMS; do for image in $IMAGES; do
    container=$(docker create --platform "linux/$platform" "$(tag "$image" "$platform")")
    for list in python debian; do
      docker cp --quiet "$container:/usr/share/sbom/$list.cdx.json" "$OUT/$NAME-$image-$platform.$list.cdx.json"
    done
    docker rm "$container" >/dev/null
  done; done
}

sums() {
  (cd "$OUT" && rm -f SHA256SUMS SHA256SUMS.sig && sha256sum -- "$NAME"* >"$WORK/SHA256SUMS" && mv "$WORK/SHA256SUMS" .)
}

sign() {
  [ -f "${RELEASE_KEY:-}" ] || fail "RELEASE_KEY is '${RELEASE_KEY:-}', expected the file of a private SSH key"
  rm -f "$OUT/SHA256SUMS.sig"
  ssh-keygen -q -Y sign -f "$RELEASE_KEY" -n "$NAMESPACE" "$OUT/SHA256SUMS"
}

verify() { # as SECURITY.md tells it
  ssh-keygen -q -Y verify -f "$SIGNERS" -I "$IDENTITY" -n "$NAMESPACE" -s "$OUT/SHA256SUMS.sig" <"$OUT/SHA256SUMS" ||
    fail "SHA256SUMS.sig is not by a key of $SIGNERS; add the public half of RELEASE_KEY there, and commit it"
  (cd "$OUT" && sha256sum --quiet --check SHA256SUMS) || fail "a file of dist/ has changed since the step sums"
  echo "release: $OUT is whole and signed"
}

build() { # TORCH_INDEX_URL as in the Dockerfile, BUILD_FLAGS for a network or a proxy of this machine
  # shellcheck disable=SC2086
  docker buildx build ${TORCH_INDEX_URL+--build-arg TORCH_INDEX_URL="$TORCH_INDEX_URL"} ${BUILD_FLAGS:-} "$@" "$SOURCE"
}

tag() { # image, processor
  if [ "$1" = service ]; then echo "calmclip:$VERSION-$2"; else echo "calmclip-$1:$VERSION-$2"; fi
}

archive() { # the same bytes from the same files
  local file=$1
  shift
  tar --format=posix --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime --sort=name \
    --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX --mtime="@$SOURCE_DATE_EPOCH" -c "$@" | gzip -n >"$file"
}

steps=("$@")
[ $# -gt 0 ] || steps=(packages wheels bundle images sboms sums sign verify)
for step in "${steps[@]}"; do
  case $step in
    packages | wheels | bundle | images | sboms | sums | sign | verify) ;;
    *) fail "there is no step '$step'; the steps are packages, wheels, bundle, images, sboms, sums, sign, verify" ;;
  esac
done
case " ${steps[*]} " in *" sign "*) [ -f "${RELEASE_KEY:-}" ] || sign ;; esac # before an hour of work
source_tree
for step in "${steps[@]}"; do
  echo "release: $step"
  "$step"
done
