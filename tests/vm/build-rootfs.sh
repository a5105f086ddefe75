#!/bin/bash
# Make the root image for what needs a whole Debian in the VM: QEMU 11.1 (trixie-backports) and python3 on Debian trixie.
#   build-rootfs.sh
# Result: $AIRLIFT_VM_CACHE/rootfs.img (ext4, mounted read-only). Made again only when this script changed. The mirror is the one
# that this machine's apt uses. Needs root (debootstrap does). About 1 minute, 300 MB.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${AIRLIFT_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/airlift-vm}
work=$cache/build/rootfs
image=$cache/rootfs.img
log=$work/log
fail() { echo "vm: $*" >&2; exit 1; }
site() { apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | awk -v r="$1" '$2 == r { print $1; exit }'; }
mkdir -p "$work"
exec 9> "$work/lock"; flock 9       # two at once wait for each other
started=$(date +%s)
key=$(sha256sum < "$0" | cut -c1-16)
[ -f "$image" ] && [ "$(cat "$image.key" 2> /dev/null)" = "$key" ] && exit 0

command -v apt-get > /dev/null || fail "the root image is made of Debian's packages, and there is no apt-get here"
[ "$(id -u)" = 0 ] || fail "debootstrap needs root"
mirror=$(site bookworm); security=$(site bookworm-security)
[ -n "$mirror" ] && [ -n "$security" ] || fail "this machine's apt names no mirror for Debian bookworm"
"$here/install-tools.sh" rootfs

root=$work/root
rm -rf "$root"
trap 'rm -rf "$root" "$image.new"' EXIT
say() { echo "vm: [$(($(date +%s) - started)) s] $*"; }
logged() { "$@" >> "$log" 2>&1 || { tail -5 "$log" >&2; fail "failed: $*"; }; }
inside() { logged chroot "$root" env DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@"; }
: > "$log"
say "making the root image (debootstrap trixie, QEMU from trixie-backports; the log is $log)"
logged debootstrap --variant=minbase trixie "$root" "$mirror"
cat > "$root/etc/apt/sources.list" <<S
deb $mirror trixie main
deb $mirror trixie-backports main
deb $security trixie-security main
S
inside apt-get -q update
inside apt-get -q -y -t trixie-backports install --no-install-recommends qemu-system-x86 seabios ipxe-qemu python3
inside apt-get clean
rm -rf "$root"/var/lib/apt/lists/* "$root"/usr/share/doc "$root"/usr/share/man "$root"/usr/share/locale
mkdir -p "$root/mnt"
version=$(chroot "$root" qemu-system-x86_64 --version | head -1)
logged mkfs.ext4 -q -O ^has_journal -d "$root" "$image.new" 900M
mv "$image.new" "$image"
echo "$key" > "$image.key"
say "root image: $(du -m "$image" | cut -f1) MB, $version"
