//! The test for pages that hold nothing.

/// Whether all bytes are 0. Stops within 64 bytes of the first that is not. For private copies: the
/// answer is worth nothing about memory that can change.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut blocks = bytes.chunks_exact(64);
    // One comparison for each block lets the compiler use vectors and still leave early.
    let zero = |block: &[u8]| block.iter().fold(0, |all, byte| all | byte) == 0;
    blocks.by_ref().all(zero) && zero(blocks.remainder())
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_set_byte_is_seen_wherever_it_stands() {
        for len in [0_usize, 1, 63, 64, 65, 200, 4096] {
            let mut page = vec![0_u8; len];
            assert!(is_zero(&page), "length {len}");
            for at in 0..len {
                page[at] = 1;
                assert!(!is_zero(&page), "length {len}, byte {at}");
                page[at] = 0;
            }
        }
    }
}
