//! Bitmaps that the kernel fills in with pages of memory to themselves.
//!
//! Where an entry of a page table, or a page of a device, reaches beyond the range of a request, kernels
//! set bits up to the end of the last page of memory of the bitmap. Nothing else may lie there.

use airlift_core::Errno;

/// A zeroed bitmap that begins on a page of memory, and with nothing behind it on its last page.
#[derive(Debug)]
pub(super) struct PageBitmap {
    buffer: Vec<u64>,
    skip: usize,
    words: usize,
}

impl PageBitmap {
    /// With a bit for each page of `page_size` bytes of `length` bytes.
    ///
    /// # Errors
    /// EINVAL when that is no page size, ENOMEM when there is no memory for it.
    pub(super) fn new(length: u64, page_size: u64) -> Result<Self, Errno> {
        if !page_size.is_power_of_two() {
            return Err(Errno::EINVAL);
        }
        let words = usize::try_from(length.div_ceil(page_size).div_ceil(64)).map_err(|_| Errno::ENOMEM)?;
        let page = rustix::param::page_size();
        let in_page = page / size_of::<u64>();
        let whole = words.checked_next_multiple_of(in_page).and_then(|words| words.checked_add(in_page));
        let whole = whole.ok_or(Errno::ENOMEM)?;
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(whole).map_err(|_| Errno::ENOMEM)?;
        buffer.resize(whole, 0_u64);
        let skip = buffer.as_ptr().align_offset(page);
        if skip >= in_page {
            return Err(Errno::ENOMEM);
        }
        Ok(Self { buffer, skip, words })
    }

    /// Where it begins. What is behind it, up to the end of its last page of memory, is nobody's.
    pub(super) fn address(&mut self) -> u64 {
        self.buffer.get_mut(self.skip..).unwrap_or_default().as_mut_ptr().expose_provenance() as u64
    }

    /// Its words, without those that belong to no page of the range.
    pub(super) fn words(&self) -> &[u64] {
        self.buffer.get(self.skip..self.skip + self.words).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_has_its_pages_of_memory_for_itself() {
        let page = rustix::param::page_size();
        for pages in [1, 64, 65, page as u64 * 8 - 1, page as u64 * 8, page as u64 * 8 + 1] {
            let mut bitmap = PageBitmap::new(pages * 4096, 4096).unwrap();
            assert_eq!(bitmap.words().len() as u64, pages.div_ceil(64));
            let begin = usize::try_from(bitmap.address()).unwrap();
            assert!(begin.is_multiple_of(page));
            let behind = (begin + bitmap.words().len() * 8).next_multiple_of(page);
            assert!(behind <= bitmap.buffer.as_ptr_range().end.addr(), "{pages} pages");
        }
    }

    #[test]
    fn a_bitmap_that_cannot_be_is_refused() {
        assert_eq!(PageBitmap::new(4096, 3).unwrap_err(), Errno::EINVAL);
        assert_eq!(PageBitmap::new(4096, 0).unwrap_err(), Errno::EINVAL);
        assert_eq!(PageBitmap::new(u64::MAX, 1).unwrap_err(), Errno::ENOMEM);
    }
}
