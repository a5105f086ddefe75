#!/bin/bash
# Install what the test VM needs and this machine lacks, from Debian's packages, and say what that is.
#   install-tools.sh build      the kernel's build and QEMU, which runs it
#   install-tools.sh rootfs     what makes the root image with QEMU inside
set -euo pipefail
for_what=${1:?build or rootfs}
site() { apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | awk -v r="$1" '$2 == r { print $1; exit }'; }
apt_install() { DEBIAN_FRONTEND=noninteractive "$@" -q -y -o DPkg::Lock::Timeout=600 install --no-install-recommends "${packages[@]}"; }
log=$(mktemp); trap 'rm -f "$log"' EXIT
packages=()
need() { # PACKAGE PATH...: the package is needed if a path is missing
	local package=$1; shift
	local path
	for path; do
		case $path in
		/*) [ -e "$path" ] || { packages+=("$package"); return; } ;;
		*) command -v "$path" > /dev/null || { packages+=("$package"); return; } ;;
		esac
	done
}
install() {
	[ ${#packages[@]} = 0 ] && return
	echo "vm: installing ${packages[*]}"
	if ! apt_install apt-get > "$log" 2>&1; then
		apt-get -q update >> "$log" 2>&1 || true
		apt_install apt-get >> "$log" 2>&1 || return 1
	fi
	packages=()
}
give_up() { tail -5 "$log" >&2; echo "vm: cannot install ${packages[*]} (are you root?); AIRLIFT_VM=skip leaves the VM out" >&2; exit 1; }

case $for_what in
build)
	need build-essential gcc make
	need flex flex; need bison bison; need bc bc; need cpio cpio; need xz-utils xz; need kmod depmod
	need libelf-dev /usr/include/libelf.h
	need libssl-dev /usr/include/openssl/ssl.h
	need busybox-static /bin/busybox
	install || give_up
	need qemu-system-x86 qemu-system-x86_64
	if [ ${#packages[@]} != 0 ] && ! install; then
		# Where qemu-utils comes from backports, the release's version conflicts with it: then backports, through a private apt state.
		state=$(mktemp -d); trap 'rm -rf "$log" "$state"' EXIT
		mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
		for suite in bookworm bookworm-backports; do
			echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(site bookworm) $suite main"
		done > "$state/sources.list"
		echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(site bookworm-security) bookworm-security main" >> "$state/sources.list"
		private=(apt-get -o Dir::State::lists="$state/lists" -o Dir::Cache="$state/cache" -o Dir::Etc::sourcelist="$state/sources.list"
			-o Dir::Etc::sourceparts=/dev/null -o APT::Sandbox::User=root)
		"${private[@]}" -q update >> "$log" 2>&1 || give_up
		apt_install "${private[@]}" -t bookworm-backports >> "$log" 2>&1 || give_up
	fi
	;;
rootfs)
	need debootstrap debootstrap; need e2fsprogs mkfs.ext4
	install || give_up
	;;
*) echo "vm: $for_what: build or rootfs" >&2; exit 2 ;;
esac
