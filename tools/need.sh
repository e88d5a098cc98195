#!/usr/bin/env bash
# tools/need.sh numactl | chromium | python [COMMAND]
#
# Makes sure that a system tool is there. A missing one is installed where this runs as root on apt or dnf; elsewhere the
# line to type is printed and the exit status is 1. `python` prints a Python >= 3.11 that can make virtual environments.
set -euo pipefail
PATH=${PATH//"$PWD/.venv/bin:"/} # an activated .venv may be what is about to be rebuilt

fail() {
    printf 'make: %s\n' "$@" >&2
    exit 1
}

# install WHAT DEBIAN_PACKAGE FEDORA_PACKAGE CONDA_LINE
install() {
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        echo "make: installing $2 with apt-get ..." >&2
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq >&2 && apt-get install -y -qq --no-install-recommends "$2" >&2 && return
    elif ((EUID == 0)) && command -v dnf >/dev/null; then
        echo "make: installing $3 with dnf ..." >&2
        dnf install -y -q "$3" >&2 && return
    fi
    fail "$1 is missing. Type the line for this system, then make again:" \
        "    sudo apt-get install $2        (Debian, Ubuntu)" \
        "    sudo dnf install $3        (Fedora, RHEL)" \
        "    $4        (conda)"
}

any_of() {
    local name
    for name in "$@"; do
        command -v "$name" >/dev/null && return
    done
    return 1
}

find_python() {
    local name version found=() bare=
    for name in ${1:-python3.13 python3.12 python3.11 python3 python}; do
        version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        found+=("$name is Python $version")
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            "$name" -c 'import ensurepip, venv' 2>/dev/null && command -v "$name" && return
            bare=${bare:-$name}
        fi
    done
    if [[ -z $bare ]]; then
        [[ ${#found[@]} -gt 0 ]] || found=("none")
        fail "numa_lab needs Python 3.11 or newer. Found: $(printf '%s; ' "${found[@]}")" \
            "Install one and name it (make setup PYTHON=/path/to/python3.11), or use conda: conda env create -f environment.yml"
    fi
    version=$("$bare" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    install "$bare has no ensurepip, so it makes no virtual environment: python3-venv" \
        "$version-venv" "$version" "conda env create -f environment.yml"
    command -v "$bare"
}

case ${1:-} in
    numactl) any_of numactl || install numactl numactl numactl "conda install -c conda-forge numactl" ;;
    # The names under which the tests look for it, in this order.
    chromium) any_of chromium chromium-browser google-chrome || install "chromium (the tests open reports in it)" \
        chromium chromium "python -m playwright install chromium" ;;
    python) find_python "${2:-}" ;;
    *) fail "usage: tools/need.sh numactl|chromium|python [COMMAND]" ;;
esac
