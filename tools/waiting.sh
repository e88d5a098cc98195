#!/usr/bin/env bash
# tools/waiting.sh COMMAND ...   runs a command that says nothing until its end, and says every ten seconds that it still runs
set -euo pipefail

(while sleep 10 </dev/null >/dev/null 2>&1; do echo "make:   $SECONDS s: ${1##*/} is at work"; done) &
trap 'kill $!' EXIT
"$@"
