# shellcheck shell=bash
# Shared shell of the project's scripts: messages, the cache, locks, and a private apt for any suite.
# To be sourced by bash with `set -euo pipefail` in force. Assumes Debian's apt for the apt_* part.

RF_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
RF_CACHE=${RINGFORT_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/ringfort}
# The Debian release that the server image and the default kernels come from.
RF_SUITE=bookworm
RF_TEMP=()

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$@"; exit 1; }

cleanup_temp() { [ ${#RF_TEMP[@]} -eq 0 ] || rm -rf --one-file-system -- "${RF_TEMP[@]}"; }
trap cleanup_temp EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Sets TEMP to a new directory in the cache, removed when the script ends. What a killed run left is
# removed here too: the caller holds the lock of NAME, so nobody else is using it.
temp_dir() { # NAME
    rm -rf --one-file-system -- "$RF_CACHE"/tmp/"$1".*
    mkdir -p "$RF_CACHE/tmp"
    TEMP=$(mktemp -d "$RF_CACHE/tmp/$1.XXXXXX")
    RF_TEMP+=("$TEMP")
}

# Waits for the lock NAME of the cache and holds it until the script ends. Children do not inherit
# what they would keep open: commands that stay behind must close descriptor 9.
cache_lock() { # NAME
    mkdir -p "$RF_CACHE/lock" || die "cannot write to the cache $RF_CACHE; set RINGFORT_CACHE to a folder that you own"
    exec 9>"$RF_CACHE/lock/$1"
    if ! flock -n 9; then
        say "another run is making $1; waiting for it"
        flock 9
    fi
}

# A progress line on a terminal or in a log: "[12 s] text".
step() { printf '%s: [%3d s] %s\n' "${0##*/}" "$SECONDS" "$*" >&2; }

# Runs a command whose output matters only when it fails.
quietly() { # LOG COMMAND...
    local log=$1
    shift
    if ! "$@" >"$log" 2>&1; then
        tail -n 30 "$log" >&2
        die "failed: $*"
    fi
}

need() { # COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || die "$1 is missing: run scripts/deps as root, or install the package $2"
}

# One line "URI SIGNED_BY" for the Debian archive that this host is configured to use, by label
# ("Debian" or "Debian-Security"); nothing where there is none.
apt_archive() { # LABEL
    apt-get indextargets --format '$(LABEL)|$(COMPONENT)|$(CREATED_BY)|$(REPO_URI)|$(SIGNED_BY)' |
        awk -F'|' -v label="$1" '$1 == label && $2 == "main" && $3 == "Packages" { print $4, $5; exit }'
}

apt_source_line() { # SUITE ARCHIVE_URI SIGNED_BY
    local key=${3:-}
    [ -n "$key" ] && [ "${key#\$}" = "$key" ] || key=/usr/share/keyrings/debian-archive-keyring.gpg
    if [ -r "$key" ]; then
        printf 'deb [signed-by=%s] %s %s main\n' "$key" "$2" "$1"
    else
        printf 'deb %s %s main\n' "$2" "$1"
    fi
}

# The sources of a suite, from the same archives as this host's own.
apt_sources() { # SUITE
    local main security
    main=$(apt_archive Debian)
    [ -n "$main" ] ||
        die "no Debian archive with downloaded lists is configured here: run apt-get update as root, then again"
    # shellcheck disable=SC2086
    apt_source_line "$1" $main
    if [ "$1" = "$RF_SUITE" ]; then
        # shellcheck disable=SC2086
        apt_source_line "$1-updates" $main
        security=$(apt_archive Debian-Security)
        # shellcheck disable=SC2086
        [ -z "$security" ] || apt_source_line "$1-security" $security
    fi
}

# Sets APT to the options of an apt that knows only SUITE and ARCH, keeps its lists in the cache, and
# needs no privileges; downloads its lists. The host's other settings (proxies) stay in force.
apt_private() { # SUITE ARCH
    local dir=$RF_CACHE/apt/$1-$2
    need apt-get apt
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial" "$dir/etc"
    : >"$dir/status"
    apt_sources "$1" >"$dir/sources.list"
    APT=(-o "Dir::State=$dir" -o "Dir::State::Lists=$dir/lists" -o "Dir::State::status=$dir/status"
         -o "Dir::Cache=$dir/cache" -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=-
         -o "Dir::Etc::preferencesparts=$dir/etc" -o Dir::Etc::preferences=-
         -o "APT::Architecture=$2" -o "APT::Architectures=$2" -o APT::Sandbox::User=
         -o Acquire::Languages=none -o APT::Update::Post-Invoke-Success= -o Acquire::Retries=3)
    exec 8>"$dir/lock"
    flock 8
    if [ -z "$(find "$dir/updated" -mmin -60 2>/dev/null)" ]; then
        if apt-get "${APT[@]}" -qq update >"$dir/update.log" 2>&1; then
            touch "$dir/updated"
        elif rm -f "$dir/updated"; apt-cache "${APT[@]}" show base-files >/dev/null 2>&1; then
            # An archive of updates whose mirror is in the middle of a change must not stop
            # everything: what counts is that the release itself is there.
            say "some package lists of $1 ($2) could not be updated; going on without them (see $dir/update.log)"
        else
            cat "$dir/update.log" >&2
            die "cannot get the package lists of $1"
        fi
    fi
    exec 8>&-
}

# The packages that PACKAGE depends on directly, one per line.
apt_depends() { # PACKAGE
    apt-cache "${APT[@]}" show --no-all-versions "$1" |
        sed -n 's/^Depends: //p' | tr ',' '\n' | sed 's/^ *//; s/ .*//' | head -n 20
}

# Downloads PACKAGE and unpacks it into DIR.
apt_unpack() { # PACKAGE DIR
    local work
    work=$(mktemp -d "$2.deb.XXXXXX")
    RF_TEMP+=("$work")
    (cd "$work" && quietly "$work/log" apt-get "${APT[@]}" -q download "$1")
    mkdir -p "$2"
    dpkg-deb -x "$work"/*.deb "$2"
    rm -rf "$work"
}

# Sorts out of an unpacked kernel package the modules NAME... with what they depend on, unpacked, into OUT,
# in the order in which they load (file order).
kernel_modules() { # ROOT VERSION OUT NAME...
    local root=$1 version=$2 out=$3 module path base
    shift 3
    need depmod kmod
    [ -d "$root/lib/modules" ] || ln -s usr/lib "$root/lib"
    depmod -b "$root" "$version"
    mkdir -p "$out"
    for module in "$@"; do
        # A name that this kernel has built in, or spells otherwise, has nothing to load.
        modprobe -d "$root" -S "$version" --show-depends "$module" 2>/dev/null || true
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r path; do
        base=${path##*/}
        case $base in
            *.xz) xz -dc "$path" >"$out/${base%.xz}" ;;
            *.zst) zstd -qdc "$path" >"$out/${base%.zst}" ;;
            *) cp "$path" "$out/$base" ;;
        esac
        base=${base%.xz}
        printf '%s\n' "${base%.zst}" >>"$out/order"
    done
    [ -s "$out/order" ] || die "kernel $version holds none of the modules $*"
}

# Downloads the upstream source of PACKAGE, by the archives of the last apt_private, and unpacks it into DIR.
apt_source() { # PACKAGE DIR
    local work orig
    work=$(mktemp -d "$2.src.XXXXXX")
    RF_TEMP+=("$work")
    mkdir -p "$work/lists/partial" "$2"
    sed -n '1s/^deb /deb-src /p' "$RF_CACHE/apt/$RF_SUITE-amd64/sources.list" >"$work/sources.list"
    (cd "$work" && for step in update "source --download-only $1"; do
        # shellcheck disable=SC2086
        quietly "$work/log" apt-get "${APT[@]}" -o "Dir::Etc::sourcelist=$work/sources.list" -o "Dir::State::Lists=$work/lists" -q $step
    done)
    orig=$(echo "$work"/*.orig.tar.*)
    tar -x -f "$orig" --strip-components=1 --no-same-owner -C "$2"
    rm -rf "$work"
}

now_ms() { date +%s%3N; }

# The first free TCP port of the loopback from FIRST on.
free_port() { # FIRST
    python3 - "$1" <<'END'
import socket, sys
for port in range(int(sys.argv[1]), 65536):
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            continue
        print(port)
        sys.exit(0)
sys.exit("no free port")
END
}

# Writes FOLDER/ssh_config, with which "ssh -F FOLDER/ssh_config ringfort" reaches the server whose keys
# are in the folder (see scripts/seed) through a forwarded port, and nobody who only pretends to be it.
ssh_config() { # FOLDER PORT
    printf '[127.0.0.1]:%s %s\n' "$2" "$(cat "$1/host_ed25519.pub")" >"$1/known_hosts"
    cat >"$1/ssh_config" <<END
Host ringfort
    HostName 127.0.0.1
    Port $2
    User root
    IdentityFile "$1/id_ed25519"
    IdentitiesOnly yes
    UserKnownHostsFile "$1/known_hosts"
    StrictHostKeyChecking yes
    ConnectTimeout 120
    LogLevel ERROR
END
}

# The engine that a machine was run by, from its --stats file.
stats_engine() { # FILE OTHERWISE
    python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["engine"])' "$1" 2>/dev/null || echo "$2"
}
