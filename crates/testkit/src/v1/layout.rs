//! What of a data section is mapped, in the ways that differ.

use airlift_core::RegionArea;
use airlift_core::v1::INFO_SIZE;
use airlift_vfio_user::V1Mapping;

/// Areas that are mapped begin and end at multiples of this, in bytes.
pub const PAGE: u64 = 4096;

/// What of a data section is mapped. Only whole pages are; what is left of the last one is trapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Nothing.
    Trapped,
    /// All of it.
    Mapped,
    /// The first page.
    First,
    /// All but the first page.
    Rest,
    /// Every other page, from the second on.
    Alternate,
    /// Two of three pages, from the last to the first: areas that touch, with gaps, in no order
    /// (V1-AREAS).
    Unsorted,
}

impl Layout {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Trapped, Self::Mapped, Self::First, Self::Rest, Self::Alternate, Self::Unsorted];

    /// The mapped parts of a section of `section` bytes: `(offset, length)` from its start.
    #[must_use]
    pub fn parts(self, section: u64) -> Vec<(u64, u64)> {
        let pages = section / PAGE;
        let one = |page: u64| (page * PAGE, PAGE);
        let run =
            |first: u64| if first < pages { vec![(first * PAGE, (pages - first) * PAGE)] } else { vec![] };
        match self {
            Self::Trapped => Vec::new(),
            Self::Mapped => run(0),
            Self::First => (0..pages.min(1)).map(one).collect(),
            Self::Rest => run(1),
            Self::Alternate => (0..pages).filter(|page| page % 2 == 1).map(one).collect(),
            Self::Unsorted => (0..pages).rev().filter(|page| page % 3 != 1).map(one).collect(),
        }
    }

    /// The same for a vfio-user server.
    #[must_use]
    pub fn mapping(self, section: u64) -> V1Mapping {
        match self {
            Self::Trapped => V1Mapping::Trapped,
            Self::Mapped => V1Mapping::Mapped,
            _ => V1Mapping::Sparse(self.parts(section)),
        }
    }

    /// Where the section begins in its region, and the mapped areas of the region: at a page where
    /// something is mapped, else right behind the fields.
    #[must_use]
    pub fn areas(self, section: u64) -> (u64, Vec<RegionArea>) {
        let parts = self.parts(section);
        let start = if parts.is_empty() { INFO_SIZE } else { PAGE };
        let area = |(offset, length)| RegionArea { offset: start + offset, length };
        (start, parts.into_iter().map(area).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_what_their_names_say() {
        let parts = |layout: Layout| -> Vec<(u64, u64)> {
            layout.parts(5 * PAGE + 1).iter().map(|(at, length)| (at / PAGE, length / PAGE)).collect()
        };
        assert_eq!(parts(Layout::Trapped), []);
        assert_eq!(parts(Layout::Mapped), [(0, 5)]);
        assert_eq!(parts(Layout::First), [(0, 1)]);
        assert_eq!(parts(Layout::Rest), [(1, 4)]);
        assert_eq!(parts(Layout::Alternate), [(1, 1), (3, 1)]);
        assert_eq!(parts(Layout::Unsorted), [(3, 1), (2, 1), (0, 1)]);
        for layout in Layout::ALL {
            assert_eq!(layout.parts(PAGE - 1), []);
            assert_eq!(layout.areas(PAGE - 1), (INFO_SIZE, vec![]));
        }
    }
}
