//! Mappings, and the accesses to them. All `unsafe` code of this crate is in this file.
//!
//! A mapping is only ever seen as a slice of atomic integers, and copied word by word with relaxed
//! atomic accesses: two threads of this process that copy in and out at once are then no data race,
//! and the compiler may neither repeat a read nor assume that two reads agree. Words that are aligned
//! to 8 bytes never tear. Two accesses of different sizes to the same word, and writes by another
//! process, are outside of what Rust's memory model describes; the processor's rules hold for them,
//! as for every shared mapping.
#![expect(unsafe_code, reason = "mmap, munmap and the views of a mapping as atomics: the crate's purpose")]

use crate::MemoryError;
use rustix::fs::SeekFrom;
use rustix::mm::{MapFlags, ProtFlags};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading; a write is refused.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}

/// A piece of a file in this process's memory, shared with all who map the file. Clones are the same
/// mapping; it ends with the last of them. Offsets are from the mapping's start, in bytes.
#[derive(Clone, Debug)]
pub struct Mapping(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    start: NonNull<u8>,
    len: usize,
    access: Access,
    /// The file behind it and where in it the mapping begins, where the file can be asked what it holds.
    file: Option<(Arc<OwnedFd>, u64)>,
}

// SAFETY: `start` is only used through atomics (which any thread may use at any time) and in `drop`,
// which has the value alone.
unsafe impl Send for Inner {}
// SAFETY: as for `Send`: every access through a shared reference is atomic.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: `start` and `len` are those of a mapping that `of_file` made and that nothing else
        // ends; all views of it borrow `self`, so none is left.
        let result = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "munmap of an own mapping: {result:?}");
    }
}

impl Inner {
    fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: `start` is valid for `len` bytes for as long as `self` lives. AtomicU8 has the size
        // and alignment of a byte and allows writes by others behind a shared reference. In a mapping
        // that is read-only nothing stores: `writable` comes before each store.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len) }
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: as `bytes`; a mapping begins on a page, so it is aligned for words, and only whole
        // words within `len` are in the slice.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / 8) }
    }

    fn halves(&self) -> &[AtomicU32] {
        // SAFETY: as `words`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / 4) }
    }

    fn range(&self, offset: u64, length: usize) -> Result<usize, MemoryError> {
        let out = || MemoryError::OutOfBounds { offset, length: length as u64, size: self.len as u64 };
        let start = usize::try_from(offset).map_err(|_| out())?;
        match start.checked_add(length) {
            Some(end) if end <= self.len => Ok(start),
            _ => Err(out()),
        }
    }

    fn aligned(&self, offset: u64, size: usize) -> Result<usize, MemoryError> {
        let start = self.range(offset, size)?;
        if !start.is_multiple_of(size) {
            return Err(MemoryError::Misaligned { offset, align: size as u64 });
        }
        Ok(start / size)
    }

    const fn writable(&self) -> Result<(), MemoryError> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(MemoryError::ReadOnly),
        }
    }

    fn word(&self, offset: u64) -> Result<&AtomicU64, MemoryError> {
        Ok(&self.words()[self.aligned(offset, 8)?])
    }

    fn half(&self, offset: u64) -> Result<&AtomicU32, MemoryError> {
        Ok(&self.halves()[self.aligned(offset, 4)?])
    }

    /// Cuts `start..start + length`, which is within the mapping, into bytes, words, bytes.
    fn split(&self, start: usize, length: usize) -> (&[AtomicU8], &[AtomicU64], &[AtomicU8]) {
        let end = start + length;
        let first = start.next_multiple_of(8).min(end);
        let last = first + (end - first) / 8 * 8;
        (&self.bytes()[start..first], &self.words()[first / 8..last / 8], &self.bytes()[last..end])
    }
}

impl Mapping {
    /// Maps `length` bytes from `offset`, a multiple of the page size, of a device's descriptor, whose
    /// size the system does not know: a part of a region of a VFIO device.
    ///
    /// The driver answers for the range: an access to what it later takes away raises SIGBUS.
    ///
    /// # Errors
    /// When the range is empty or misaligned, or the driver refuses.
    pub fn of_device(
        fd: BorrowedFd<'_>,
        offset: u64,
        length: u64,
        access: Access,
    ) -> Result<Self, MemoryError> {
        Self::of_file(fd, offset, length, access, None)
    }

    /// Maps a file that can be asked where it holds data.
    pub(crate) fn of_shared(
        fd: &Arc<OwnedFd>,
        offset: u64,
        length: u64,
        access: Access,
    ) -> Result<Self, MemoryError> {
        Self::of_file(fd.as_fd(), offset, length, access, Some((Arc::clone(fd), offset)))
    }

    fn of_file(
        fd: BorrowedFd<'_>,
        offset: u64,
        length: u64,
        access: Access,
        file: Option<(Arc<OwnedFd>, u64)>,
    ) -> Result<Self, MemoryError> {
        let page = rustix::param::page_size() as u64;
        if !offset.is_multiple_of(page) {
            return Err(MemoryError::Misaligned { offset, align: page });
        }
        let len = match usize::try_from(length) {
            Ok(0) => return Err(MemoryError::Empty),
            Ok(len) if isize::try_from(len).is_ok() => len,
            _ => return Err(MemoryError::OutOfBounds { offset, length, size: isize::MAX as u64 }),
        };
        let prot = match access {
            Access::ReadOnly => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        // SAFETY: without a wanted address the system chooses one that nothing else uses.
        let address =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, fd, offset) }
                .map_err(MemoryError::system("mmap"))?;
        let start = NonNull::new(address.cast::<u8>())
            .ok_or(MemoryError::System { operation: "mmap", errno: rustix::io::Errno::FAULT })?;
        Ok(Self(Arc::new(Inner { start, len, access, file })))
    }

    /// Where the first byte of `offset..offset + length` is that may be other than zero; `None` when the
    /// file holds nothing there, so that all of it reads as zero. Nothing is brought into memory by
    /// asking. A file that cannot say where it holds data answers `offset`.
    ///
    /// Moves the file's own position, which nobody who maps the file uses.
    #[must_use]
    pub fn next_data(&self, offset: u64, length: u64) -> Option<u64> {
        let Some((file, begin)) = &self.0.file else { return Some(offset) };
        let Some(at) = begin.checked_add(offset) else { return Some(offset) };
        match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(found) if found >= at => {
                let ahead = found - at;
                (ahead < length).then(|| offset.saturating_add(ahead))
            }
            // No data from here to the end.
            Err(rustix::io::Errno::NXIO) => None,
            Ok(_) | Err(_) => Some(offset),
        }
    }

    /// Its length in bytes; above 0.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> u64 {
        self.0.len as u64
    }

    /// What it is for.
    #[must_use]
    pub fn access(&self) -> Access {
        self.0.access
    }

    /// Where it begins in this process, for handing it to the kernel as memory for DMA. Valid for as
    /// long as a clone of the mapping lives; what is read there can change at any moment.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.start.as_ptr()
    }

    /// Copies bytes out. Aligned words of 8 bytes do not tear; the whole is no snapshot.
    ///
    /// # Errors
    /// When the range is not within the mapping; `buf` is then untouched.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let start = self.0.range(offset, buf.len())?;
        let (head, words, tail) = self.0.split(start, buf.len());
        let (to_head, rest) = buf.split_at_mut(head.len());
        let (to_words, to_tail) = rest.split_at_mut(words.len() * 8);
        for (from, to) in head.iter().zip(to_head).chain(tail.iter().zip(to_tail)) {
            *to = from.load(Ordering::Relaxed);
        }
        let (to, _) = to_words.as_chunks_mut::<8>();
        let mut from_blocks = words.chunks_exact(8);
        let mut to_blocks = to.chunks_exact_mut(8);
        // Eight words at a time: the compiler does not unroll atomics, and a page is 512 of them.
        for (from, to) in from_blocks.by_ref().zip(to_blocks.by_ref()) {
            for i in 0..8 {
                to[i] = from[i].load(Ordering::Relaxed).to_ne_bytes();
            }
        }
        for (from, to) in from_blocks.remainder().iter().zip(to_blocks.into_remainder()) {
            *to = from.load(Ordering::Relaxed).to_ne_bytes();
        }
        Ok(())
    }

    /// Copies bytes in. Aligned words of 8 bytes do not tear; the order in which others see them is
    /// not defined: publish with [`store_u64`](Self::store_u64).
    ///
    /// # Errors
    /// When the range is not within the mapping, or it is read-only; nothing is then written.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.0.writable()?;
        let start = self.0.range(offset, data.len())?;
        let (head, words, tail) = self.0.split(start, data.len());
        let (from_head, rest) = data.split_at(head.len());
        let (from_words, from_tail) = rest.split_at(words.len() * 8);
        for (to, from) in head.iter().zip(from_head).chain(tail.iter().zip(from_tail)) {
            to.store(*from, Ordering::Relaxed);
        }
        let (from, _) = from_words.as_chunks::<8>();
        let mut to_blocks = words.chunks_exact(8);
        let mut from_blocks = from.chunks_exact(8);
        for (to, from) in to_blocks.by_ref().zip(from_blocks.by_ref()) {
            for i in 0..8 {
                to[i].store(u64::from_ne_bytes(from[i]), Ordering::Relaxed);
            }
        }
        for (to, from) in to_blocks.remainder().iter().zip(from_blocks.remainder()) {
            to.store(u64::from_ne_bytes(*from), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Sets `length` bytes to `byte`.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn fill(&self, offset: u64, length: u64, byte: u8) -> Result<(), MemoryError> {
        self.0.writable()?;
        let out = MemoryError::OutOfBounds { offset, length, size: self.len() };
        let length = usize::try_from(length).map_err(|_| out)?;
        let start = self.0.range(offset, length)?;
        let (head, words, tail) = self.0.split(start, length);
        for to in head.iter().chain(tail) {
            to.store(byte, Ordering::Relaxed);
        }
        for to in words {
            to.store(u64::from_ne_bytes([byte; 8]), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Copies `length` bytes from `offset` to `to_offset` of another mapping, which may be of the same
    /// file; what overlaps is then undefined in content.
    ///
    /// # Errors
    /// When a range is not within its mapping, or `to` is read-only; nothing is then written.
    pub fn copy_to(&self, offset: u64, to: &Self, to_offset: u64, length: u64) -> Result<(), MemoryError> {
        to.0.writable()?;
        for (inner, at) in [(&self.0, offset), (&to.0, to_offset)] {
            let out = MemoryError::OutOfBounds { offset: at, length, size: inner.len as u64 };
            inner.range(at, usize::try_from(length).map_err(|_| out)?)?;
        }
        let mut bounce = [0_u8; 4096];
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(4096);
            // At most 4096, so it fits.
            let part = &mut bounce[..usize::try_from(piece).unwrap_or(4096)];
            self.read(offset + done, part)?;
            to.write(to_offset + done, part)?;
            done += piece;
        }
        Ok(())
    }

    /// Reads the word at `offset`, a multiple of 8: what its writer stored before is seen (acquire).
    ///
    /// # Errors
    /// When the word is misaligned or not within the mapping.
    pub fn load_u64(&self, offset: u64) -> Result<u64, MemoryError> {
        Ok(self.0.word(offset)?.load(Ordering::Acquire))
    }

    /// Writes the word at `offset`, a multiple of 8: who reads it sees all that was stored before
    /// (release).
    ///
    /// # Errors
    /// When the word is misaligned or not within the mapping, or it is read-only.
    pub fn store_u64(&self, offset: u64, value: u64) -> Result<(), MemoryError> {
        self.0.writable()?;
        self.0.word(offset)?.store(value, Ordering::Release);
        Ok(())
    }

    /// As [`load_u64`](Self::load_u64), 4 bytes.
    ///
    /// # Errors
    /// When the integer is misaligned or not within the mapping.
    pub fn load_u32(&self, offset: u64) -> Result<u32, MemoryError> {
        Ok(self.0.half(offset)?.load(Ordering::Acquire))
    }

    /// As [`store_u64`](Self::store_u64), 4 bytes.
    ///
    /// # Errors
    /// When the integer is misaligned or not within the mapping, or it is read-only.
    pub fn store_u32(&self, offset: u64, value: u32) -> Result<(), MemoryError> {
        self.0.writable()?;
        self.0.half(offset)?.store(value, Ordering::Release);
        Ok(())
    }

    /// Exchanges the word at `offset`; returns the old one. Sequentially consistent.
    ///
    /// # Errors
    /// As [`store_u64`](Self::store_u64).
    pub fn swap_u64(&self, offset: u64, value: u64) -> Result<u64, MemoryError> {
        self.0.writable()?;
        Ok(self.0.word(offset)?.swap(value, Ordering::SeqCst))
    }

    /// Sets bits in the word at `offset`; returns the old one. Sequentially consistent.
    ///
    /// # Errors
    /// As [`store_u64`](Self::store_u64).
    pub fn fetch_or_u64(&self, offset: u64, bits: u64) -> Result<u64, MemoryError> {
        self.0.writable()?;
        Ok(self.0.word(offset)?.fetch_or(bits, Ordering::SeqCst))
    }

    /// Adds to the word at `offset`, wrapping; returns the old one. Sequentially consistent.
    ///
    /// # Errors
    /// As [`store_u64`](Self::store_u64).
    pub fn fetch_add_u64(&self, offset: u64, value: u64) -> Result<u64, MemoryError> {
        self.0.writable()?;
        Ok(self.0.word(offset)?.fetch_add(value, Ordering::SeqCst))
    }
}
