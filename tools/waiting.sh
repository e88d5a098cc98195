#!/usr/bin/env bash
# tools/waiting.sh COMMAND ...   runs a command that is silent for long, and says every ten seconds that it still runs
set -euo pipefail

# A read that nothing ever ends is a clock that starts no process beside what may be a measurement.
(exec {never}<> <(:) && while ! read -r -t 10 -u "$never"; do words=$*; echo "make:   $SECONDS s: ${words:0:100}"; done) &
trap 'kill $!' EXIT
"$@"
