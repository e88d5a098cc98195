#!/usr/bin/env bash
# tools/need.sh TOOL ...   where a tool is numactl, chromium, libomp, qemu, qemu_user, qemu_arm, xz, llvm or python
#
# Makes sure that system tools are there. Those that are missing are installed together where this runs as root on apt or
# dnf; elsewhere the line to type is printed, which names all of them, and the exit status is 1. `python` also prints which
# command it is: $PYTHON where that is set, otherwise the newest >= 3.11 that can make virtual environments.
set -euo pipefail
PATH=${PATH//"$PWD/.venv/bin:"/} # an activated .venv may be what is about to be rebuilt

fail() {
    echo "make: $1" >&2
    shift
    (($# == 0)) || printf '    %s\n' "$@" >&2
    exit 1
}

any_of() {
    local name
    for name in "$@"; do
        command -v "$name" >/dev/null && return
    done
    return 1
}

# Sets `python` to the first command that serves, or else `bare` to the first that lacks no more than a package of Debian's.
find_python() {
    local name version candidates=(python3.14 python3.13 python3.12 python3.11 python3 python)
    python='' bare='' bare_version='' found=''
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for name in "${candidates[@]}"; do
        version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        found+="${found:+, }$name ($version)"
        [[ $version == 3.* ]] && ((${version#3.} >= 11)) || continue
        if "$name" -c 'import ensurepip, venv' 2>/dev/null; then
            python=$(command -v "$name")
            return
        fi
        [[ $bare ]] || { bare=$name && bare_version=$version; }
    done
    return 1
}

is_there() {
    case $1 in
        numactl) any_of numactl ;;
        # The names under which the tests look for it, in this order.
        chromium) any_of chromium chromium-browser google-chrome ;;
        libomp) PATH=$PATH:/sbin ldconfig -p | grep 'libomp\.so' >/dev/null ;;
        qemu) any_of qemu-system-x86_64 ;;
        qemu_user) any_of qemu-aarch64-static ;;
        qemu_arm) any_of qemu-system-aarch64 ;;
        xz) any_of xz ;;
        llvm) compgen -c llvm-mca >/dev/null ;;
        python) find_python ;;
        *) fail "tools/need.sh $1: expected numactl, chromium, libomp, qemu, qemu_user, qemu_arm, xz, llvm or python" ;;
    esac
}

whats=() debian=() fedora=() conda=()
# lacks WHAT DEBIAN_PACKAGE FEDORA_PACKAGE CONDA_PACKAGE
lacks() {
    whats+=("$1") debian+=("$2") fedora+=("$3") conda+=("$4")
}

# Debian has several; a newer one knows more processors.
newest_llvm() {
    local newest
    newest=$(apt-cache search --names-only '^llvm-[0-9]+$' 2>/dev/null | cut -d ' ' -f 1 | sort -V | tail -n 1) || true
    echo "${newest:-llvm}"
}

lacks_tool() {
    case $1 in
        numactl) lacks numactl numactl numactl numactl ;;
        chromium) lacks "chromium (the tests open reports in it)" chromium chromium chromium ;;
        libomp) lacks "libomp (a test runs on it in place of libgomp)" libomp5 libomp llvm-openmp ;;
        qemu) lacks "QEMU (the guests with several NUMA nodes run in it)" qemu-system-x86 qemu-system-x86 qemu ;;
        qemu_user) lacks "QEMU's user mode (programs of 64-bit Arm run in it)" qemu-user-static qemu-user-static-aarch64 qemu ;;
        qemu_arm) lacks "QEMU for 64-bit Arm (the guest of Arm runs in it)" qemu-system-arm qemu-system-aarch64 qemu ;;
        xz) lacks "xz (it unpacks the guests' kernel)" xz-utils xz xz ;;
        llvm) lacks "LLVM's tools (llvm-mca models processors)" "$(newest_llvm)" llvm llvm-tools ;;
        python)
            if [[ $bare ]]; then
                lacks "python3-venv for $bare" "python$bare_version-venv" "python$bare_version" python
            else
                lacks "Python 3.11 or newer (found: ${found:-none})" python3-venv python3.12 python
            fi
            ;;
    esac
}

for tool in "$@"; do
    is_there "$tool" || lacks_tool "$tool"
done

if ((${#whats[@]})); then
    if ((EUID == 0)) && any_of apt-get; then
        echo "make: installing ${debian[*]} with apt-get ..." >&2
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q >&2 && apt-get install -y -q --no-install-recommends "${debian[@]}" >&2 && whats=()
    elif ((EUID == 0)) && any_of dnf; then
        echo "make: installing ${fedora[*]} with dnf ..." >&2
        dnf install -y -q "${fedora[@]}" >&2 && whats=()
    fi
fi
if ((${#whats[@]})); then
    printf -v missing '%s, ' "${whats[@]}"
    fail "missing: ${missing%, }. Type the line for this system, then make again:" \
        "sudo apt-get install ${debian[*]}    # Debian, Ubuntu" \
        "sudo dnf install ${fedora[*]}    # Fedora, RHEL" \
        "conda install -c conda-forge ${conda[*]}    # conda"
fi

if [[ " $* " == *" python "* ]]; then
    find_python || fail "numa_lab needs Python 3.11 or newer; found: ${found:-none}. Install one and name it, or use conda:" \
        "make setup PYTHON=/path/to/python3.11" "conda env create -f environment.yml"
    echo "$python"
fi
