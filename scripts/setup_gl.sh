#!/bin/sh
# Usage: setup_gl.sh PYTHON
# Proves off-screen OpenGL by drawing a picture. Where that fails on a Debian-like machine, installs Mesa (as root or
# through sudo) and tries again; otherwise says what is missing.
set -eu
python=$1
packages="libegl1 libgl1 libgl1-mesa-dri"

draws() {
    "$python" -c '
import sys
from emu_embodied.hardware import probe_gl
probe = probe_gl()
print(f"OpenGL: {probe.backend}, {probe.renderer}" if probe.backend else f"OpenGL: nothing draws here: {probe.errors}")
sys.exit(probe.backend is None)'
}

draws && exit 0
if ! command -v apt-get >/dev/null 2>&1; then
    echo "Missing: off-screen OpenGL, that is EGL (libEGL.so.1 with Mesa or a GPU driver) or OSMesa (libOSMesa.so)." >&2
    echo "Install Mesa's EGL with this system's package manager, then run the same command again." >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then
    as_root=
elif command -v sudo >/dev/null 2>&1 && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
    as_root=sudo
else
    echo "Missing: off-screen OpenGL. Ask an administrator to run: apt-get install $packages" >&2
    exit 1
fi
echo "Installing $packages for off-screen OpenGL"
$as_root apt-get update -qq
# shellcheck disable=SC2086  # one word per package
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages
draws
