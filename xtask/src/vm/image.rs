//! The initramfs: files for the VM, with the shared libraries that their programs need, as a cpio
//! archive in the `newc` format.
//!
//! Not checked: that a program can run on the VM's kernel, and that all files fit into its memory.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;

/// What is in the VM's first file system, by its path there without the leading `/`.
///
/// Sorted, because a folder must come before what is in it.
#[derive(Debug, Default, Clone)]
pub(crate) struct Image {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone)]
enum Entry {
    Folder,
    /// The file's contents are read when the archive is written.
    File {
        from: PathBuf,
        mode: u32,
    },
    Text(String),
}

impl Image {
    /// Puts the file `from` at `to`, an absolute path in the VM.
    pub(crate) fn file(&mut self, from: &Path, to: &str) {
        self.put(to, Entry::File { from: from.to_owned(), mode: FILE });
    }

    /// Puts the script or program `from` at `to`, and the shared libraries that it names where it looks for them.
    pub(crate) fn program(&mut self, from: &Path, to: &str) -> Result<(), String> {
        for library in libraries(from)? {
            let path = Path::new(&library).to_owned();
            self.put(&library, Entry::File { from: path, mode: PROGRAM });
        }
        self.put(to, Entry::File { from: from.to_owned(), mode: PROGRAM });
        Ok(())
    }

    /// Puts a text at `to`.
    pub(crate) fn text(&mut self, to: &str, text: impl Into<String>) {
        self.put(to, Entry::Text(text.into()));
    }

    fn put(&mut self, to: &str, entry: Entry) {
        let to = to.trim_start_matches('/');
        for (at, _) in to.match_indices('/') {
            self.entries.entry(to[..at].to_owned()).or_insert(Entry::Folder);
        }
        self.entries.insert(to.to_owned(), entry);
    }

    /// Writes the archive to the file `to`.
    pub(crate) fn write(&self, to: &Path) -> Result<(), String> {
        let fail = |e: io::Error| format!("{}: {e}", to.display());
        let mut out = io::BufWriter::new(fs::File::create(to).map_err(fail)?);
        for (number, (name, entry)) in (1u32..).zip(&self.entries) {
            match entry {
                Entry::Folder => member(&mut out, number, name, FOLDER, b"").map_err(fail)?,
                Entry::Text(text) => member(&mut out, number, name, FILE, text.as_bytes()).map_err(fail)?,
                Entry::File { from, mode } => {
                    let bytes = fs::read(from).map_err(|e| format!("{}: {e}", from.display()))?;
                    member(&mut out, number, name, *mode, &bytes).map_err(fail)?;
                }
            }
        }
        member(&mut out, 0, "TRAILER!!!", 0, b"").map_err(fail)?;
        out.flush().map_err(fail)
    }
}

/// One member: a header of hexadecimal fields, the name with a NUL, the bytes; name and bytes padded to 4.
fn member(out: &mut impl Write, number: u32, name: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let size = u32::try_from(bytes.len()).map_err(|_| io::Error::other(format!("{name}: above 4 GiB")))?;
    let name_size = u32::try_from(name.len() + 1).map_err(|_| io::Error::other("a name above 4 GiB"))?;
    write!(out, "070701")?;
    // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    for field in [number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        write!(out, "{field:08X}")?;
    }
    const HEADER: usize = 6 + 13 * 8;
    out.write_all(name.as_bytes())?;
    out.write_all(&[0; 4][..1 + padding(HEADER + name.len() + 1)])?;
    out.write_all(bytes)?;
    out.write_all(&[0; 4][..padding(bytes.len())])
}

fn padding(length: usize) -> usize {
    length.next_multiple_of(4) - length
}

/// The absolute paths of the shared libraries that a program needs, its loader included. None for a script.
fn libraries(program: &Path) -> Result<Vec<String>, String> {
    // `cargo run` sets LD_LIBRARY_PATH; the VM does not have those folders.
    let output = Command::new("ldd")
        .arg(program)
        .env_remove("LD_LIBRARY_PATH")
        .output()
        .map_err(|e| format!("ldd: {e}; it says which libraries a program needs"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && !text.contains("not a dynamic") && !said.contains("not a dynamic") {
        return Err(format!("ldd {}: {}", program.display(), said.trim()));
    }
    named(&text).map_err(|e| format!("{}: {e}", program.display()))
}

/// The paths in what `ldd` prints.
fn named(ldd: &str) -> Result<Vec<String>, String> {
    let mut paths = Vec::new();
    for line in ldd.lines().map(str::trim) {
        let target = line.split_once(" => ").map_or(line, |(_, target)| target);
        if target.starts_with("not found") {
            return Err(format!("a library is missing on this machine: {line}"));
        }
        if target.starts_with('/') {
            paths.push(target.split(" (").next().unwrap_or(target).to_owned());
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_those_with_a_path_and_the_loader() {
        let ldd = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(named(ldd).unwrap(), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert_eq!(named("\tnot a dynamic executable\n").unwrap(), <[&str; 0]>::default());
        assert_eq!(named("\tstatically linked\n").unwrap(), <[&str; 0]>::default());
        assert!(named("\tlibx.so => not found\n").unwrap_err().contains("libx.so"));
    }

    #[test]
    fn a_folder_comes_before_what_is_in_it() {
        let mut image = Image::default();
        image.text("/vm/run", "true");
        image.text("/vm/bin/x", "");
        assert_eq!(image.entries.keys().collect::<Vec<_>>(), ["vm", "vm/bin", "vm/bin/x", "vm/run"]);
    }

    #[test]
    fn every_member_begins_and_ends_on_four_bytes() {
        // A wrong padding is what the kernel refuses as a broken archive.
        for name in ["a", "ab", "abc", "abcd"] {
            for bytes in [&b""[..], b"1", b"12", b"123", b"1234"] {
                let mut out = Vec::new();
                member(&mut out, 7, name, FILE, bytes).unwrap();
                let data = (110 + name.len() + 1).next_multiple_of(4);
                assert_eq!(out.len(), data + bytes.len().next_multiple_of(4));
                assert_eq!(&out[..14], b"07070100000007");
                assert_eq!(&out[54..62], format!("{:08X}", bytes.len()).as_bytes());
                assert_eq!(&out[110..110 + name.len() + 1], format!("{name}\0").as_bytes());
                assert_eq!(&out[data..data + bytes.len()], bytes);
            }
        }
    }
}
