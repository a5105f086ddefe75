#!/bin/bash
# Build the test kernel and our own driver from Debian's source packages.
#   build-kernel.sh [6.12|7.3]        (default 6.12)
#     6.12  linux-source-6.12 from bookworm-security
#     7.3   linux-source-7.3  from trixie-backports (it has MIG_PRECOPY_INFOv2)
# Result in $AIRLIFT_VM_CACHE: bzImage-VERSION and airlift-VERSION.ko. Each is made again only when what it is made of
# changed: the kernel's configuration, or the driver's source. The mirror is the one that this machine's apt uses.
# Root is needed only where packages are missing. About 6 minutes on 2 cores the first time, 10 s for the driver alone.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kmod=$here/../kmod
version=${1:-6.12}
cache=${AIRLIFT_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/airlift-vm}
work=$cache/build/$version
jobs=${JOBS:-$(nproc)}
mkdir -p "$work"
exec 9> "$work/lock"; flock 9       # two builds of one kernel at once wait for each other
started=$(date +%s)
say() { echo "vm: [$(($(date +%s) - started)) s] $*"; }
fail() { echo "vm: $*" >&2; exit 1; }
site() { apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | awk -v r="$1" '$2 == r { print $1; exit }'; }
key() { cat "$@" | sha256sum | cut -c1-16; }

command -v apt-get > /dev/null || fail "the test kernel is built from Debian's source packages, and there is no apt-get here; AIRLIFT_VM=skip leaves the VM out"
case $version in
6.12) suite=bookworm-security; mirror=$(site bookworm-security) ;;
7.*) suite=trixie-backports; mirror=$(site bookworm) ;;
*) fail "no source package is known for kernel $version (6.12 and 7.3 are)" ;;
esac

"$here/install-tools.sh" build

source=$work/linux-source-$version
obj=$work/obj
kernel_key=$(key "$here/kernel.config" "$0")
module_key=$(key "$kmod"/*.c "$kmod"/*.h "$kmod"/Kbuild)-$kernel_key

build_kernel() {
	[ -n "$mirror" ] || fail "this machine's apt names no mirror for Debian bookworm; AIRLIFT_VM=skip leaves the VM out"
	# The source package comes through a private apt state: the machine's own sources stay as they are.
	local apt_state=$work/apt
	mkdir -p "$apt_state/lists/partial" "$apt_state/cache/archives/partial"
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" > "$apt_state/sources.list"
	local apt=(apt-get -q -o Dir::State::lists="$apt_state/lists" -o Dir::Cache="$apt_state/cache"
		-o Dir::Etc::sourcelist="$apt_state/sources.list" -o Dir::Etc::sourceparts=/dev/null -o APT::Sandbox::User=root)
	"${apt[@]}" update > "$work/apt.log" 2>&1 || { tail -5 "$work/apt.log" >&2; fail "apt cannot read $suite"; }
	(cd "$work" && "${apt[@]}" download "linux-source-$version" >> "$work/apt.log" 2>&1) || { tail -5 "$work/apt.log" >&2; fail "cannot download linux-source-$version"; }
	local package; package=$(ls "$work"/linux-source-"$version"_*.deb | tail -1)
	say "unpacking $(basename "$package")"
	mkdir -p "$work/package"
	dpkg-deb --fsys-tarfile "$package" | tar -C "$work/package" -x --wildcards '*linux-source-*.tar.xz'
	tar -C "$work" -xf "$work/package/usr/src/linux-source-$version.tar.xz"
	rm -rf "$work/package" "$package" "$apt_state"

	mkdir -p "$obj"
	make -s -C "$source" O="$obj" tinyconfig
	(cd "$obj" && "$source/scripts/kconfig/merge_config.sh" -O "$obj" -m "$obj/.config" "$here/kernel.config" > merge.log && make -s olddefconfig)
	# Without these the suite tests nothing: found now rather than after the build.
	for option in VFIO_GROUP VFIO_CONTAINER VFIO_DEVICE_CDEV IOMMUFD IOMMUFD_TEST SAMPLE_VFIO_MDEV_MTTY VFIO_MDEV MODULES \
		BLK_DEV_INITRD SERIAL_8250_CONSOLE 9P_FS VIRTIO_PCI DYNAMIC_DEBUG; do
		grep -q "^CONFIG_$option=y" "$obj/.config" || fail "kernel $version: CONFIG_$option did not survive olddefconfig"
	done
	say "building kernel $version ($(grep -c '=y$' "$obj/.config") options, $jobs jobs; the log is $work/make.log)"
	make -s -C "$source" O="$obj" -j"$jobs" bzImage modules > "$work/make.log" 2>&1 || { tail -30 "$work/make.log" >&2; fail "kernel $version does not build"; }
	cp "$obj/arch/x86/boot/bzImage" "$cache/bzImage-$version"
	cp "$obj/.config" "$cache/config-$version"
	# What the driver's build does not read goes away: gigabytes of it.
	find "$obj" \( -name '*.o' -o -name '*.a' -o -name 'vmlinux*' -o -name '.*.cmd' \) ! -path '*/scripts/*' ! -path '*/tools/*' ! -name 'vmlinux.lds' -delete
	(cd "$source" && rm -rf Documentation sound fs net drivers samples crypto lib mm security kernel/[a-l]* rust)
	echo "$kernel_key" > "$cache/bzImage-$version.key"
	say "kernel $version: $(stat -c %s "$cache/bzImage-$version") bytes"
}

build_module() {
	rm -rf "$work/kmod"; cp -r "$kmod" "$work/kmod"
	make -s -C "$source" O="$obj" M="$work/kmod" modules > "$work/kmod.log" 2>&1 || { tail -30 "$work/kmod.log" >&2; fail "the driver does not build for kernel $version"; }
	cp "$work/kmod/airlift.ko" "$cache/airlift-$version.ko"
	echo "$module_key" > "$cache/airlift-$version.key"
	say "driver for $version: $(stat -c %s "$cache/airlift-$version.ko") bytes"
}

if [ "$(cat "$cache/bzImage-$version.key" 2> /dev/null)" != "$kernel_key" ] || [ ! -d "$source" ]; then
	rm -rf "$source" "$obj"
	build_kernel
fi
[ "$(cat "$cache/airlift-$version.key" 2> /dev/null)" = "$module_key" ] || build_module
