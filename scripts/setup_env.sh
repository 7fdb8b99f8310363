# shellcheck shell=bash
# Sourced by launch.sh and test.sh in the repository's root: makes .venv and keeps it at the pinned versions.
#
# A stamp in .venv holds the text of the requirements that were installed. It is written last, so what has
# changed since, or did not come to its end, is installed again; otherwise looking at it costs no time.

python=$PWD/.venv/bin/python

say() { printf '%s\n' "$*" >&2; }

die() {
    say "$(basename "$0"): $*"
    exit 1
}

# attend COMMAND...: runs a command that ends when this script is told to. Bash would act on a signal only
# when a child in the foreground has ended, or die of it and leave the child behind; hence the background.
attend() {
    local status=0
    "$@" </dev/null &
    # shellcheck disable=SC2064  # the process of now is meant
    trap "kill -TERM $! 2>/dev/null; wait $!; exit 143" TERM HUP
    # shellcheck disable=SC2064
    trap "kill -TERM $! 2>/dev/null; wait $!; exit 130" INT
    wait $! || status=$?
    trap - INT TERM HUP
    return "$status"
}

# Two runs may start at once, perhaps on two nodes with one file system: one sets up, the other waits.
lock() {
    command -v flock >/dev/null || return 0
    exec 9>.venv.lock
    flock -n 9 || { say "Waiting for another set-up of .venv ..." && flock 9; }
}

unlock() { exec 9>&-; }

# stamped NAME TEXT: whether the stamp of that name holds the text.
stamped() { [[ -f .venv/.$1 && $(<".venv/.$1") == "$2" ]]; }

stamp() { printf '%s\n' "$2" >".venv/.$1"; }

# ready NAME TEXT: whether .venv holds those requirements.
ready() { [[ -x $python && ! -e .venv/.unfinished ]] && stamped "installed-$1" "$2"; }

# setup_env NAME FILE...: makes .venv hold the requirements in the files.
setup_env() {
    local name=$1 wanted
    shift
    wanted=$(cat "$@")
    if ready "$name" "$wanted"; then return; fi
    lock
    if ! ready "$name" "$wanted"; then
        # What an interrupted pip leaves behind may look installed without being whole.
        if [[ -e .venv/.unfinished ]] || ! "$python" -m pip --version &>/dev/null; then create_venv; fi
        pip_install "$@"
        stamp "installed-$name" "$wanted"
        rm .venv/.unfinished
    fi
    unlock
}

create_venv() {
    local base=${PYTHON:-python3} mend="set PYTHON=/path/to/python3"
    command -v "$base" >/dev/null || die "there is no $base: install Python 3.10 or newer, or $mend"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python 3.10 or newer is needed, and $base is $("$base" -V 2>&1): $mend"
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$base lacks the venv module: install it (Debian, Ubuntu: apt install python3-venv), or $mend"
    say "Making .venv ..."
    attend "$base" -m venv --clear --without-pip .venv
    touch .venv/.unfinished
    attend "$python" -m ensurepip --default-pip >.venv/pip.log 2>&1 || die "no pip: see .venv/pip.log"
}

pip_install() {
    local status=0
    say "Installing $* into .venv (minutes the first time, PyTorch is large) ..."
    touch .venv/.unfinished
    attend "$python" -m pip install --quiet --no-input --disable-pip-version-check \
        "${@/#/--requirement=}" >.venv/pip.log 2>&1 || status=$?
    if ((status != 0)); then
        if ((status < 128)); then rm .venv/.unfinished; fi # it failed in good order
        tail -n 20 .venv/pip.log >&2
        die "pip could not install $*: above is the end of .venv/pip.log; the next run tries again"
    fi
}

# setup_browser: a Chromium for the tests that look at pages: the machine's own, or Debian's, or playwright's.
setup_browser() {
    if command -v chromium google-chrome >/dev/null || stamped browser playwright; then return; fi
    say "Installing Chromium for the tests ..."
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        { attend apt-get update -qq && attend apt-get install -qq --yes chromium; } &>.venv/browser.log && return
    fi
    # A machine without network for it still has all the other tests to pass.
    attend timeout -k 10 300 "$python" -m playwright install chromium &>>.venv/browser.log ||
        { say "No Chromium could be installed (see .venv/browser.log): the tests that look at pages are skipped." && return; }
    stamp browser playwright
}

# Tries requirements-gpu.txt: once, for a limited time, and never a reason to stop.
try_gpu_requirements() {
    local wanted limit=${GRASS_GPU_SETUP_SECONDS:-900}
    wanted=$(<requirements-gpu.txt)
    if stamped installed-gpu "$wanted"; then return; fi
    lock
    if ! stamped installed-gpu "$wanted" && ! stamped failed-gpu "$wanted"; then
        say "Installing requirements-gpu.txt into .venv (optional, at most $limit seconds) ..."
        if install_gpu >.venv/pip-gpu.log 2>&1; then
            stamp installed-gpu "$wanted"
        else
            stamp failed-gpu "$wanted"
        fi
    fi
    unlock
    if ! stamped installed-gpu "$wanted"; then
        say "Going on without flash-attn, which could not be installed: see .venv/pip-gpu.log" \
            "(rm .venv/.failed-gpu to try again)."
    fi
}

install_gpu() {
    local pip=(attend timeout -k 10 "$limit" "$python" -m pip install --no-input -c requirements.txt)
    # The build of flash-attn looks at the installed torch: it cannot be isolated, and needs its tools there.
    "${pip[@]}" -c requirements-gpu.txt ninja packaging psutil wheel &&
        "${pip[@]}" --no-build-isolation -r requirements-gpu.txt &&
        "$python" -c 'import flash_attn'
}
