//! The data section of a migration region (interface v1), as a device's author describes it.

/// What can be mapped begins and ends at multiples of this.
pub(crate) const PAGE: u64 = 4096;
/// Most areas of a section that clients may map.
const MAX_AREAS: usize = 4096;

/// The data section of a migration region (interface v1). Each [`Saver::read`](crate::Saver::read) is
/// offered a buffer of its size and gives one transaction; each [`Loader::write`](crate::Loader::write) is
/// given what the client wrote as one. A section that cannot be is not served: see [`check`](Self::check).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct V1Section {
    /// Its size in bytes, 1 to [`MAX_SIZE`](Self::MAX_SIZE). A transaction is never larger.
    pub size: u64,
    /// What of it a client may map.
    pub mapping: V1Mapping,
    /// The device takes a transaction only as its source gave it, never in several rounds (V1-WHOLE):
    /// a source whose section is larger is refused before anything starts.
    ///
    /// The interface has no place for it: a client learns of it from the STATE_FORMAT extension alone. So a
    /// server without [`ServerOptions::extensions`](crate::ServerOptions::extensions) does not serve such a
    /// device ([`DescriptionError::WholeTransactions`](crate::DescriptionError::WholeTransactions)).
    pub whole_transactions: bool,
}

/// What of a data section a client may map. Where a part can be mapped the section begins at offset 4096
/// of the region; otherwise right behind the fields, at 32, which is also so when
/// [`Mapped`](Self::Mapped) finds no whole page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum V1Mapping {
    /// Nothing.
    Trapped,
    /// All whole pages of it; what is left of the last one is trapped.
    Mapped,
    /// These `(offset, length)` in bytes from the section's start, in any order: multiples of 4096 above
    /// 0, inside the section and apart from each other; at most 4096 of them.
    Sparse(Vec<(u64, u64)>),
}

/// What is wrong with a data section (V1-REGION, V1-AREAS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum V1SectionError {
    /// Its size in bytes is 0, or above [`V1Section::MAX_SIZE`].
    #[error("a data section of {0} bytes: give it 1 byte to 1 GiB")]
    Size(u64),
    /// So many areas are to be mapped.
    #[error("{0} areas of the data section: at most {MAX_AREAS} can be mapped")]
    Areas(usize),
    /// An area is empty, not made of whole pages, or not inside the section.
    #[error(
        "the area of {length} bytes at {offset:#x} is empty, not made of whole pages of 4096 bytes, or not in the data section"
    )]
    Area {
        /// Where it begins, in bytes from the section's start.
        offset: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// Two areas share a part.
    #[error("the areas at {first:#x} and {second:#x} of the data section overlap")]
    Overlap {
        /// Where the one begins, in bytes from the section's start.
        first: u64,
        /// Where the other begins.
        second: u64,
    },
}

impl V1Section {
    /// Most bytes of a section: 1 GiB.
    pub const MAX_SIZE: u64 = 1 << 30;

    /// Whether there can be such a section; the server asks the same before it serves anything.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), V1SectionError> {
        self.parts().map(drop)
    }

    /// What of it may be mapped, checked: `(offset, length)` in bytes from its start.
    pub(crate) fn parts(&self) -> Result<Vec<(u64, u64)>, V1SectionError> {
        if self.size == 0 || self.size > Self::MAX_SIZE {
            return Err(V1SectionError::Size(self.size));
        }
        let list = match &self.mapping {
            V1Mapping::Trapped => return Ok(Vec::new()),
            V1Mapping::Mapped => {
                let whole = self.size - self.size % PAGE;
                return Ok(if whole == 0 { Vec::new() } else { vec![(0, whole)] });
            }
            V1Mapping::Sparse(list) => list,
        };
        if list.len() > MAX_AREAS {
            return Err(V1SectionError::Areas(list.len()));
        }
        for &(offset, length) in list {
            let inside = offset.checked_add(length).is_some_and(|end| end <= self.size);
            if length == 0 || !inside || !offset.is_multiple_of(PAGE) || !length.is_multiple_of(PAGE) {
                return Err(V1SectionError::Area { offset, length });
            }
        }
        let mut sorted = list.clone();
        sorted.sort_unstable();
        for pair in sorted.windows(2) {
            if let &[(first, length), (second, _)] = pair
                && first + length > second
            {
                return Err(V1SectionError::Overlap { first, second });
            }
        }
        // As the device gave them: areas have no order (V1-AREAS).
        Ok(list.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(size: u64, mapping: V1Mapping) -> Result<(), V1SectionError> {
        V1Section { size, mapping, whole_transactions: false }.check()
    }

    // V1-REGION
    #[test]
    fn a_section_has_a_byte_at_least_and_a_gibibyte_at_most() {
        for mapping in [V1Mapping::Trapped, V1Mapping::Mapped, V1Mapping::Sparse(vec![])] {
            for size in [1, V1Section::MAX_SIZE] {
                assert_eq!(check(size, mapping.clone()), Ok(()));
            }
            for size in [0, V1Section::MAX_SIZE + 1, u64::MAX] {
                assert_eq!(check(size, mapping.clone()), Err(V1SectionError::Size(size)));
            }
        }
    }

    // V1-AREAS
    #[test]
    fn areas_are_whole_pages_inside_the_section_and_apart_from_each_other() {
        let sparse = |size, areas: &[_]| check(size, V1Mapping::Sparse(areas.to_vec()));
        assert_eq!(sparse(20_000, &[(8192, 4096), (0, 4096), (4096, 4096)]), Ok(()), "in any order");
        for (offset, length) in [(0, 0), (1, 4096), (0, 4097), (8192, 4096), (4096, u64::MAX - 4095)] {
            let refused = Err(V1SectionError::Area { offset, length });
            assert_eq!(sparse(8192, &[(offset, length)]), refused, "{offset:#x} {length:#x}");
        }
        let overlap = Err(V1SectionError::Overlap { first: 0, second: 4096 });
        assert_eq!(sparse(16_384, &[(4096, 8192), (0, 8192)]), overlap);
        let twice = Err(V1SectionError::Overlap { first: 0, second: 0 });
        assert_eq!(sparse(16_384, &[(0, 4096), (0, 4096)]), twice);
        let many = vec![(0, 4096); MAX_AREAS + 1];
        assert_eq!(sparse(16_384, &many), Err(V1SectionError::Areas(MAX_AREAS + 1)));
    }
}
