#!/usr/bin/env bash
# tools/need.sh numactl | chromium | libomp | qemu | qemu_user | qemu_arm | python [COMMAND]
#
# Makes sure that a system tool is there. A missing one is installed where this runs as root on apt or dnf; elsewhere the
# line to type is printed and the exit status is 1. `python` prints a Python >= 3.11 that can make virtual environments.
set -euo pipefail
PATH=${PATH//"$PWD/.venv/bin:"/} # an activated .venv may be what is about to be rebuilt

fail() {
    echo "make: $1" >&2
    shift
    (($# == 0)) || printf '    %s\n' "$@" >&2
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
        "sudo apt-get install $2    # Debian, Ubuntu" \
        "sudo dnf install $3    # Fedora, RHEL" \
        "$4    # conda"
}

any_of() {
    local name
    for name in "$@"; do
        command -v "$name" >/dev/null && return
    done
    return 1
}

find_python() {
    local name version bare= bare_version= found= candidates=(python3.13 python3.12 python3.11 python3 python)
    [[ -z ${1:-} ]] || candidates=("$1")
    for name in "${candidates[@]}"; do
        version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        found+="${found:+, }$name ($version)"
        [[ $version == 3.* ]] && ((${version#3.} >= 11)) || continue
        "$name" -c 'import ensurepip, venv' 2>/dev/null && command -v "$name" && return
        [[ $bare ]] || { bare=$name && bare_version=$version; }
    done
    [[ $bare ]] || fail "numa_lab needs Python 3.11 or newer; found: ${found:-none}. Install one and name it, or use conda:" \
        "make setup PYTHON=/path/to/python3.11" "conda env create -f environment.yml"
    install "python3-venv for $bare" "python$bare_version-venv" "python$bare_version" "conda env create -f environment.yml"
    command -v "$bare"
}

case ${1:-} in
    numactl) any_of numactl || install numactl numactl numactl "conda install -c conda-forge numactl" ;;
    # The names under which the tests look for it, in this order.
    chromium) any_of chromium chromium-browser google-chrome || install "chromium (the tests open reports in it)" \
        chromium chromium "conda install -c conda-forge chromium" ;;
    libomp) PATH=$PATH:/sbin ldconfig -p | grep 'libomp\.so' >/dev/null || install "libomp (a test runs on it in place of libgomp)" \
        libomp5 libomp "conda install -c conda-forge llvm-openmp" ;;
    qemu) any_of qemu-system-x86_64 || install "QEMU (the guests with several NUMA nodes run in it)" \
        qemu-system-x86 qemu-system-x86 "conda install -c conda-forge qemu" ;;
    qemu_user) any_of qemu-aarch64-static || install "QEMU's user mode (programs of 64-bit Arm run in it)" \
        qemu-user-static qemu-user-static-aarch64 "conda install -c conda-forge qemu" ;;
    qemu_arm) any_of qemu-system-aarch64 || install "QEMU for 64-bit Arm (the guest of Arm runs in it)" \
        qemu-system-arm qemu-system-aarch64 "conda install -c conda-forge qemu" ;;
    python) find_python "${2:-}" ;;
    *) fail "usage: tools/need.sh numactl|chromium|libomp|qemu|qemu_user|qemu_arm|python [COMMAND]" ;;
esac
