//! Capability chains, as region info and IOMMU info carry them: offsets from outside, walked with
//! bounds.

/// Most links of a chain that are followed.
const MAX_LINKS: usize = 64;

/// The answer to an info request, with its capability chain.
#[derive(Debug)]
pub(crate) struct Caps {
    bytes: Vec<u8>,
    first: usize,
}

/// What VFIO_DEVICE_GET_REGION_INFO gave.
#[derive(Debug)]
pub(crate) struct RawRegion {
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub(crate) flags: u32,
    /// Size in bytes.
    pub(crate) size: u64,
    /// Where it begins in the device's descriptor.
    pub(crate) offset: u64,
    /// Its capabilities.
    pub(crate) caps: Caps,
}

impl Caps {
    /// The chain in `words`, beginning at byte `first`; 0 means that there is none.
    pub(super) fn new(words: &[u64], first: u32) -> Self {
        Self {
            bytes: words.iter().flat_map(|w| w.to_ne_bytes()).collect(),
            first: usize::try_from(first).unwrap_or(0),
        }
    }

    fn number(&self, at: usize) -> Option<u32> {
        let bytes = self.bytes.get(at..)?.first_chunk::<4>()?;
        Some(u32::from_ne_bytes(*bytes))
    }

    /// The content of the capability `id`, from its header's end to the end of the answer.
    pub(crate) fn find(&self, id: u16) -> Option<&[u8]> {
        let mut at = self.first;
        for _ in 0..MAX_LINKS {
            if at == 0 {
                return None;
            }
            let header = self.number(at)?;
            let next = self.number(at + 4)?;
            if header & 0xffff == u32::from(id) {
                return self.bytes.get(at + 8..);
            }
            at = usize::try_from(next).ok()?;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(links: &[(u16, u32, u32)]) -> Vec<u64> {
        // Each link: id, next, and one u32 of content with padding.
        let mut words = vec![0; 2];
        for &(id, next, content) in links {
            words.push(u64::from(id) | 1 << 16 | u64::from(next) << 32);
            words.push(u64::from(content));
        }
        words
    }

    #[test]
    fn a_capability_is_found_behind_others() {
        let caps = Caps::new(&chain(&[(1, 32, 7), (2, 0, 9)]), 16);
        assert_eq!(caps.find(2).map(|c| c[0]), Some(9));
        assert_eq!(caps.find(1).map(|c| c[0]), Some(7));
        assert_eq!(caps.find(3), None);
    }

    #[test]
    fn a_chain_that_leads_nowhere_or_in_a_circle_ends() {
        assert_eq!(Caps::new(&chain(&[(1, 16, 7)]), 16).find(2), None);
        assert_eq!(Caps::new(&chain(&[(1, 0xffff_fff0, 7)]), 16).find(2), None);
        assert_eq!(Caps::new(&chain(&[]), u32::MAX).find(2), None);
        assert_eq!(Caps::new(&[], 0).find(1), None);
    }
}
