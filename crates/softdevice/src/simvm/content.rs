//! What guest pages hold: a function of seed, page and step, so that every page can be checked from
//! the counters alone.
//!
//! Not random in any strong sense: it only has to differ wherever page or step differ.

/// Bytes of a guest page.
pub(super) const PAGE: usize = 4096;
/// [`PAGE`] as an address distance.
pub(super) const PAGE_BYTES: u64 = 4096;
/// The step of pages that are filled at boot and never written again.
pub(super) const BOOT: u64 = u64::MAX;

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// A well-mixed word of `value`.
pub(super) const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(GOLDEN);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Fills `page` with what page number `index` holds after step `step` wrote it.
pub(super) fn fill_page(page: &mut [u8; PAGE], seed: u64, index: u64, step: u64) {
    let mut word = mix(seed ^ mix(index ^ mix(step)));
    for bytes in page.as_chunks_mut::<8>().0 {
        word = word.wrapping_add(GOLDEN);
        let mixed = (word ^ (word >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        *bytes = (mixed ^ (mixed >> 29)).to_le_bytes();
    }
}

/// The order in which one vCPU writes its pages: a permutation of `0..pages`, again and again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order {
    pages: u64,
    stride: u64,
    inverse: u64,
    start: u64,
}

impl Order {
    /// The order of a vCPU with this many pages (at least 1, below 2^31) and this seed.
    pub(super) fn new(pages: u64, seed: u64) -> Self {
        let mut stride = mix(seed) % pages;
        let inverse = loop {
            if let Some(inverse) = inverse(stride, pages) {
                break inverse;
            }
            // 1 is its own inverse for every number of pages, so this ends.
            stride = (stride + 1) % pages;
        };
        Self { pages, stride, inverse, start: mix(!seed) % pages }
    }

    /// The page that step `step` writes.
    pub(super) const fn page(&self, step: u64) -> u64 {
        (step % self.pages * self.stride + self.start) % self.pages
    }

    /// The last step below `steps` that wrote `page`; `None` before the first.
    pub(super) const fn last_step(&self, page: u64, steps: u64) -> Option<u64> {
        let first = (page + self.pages - self.start) % self.pages * self.inverse % self.pages;
        if first >= steps {
            return None;
        }
        Some(first + (steps - 1 - first) / self.pages * self.pages)
    }
}

/// The number whose product with `value` is 1 modulo `modulus`, by Euclid's algorithm.
fn inverse(value: u64, modulus: u64) -> Option<u64> {
    let (mut r, mut next_r) = (i128::from(modulus), i128::from(value));
    let (mut t, mut next_t) = (0_i128, 1_i128);
    while next_r != 0 {
        let quotient = r / next_r;
        (r, next_r) = (next_r, r - quotient * next_r);
        (t, next_t) = (next_t, t - quotient * next_t);
    }
    if modulus == 1 {
        return Some(0);
    }
    (r == 1).then(|| u64::try_from(t.rem_euclid(i128::from(modulus))).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_written_once_in_each_round_and_its_last_step_is_known() {
        for pages in [1, 2, 3, 7, 12, 64, 1000] {
            let order = Order::new(pages, pages ^ 0xabc);
            let mut last = vec![None; usize::try_from(pages).unwrap()];
            for step in 0..3 * pages + 1 {
                for (page, last) in last.iter().enumerate() {
                    assert_eq!(order.last_step(page as u64, step), *last, "{pages} pages, step {step}");
                }
                let page = usize::try_from(order.page(step)).unwrap();
                assert!(last[page].is_none_or(|before| before + pages == step));
                last[page] = Some(step);
            }
        }
    }

    #[test]
    fn content_differs_by_page_and_step() {
        let page = |seed, index, step| {
            let mut page = [0; PAGE];
            fill_page(&mut page, seed, index, step);
            page
        };
        assert_eq!(page(1, 2, 3), page(1, 2, 3));
        for other in [page(0, 2, 3), page(1, 3, 3), page(1, 2, 4)] {
            assert_ne!(page(1, 2, 3), other);
        }
    }
}
