# shellcheck shell=bash
# Sourced by launch.sh and test.sh in the repository's root: makes .venv and keeps it at the pinned versions.
# GRASS_TORCH chooses a torch other than that of requirements.txt, in an environment of its own: GRASS_TORCH=2.11.0
# installs torch 2.11.0 in .venv-torch-2.11.0. GRASS_TORCH=installed makes .venv-torch-installed, which uses the packages
# of $PYTHON and never installs a torch.
#
# A stamp in the environment has the text of the requirements that were installed. It is written last: requirements that
# have changed since, and those whose installation was interrupted, are installed again. Comparing it takes no time.

say() { printf '%s\n' "$*" >&2; }

die() {
    say "$(basename "$0"): $*"
    exit 1
}

base=${PYTHON:-python3}

need_base() {
    local fix="set PYTHON=/path/to/python3"
    command -v "$base" >/dev/null || die "there is no $base: install Python 3.10 or newer, or $fix"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "Python 3.10 or newer is needed, and $base is $("$base" -V 2>&1): $fix"
    "$base" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$base lacks the venv module: install it (Debian, Ubuntu: apt install python3-venv), or $fix"
}

venv=.venv pin= # a line for pip: the torch that GRASS_TORCH asks for
if [[ -n ${GRASS_TORCH:-} ]]; then
    [[ $GRASS_TORCH == installed || $GRASS_TORCH =~ ^[0-9][0-9A-Za-z.+]*$ ]] ||
        die "GRASS_TORCH must be a version like 2.11.0, or installed, not '$GRASS_TORCH'"
    venv=.venv-torch-$GRASS_TORCH pin=torch==$GRASS_TORCH
fi
if [[ ${GRASS_TORCH:-} == installed ]]; then
    need_base
    pin=$("$base" -m pretrain.cli.machine) || exit
    pin="torch==$pin # of $(command -v "$base")"
fi
python=$PWD/$venv/bin/python

# attend COMMAND...: runs a command that ends when this script gets a signal. With a command in the foreground, Bash
# would act on the signal only after the command has ended, or end and leave the command running.
attend() {
    local status=0
    "$@" </dev/null &
    # shellcheck disable=SC2064  # $! is to be expanded now
    trap "kill -TERM $! 2>/dev/null; wait $!; exit 143" TERM HUP
    # shellcheck disable=SC2064
    trap "kill -TERM $! 2>/dev/null; wait $!; exit 130" INT
    wait $! || status=$?
    trap - INT TERM HUP
    return "$status"
}

# Two runs may start at once, also on two nodes with one file system: one sets up, and the other waits.
lock() {
    command -v flock >/dev/null || return 0
    exec 9>"$venv.lock"
    flock -n 9 || { say "Waiting for another set-up of $venv ..." && flock 9; }
}

unlock() { exec 9>&-; }

# stamped NAME TEXT: whether the stamp NAME has this text.
stamped() { [[ -f $venv/.$1 && $(<"$venv/.$1") == "$2" ]]; }

stamp() { printf '%s\n' "$2" >"$venv/.$1"; }

# ready NAME TEXT: whether the requirements with this text are installed.
ready() { [[ -x $python && ! -e $venv/.unfinished ]] && stamped "installed-$1" "$2"; }

# setup_env NAME FILE...: installs the requirements in the files, unless they are installed.
setup_env() {
    local name=$1 wanted
    shift
    wanted=${pin:+$pin$'\n'}$(cat "$@")
    if ready "$name" "$wanted"; then return; fi
    lock
    if ! ready "$name" "$wanted"; then
        # After an interrupted pip, packages may look installed and be incomplete.
        if [[ -e $venv/.unfinished ]] || ! "$python" -m pip --version &>/dev/null ||
            { [[ -n $pin ]] && ! stamped torch "$pin"; }; then create_venv; fi
        pip_install "$@"
        stamp "installed-$name" "$wanted"
        rm "$venv/.unfinished"
    fi
    unlock
}

create_venv() {
    local options=(--clear --without-pip)
    need_base
    if [[ ${GRASS_TORCH:-} == installed ]]; then
        options+=(--system-site-packages)
    elif [[ -n $pin ]]; then
        "$base" -m pretrain.cli.machine "$GRASS_TORCH" >/dev/null || exit
    fi
    say "Making $venv ..."
    attend "$base" -m venv "${options[@]}" "$venv"
    touch "$venv/.unfinished"
    if [[ ${GRASS_TORCH:-} == installed ]]; then # needed where $base is an environment itself
        "$base" -c 'import sysconfig; print(sysconfig.get_path("platlib"))' >"$venv/base.pth"
        mv "$venv/base.pth" "$venv"/lib/python3*/site-packages/
    fi
    if [[ -n $pin ]]; then stamp torch "$pin"; fi
    attend "$python" -m ensurepip --default-pip >"$venv/pip.log" 2>&1 || die "no pip: see $venv/pip.log"
}

pip_install() {
    local status=0 wanted=("${@/#/--requirement=}")
    if [[ -n $pin ]]; then
        cat "$@" | grep -v '^torch==' >"$venv/requirements.txt"
        wanted=("--requirement=$venv/requirements.txt" "--constraint=$venv/.torch")
        if [[ $GRASS_TORCH != installed ]]; then wanted+=(torch); fi
    fi
    say "Installing $* into $venv (minutes the first time, PyTorch is large) ..."
    touch "$venv/.unfinished"
    attend "$python" -m pip install --quiet --no-input --disable-pip-version-check \
        "${wanted[@]}" >"$venv/pip.log" 2>&1 || status=$?
    if ((status != 0)); then
        if ((status < 128)); then rm "$venv/.unfinished"; fi # pip failed by itself, and left nothing incomplete
        tail -n 20 "$venv/pip.log" >&2
        die "pip could not install $*: above is the end of $venv/pip.log; the next run tries again"
    fi
}

# setup_browser: a Chromium for the tests of pages: that of the machine, of Debian, or of playwright.
setup_browser() {
    if command -v chromium google-chrome >/dev/null || stamped browser playwright; then return; fi
    say "Installing Chromium for the tests ..."
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        { attend apt-get update -qq && attend apt-get install -qq --yes chromium; } &>"$venv/browser.log" && return
    fi
    # Without a network for it, all other tests still run.
    attend timeout -k 10 300 "$python" -m playwright install chromium &>>"$venv/browser.log" ||
        { say "No Chromium could be installed (see $venv/browser.log): the tests that look at pages are skipped." && return; }
    stamp browser playwright
}
