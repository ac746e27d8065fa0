#!/bin/sh
# Sets up and runs jaxllm on this machine. Needs a shell, git and Python >= 3.11 with venv; run it again at any time.
#   launch/local.sh setup          make a virtual environment and install
#   launch/local.sh test [ARGS]    the same, then the test suite (ARGS go to pytest: -m "not slow" for the quick part)
#   launch/local.sh demo           the same, then train a small language model on real English, teach it sums by instruction
#                                  tuning and RLHF, and show both (--stage=pretrain: the first alone)
# Options before ARGS: --python=3.12 (that version), --colab (the versions that Colab's TPU runtime has)
set -eu

root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
cd "$root"

say() { printf '\n== %s\n' "$*"; }
stop() { printf 'launch/local.sh: %s\n' "$*" >&2; exit 2; }

usage() { sed -n '2,7p' "$root/launch/local.sh" | sed 's/^# \{0,1\}//'; }

command=${1:-help}
[ $# -gt 0 ] && shift
version="" colab=""
while [ $# -gt 0 ]; do
    case $1 in
        --python=*) version=${1#--python=}; shift ;;
        --colab) colab=1; shift ;;
        *) break ;;
    esac
done
case $command in
    setup|test|demo) ;;
    help|-h|--help) usage; exit 0 ;;
    *) usage >&2; stop "unknown command '$command': should be setup, test or demo" ;;
esac

# ---------------------------------------------------------------- Python

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
is_version() { "$1" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" 2>/dev/null; }

find_python() {
    if [ -n "$version" ]; then
        for candidate in "python$version" python3 "$HOME/.pyenv/versions/$version"*/bin/python; do
            if is_version "$candidate" "$version"; then
                is_new_enough "$candidate" || stop "--python=$version: should be 3.11 or newer"
                echo "$candidate"; return
            fi
        done
        stop "no Python $version found: tried python$version, python3 and pyenv's versions"
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if is_new_enough "$candidate"; then echo "$candidate"; return; fi
    done
    found=$(python3 --version 2>/dev/null || echo "no python3")
    stop "Python 3.11 or newer is needed, found $found; install one (Debian: apt-get install python3.11 python3.11-venv)"
}

# ---------------------------------------------------------------- the environment

python=$(find_python) || exit 2
venv=".venv"
[ -n "$version" ] && venv="$venv-$version"
[ -n "$colab" ] && venv="$venv-colab"
extras="test"
[ "$command" = demo ] && extras="test,demo"

need_kb=3500000
free_kb=$(df -Pk . | awk 'NR == 2 { print $4 }')
stamp="$venv/installed"
wanted=$(cat setup.py launch/colab.txt | cksum; echo "$extras $colab $($python --version)")

set_up() {
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        say "$venv is set up"
        return
    fi
    [ "$free_kb" -ge "$need_kb" ] || stop "the disk is too full: $((free_kb / 1000)) MB free here, an install needs $((need_kb / 1000)) MB"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        stop "$python has no venv module; install it (Debian: apt-get install python3-venv)"
    say "making $venv with $("$python" --version)"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    say "installing jaxllm[$extras]"
    constraint=""
    [ -n "$colab" ] && constraint="-c launch/colab.txt"
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $constraint -e ".[$extras]" 2>"$venv/pip.log" || {
        tail -5 "$venv/pip.log" >&2
        if grep -q "No space left" "$venv/pip.log"; then stop "the disk became full while installing; free some space and run this again"; fi
        stop "the install failed (all of it: $venv/pip.log); is there a network? Run this again when it is mended"
    }
    [ "$command" = test ] && add_tpu_compiler
    printf '%s' "$wanted" > "$stamp"
}

# The tests compile for TPUs on this machine. The compiler goes beside the environment, not into it: where jax finds libtpu
# it looks for a TPU at every start.
add_tpu_compiler() {
    case "$(uname -sm)" in "Linux x86_64") ;; *) say "no TPU compiler for $(uname -sm): its tests will be skipped"; return 0 ;; esac
    wanted_tpu=$("$venv/bin/python" -c '
import importlib.metadata, re
found = [r for r in importlib.metadata.requires("jax") if r.startswith("libtpu")]
print(re.split("[; ]", found[0])[0] if found else "libtpu")')
    [ -n "$colab" ] && wanted_tpu=$(grep '^libtpu' launch/colab.txt)
    say "installing the TPU compiler ($wanted_tpu) for the compile tests"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$venv/libtpu" "$wanted_tpu" \
        2>>"$venv/pip.log" || say "it could not be installed: the compile tests will be skipped"
}

began=$(date +%s)
set_up
say "set-up took $(($(date +%s) - began)) s"
[ "$command" = setup ] && { say "ready: $venv/bin/jaxllm --help"; exit 0; }

# ---------------------------------------------------------------- what was asked for

if [ "$command" = test ]; then
    say "testing"
    "$venv/bin/python" -m ruff check .
    # Two processes: compiling is most of the time and keeps one core busy each.
    exec "$venv/bin/python" -m pytest -n 2 --dist loadfile "$@"
fi
exec "$venv/bin/python" launch/demo.py "$@"
