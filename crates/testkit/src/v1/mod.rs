//! Devices of interface v1 for tests of whoever uses one.
//!
//! [`Double`] is a device with a migration region in memory. It follows the interface with a state machine
//! of its own, does wrong what a test says ([`Fault`], [`Plan`]), writes down every access, and judges the
//! user: what the interface does not allow is a violation, which the test finds in
//! [`Double::violations`]. [`ServedDevice`] is a device that a real vfio-user server serves over the same
//! [`Layout`]s, and [`Counted`] counts what moves through any region.
//!
//! What a user wants to know of a device's data is the same everywhere: [`bytes`] makes some that differ in
//! every place, [`cut`] makes transactions of it, [`save`] and [`load`] move it.

mod counted;
mod device;
mod flow;
mod layout;
mod region;
mod script;
mod served;

pub use counted::{Counted, Counts};
pub use flow::{Failed, load, save, through_records};
pub use layout::{Layout, PAGE};
pub use region::{Double, DoubleRegion};
pub use script::{Access, DoubleOptions, Fault, Plan, Record, Wrong};
pub use served::{ServedDevice, ServedOptions};

/// `len` bytes that depend on their place and on `seed`.
#[must_use]
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut word = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(len.next_multiple_of(8));
    while bytes.len() < len {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The data in transactions of `size` bytes, above 0, and the last one of what is left.
#[must_use]
pub fn cut(data: &[u8], size: usize) -> Vec<Vec<u8>> {
    data.chunks(size.max(1)).map(<[u8]>::to_vec).collect()
}
