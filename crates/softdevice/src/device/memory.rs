//! Internal memory with its digest, and the comparison of it with what seed and tick say.
//!
//! The digest is the sum of what each page contributes, so that it is known at any time without a
//! pass over gigabytes. Locking is the owner's.

use super::bitmap::PageSet;
use super::content::{Order, PAGE, fill_page, share};
use super::registers::{VERIFIED_NEVER, VERIFIED_NO, VERIFIED_RUNNING, VERIFIED_YES};
use crc_fast::{CrcAlgorithm, checksum};
use std::collections::TryReserveError;
use std::ops::Range;

pub(crate) fn crc64(data: &[u8]) -> u64 {
    checksum(CrcAlgorithm::Crc64Nvme, data)
}

/// Internal memory of a device.
pub(crate) struct Memory {
    bytes: Vec<u8>,
    crcs: Vec<u64>,
    sum: u64,
    order: Order,
    seed: u64,
    tick: u64,
    check: Check,
}

/// A comparison of all of memory with seed and tick, which may go on while pages are rewritten.
struct Check {
    pass: u64,
    verdict: u64,
    checked: PageSet,
    bad_page: Option<usize>,
}

impl Memory {
    /// `pages` pages, above 0, as the seed makes them.
    pub(crate) fn new(seed: u64, pages: usize) -> Result<Self, TryReserveError> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(pages.saturating_mul(PAGE))?;
        bytes.resize(pages * PAGE, 0);
        let mut memory = Self {
            bytes,
            crcs: vec![0; pages],
            sum: 0,
            order: Order::new(seed, pages),
            seed,
            tick: 0,
            check: Check { pass: 0, verdict: VERIFIED_NEVER, checked: PageSet::empty(pages), bad_page: None },
        };
        memory.sum = (0..pages).map(|page| share(page, 0)).fold(0, u64::wrapping_add);
        memory.make(0..pages);
        Ok(memory)
    }

    /// Makes these pages as they were at first.
    pub(crate) fn make(&mut self, pages: Range<usize>) {
        for page in pages {
            fill_page(self.seed, page, 0, &mut self.bytes[page * PAGE..(page + 1) * PAGE]);
            self.measure(page);
        }
    }

    /// Takes the seed and tick of a load, or of a reset.
    pub(crate) fn adopt(&mut self, seed: u64, tick: u64) {
        self.order = Order::new(seed, self.pages());
        self.seed = seed;
        self.tick = tick;
    }

    pub(crate) const fn pages(&self) -> usize {
        self.crcs.len()
    }

    pub(crate) const fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) const fn tick(&self) -> u64 {
        self.tick
    }

    /// Digest of all pages.
    pub(crate) const fn digest(&self) -> u64 {
        self.sum
    }

    /// The content of a run of pages.
    pub(crate) fn run(&self, first: usize, length: usize) -> &[u8] {
        &self.bytes[first * PAGE..(first + length) * PAGE]
    }

    fn page(&self, page: usize) -> &[u8] {
        self.run(page, 1)
    }

    /// Brings the digest up to date with what a page holds.
    fn measure(&mut self, page: usize) {
        let crc = crc64(self.page(page));
        let old = std::mem::replace(&mut self.crcs[page], crc);
        self.sum = self.sum.wrapping_sub(share(page, old)).wrapping_add(share(page, crc));
    }

    /// Puts loaded bytes in place: `data` at `offset` of `page`, within it.
    pub(crate) fn load(&mut self, page: usize, offset: usize, data: &[u8]) {
        let at = page * PAGE + offset;
        self.bytes[at..at + data.len()].copy_from_slice(data);
        if offset + data.len() == PAGE {
            self.measure(page);
        }
    }

    /// Page and version of step `step`.
    pub(crate) fn step(&self, step: u64) -> (usize, u64) {
        (self.order.page(step), step)
    }

    /// Makes the next step of the dirtier, whose content is `content`; the page that was rewritten.
    pub(crate) fn advance(&mut self, content: &[u8]) -> usize {
        let page = self.order.page(self.tick + 1);
        // What a running comparison has not seen yet is compared before it is gone.
        if self.check.verdict == VERIFIED_RUNNING && !self.check.checked.contains(page) {
            self.compare(page, None);
        }
        self.bytes[page * PAGE..(page + 1) * PAGE].copy_from_slice(content);
        self.measure(page);
        self.tick += 1;
        page
    }

    /// Begins a comparison, in place of one that runs; its number.
    pub(crate) fn begin_check(&mut self) -> u64 {
        let pages = self.pages();
        let pass = self.check.pass + 1;
        self.check =
            Check { pass, verdict: VERIFIED_RUNNING, checked: PageSet::empty(pages), bad_page: None };
        pass
    }

    /// Ends what is known of a comparison: memory is being made anew.
    pub(crate) const fn forget_check(&mut self) {
        self.check.pass += 1;
        self.check.verdict = VERIFIED_NEVER;
        self.check.bad_page = None;
    }

    /// Whether this comparison is still the current one.
    pub(crate) const fn is_checking(&self, pass: u64) -> bool {
        self.check.pass == pass && self.check.verdict == VERIFIED_RUNNING
    }

    /// Ends a comparison of which every page was compared; `sound`: what else was to be right is.
    pub(crate) fn end_check(&mut self, sound: bool) -> (bool, Option<u64>) {
        let complete = self.check.checked.len() == self.pages();
        let good = sound && complete && self.check.bad_page.is_none();
        self.check.verdict = if good { VERIFIED_YES } else { VERIFIED_NO };
        (good, self.check.bad_page.map(|page| page as u64))
    }

    /// As the register VERIFIED says it.
    pub(crate) const fn verdict(&self) -> u64 {
        self.check.verdict
    }

    /// The versions that pages have now.
    pub(crate) fn versions(&self, pages: Range<usize>) -> Vec<u64> {
        pages.map(|page| self.order.version(page, self.tick)).collect()
    }

    /// Compares a page; `expected`: content that the caller made, for this version.
    pub(crate) fn compare(&mut self, page: usize, expected: Option<(&[u8], u64)>) {
        if self.check.checked.contains(page) {
            return;
        }
        let version = self.order.version(page, self.tick);
        let good = match expected {
            Some((content, of)) if of == version => self.page(page) == content,
            _ => {
                let mut content = [0; PAGE];
                fill_page(self.seed, page, version, &mut content);
                self.page(page) == content
            }
        };
        // A digest that does not describe the bytes would be worth nothing.
        let measured = crc64(self.page(page)) == self.crcs[page];
        self.check.checked.insert(page);
        if !(good && measured) && self.check.bad_page.is_none() {
            self.check.bad_page = Some(page);
        }
    }
}
