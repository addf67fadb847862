#!/bin/sh
# Usage: typecheck.sh MYPY [ARGUMENTS]
# mypy cannot follow the mapping of envs/, policies/ ... into the package, so it reads a farm of links that shows the
# package as it is when installed.
set -eu
cd "$(dirname "$0")/.."
farm=.typecheck/emu_embodied
rm -rf .typecheck
mkdir -p "$farm"
for path in emu_embodied/*; do
    [ "${path##*/}" = __pycache__ ] || ln -s "../../$path" "$farm/${path##*/}"
done
for room in envs policies planners experiments; do
    ln -s "../../$room" "$farm/$room"
done
mypy=$1
shift
exec "$mypy" "$@"
