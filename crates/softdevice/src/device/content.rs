//! What internal memory holds: a function of seed and tick, so that any device can recompute and
//! compare all of it.
//!
//! Step `k` of the dirtier rewrites one page with content of version `k`; the order visits every page
//! once before any page again. A page's version at tick `T` follows in closed form.

/// Bytes of a page of internal memory.
pub(crate) const PAGE: usize = 4096;

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Writes the content of `page` in `version` to `out`, a page. No two pages or versions share it.
pub(crate) fn fill_page(seed: u64, page: usize, version: u64, out: &mut [u8]) {
    let base = mix(mix(mix(seed).wrapping_add(page as u64)).wrapping_add(version));
    let mut at = base;
    for word in out.as_chunks_mut::<8>().0 {
        at = at.wrapping_add(GAMMA);
        // One multiplication is enough to make words that differ; this runs over gigabytes.
        let value = (at ^ (at >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        *word = (value ^ (value >> 29)).to_le_bytes();
    }
}

/// What a page with this checksum adds to the digest of all of memory.
pub(crate) const fn share(page: usize, crc: u64) -> u64 {
    mix(crc ^ (page as u64 + 1).wrapping_mul(GAMMA))
}

/// The order in which pages are rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pages: u64,
    stride: u64,
    inverse: u64,
    offset: u64,
}

impl Order {
    /// For `pages` pages, above 0.
    pub(crate) fn new(seed: u64, pages: usize) -> Self {
        let pages = pages as u64;
        // A step of about 0.62 of the whole scatters; the seed moves it, coprimality makes it a permutation.
        let mut stride = (pages / 8 * 5 + mix(seed) % (pages / 8 + 1)).max(1);
        let inverse = loop {
            if let Some(inverse) = inverse(stride, pages) {
                break inverse;
            }
            stride += 1;
        };
        Self { pages, stride: stride % pages, inverse, offset: mix(seed ^ GAMMA) % pages }
    }

    /// The page that step `step`, counted from 1, rewrites.
    pub(crate) fn page(&self, step: u64) -> usize {
        let place = u128::from((step - 1) % self.pages) * u128::from(self.stride) + u128::from(self.offset);
        // Below the number of pages, which came from a usize.
        usize::try_from(place % u128::from(self.pages)).unwrap_or(0)
    }

    /// The version that `page` has when `tick` steps are done; 0: as it was made.
    pub(crate) fn version(&self, page: usize, tick: u64) -> u64 {
        let back = (page as u64 + self.pages - self.offset) % self.pages;
        let place = u128::from(back) * u128::from(self.inverse) % u128::from(self.pages);
        let first = u64::try_from(place).unwrap_or(0) + 1;
        if tick < first { 0 } else { first + (tick - first) / self.pages * self.pages }
    }
}

/// The number whose product with `value` is 1 modulo `modulus`; `None` when they share a factor.
fn inverse(value: u64, modulus: u64) -> Option<u64> {
    let m = i128::from(modulus);
    let (mut old_r, mut r) = (i128::from(value), m);
    let (mut old_s, mut s) = (1_i128, 0_i128);
    while r != 0 {
        let quotient = old_r / r;
        (old_r, r) = (r, old_r - quotient * r);
        (old_s, s) = (s, old_s - quotient * s);
    }
    if old_r != 1 {
        return None;
    }
    u64::try_from(old_s.rem_euclid(m)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_cycle_visits_every_page_once_and_versions_follow() {
        for (seed, pages) in [(1, 1), (2, 2), (3, 7), (4, 64), (5, 1000)] {
            let order = Order::new(seed, pages);
            let mut versions = vec![0; pages];
            for cycle in 0..3 {
                let mut visited = BTreeSet::new();
                for i in 1..=pages as u64 {
                    let step = cycle * pages as u64 + i;
                    let page = order.page(step);
                    assert!(visited.insert(page), "{pages} pages: {page} twice in a cycle");
                    versions[page] = step;
                    let all: Vec<_> = (0..pages).map(|p| order.version(p, step)).collect();
                    assert_eq!(all, versions, "{pages} pages after step {step}");
                }
            }
        }
    }

    #[test]
    fn no_page_repeats_another_page_or_version() {
        let mut seen = BTreeSet::new();
        let mut page = [0; PAGE];
        for seed in 0..3 {
            for index in 0..20 {
                for version in 0..20 {
                    fill_page(seed, index, version, &mut page);
                    assert!(seen.insert(page.to_vec()));
                }
            }
        }
    }
}
