//! Memory that others write too: memfds, mappings, copies out of and into them, and guest memory.
//!
//! This is one of the two crates of Airlift with `unsafe` code, and all of it is in `mapping`: the
//! calls of `mmap` and `munmap` and the views of a mapping as atomic integers. Everything above is safe
//! Rust.
//!
//! What is in a mapping can change at any moment, by another thread or another process. So nothing
//! here gives out a slice: bytes are copied out, and tests (a checksum, [`is_zero`]) are made on the
//! copy. A copy is not a snapshot either: words that change while it is made may be old or new.
//! Nothing here tracks dirty pages.

mod error;
mod guest;
mod mapping;
mod shared;
mod zero;

pub use error::MemoryError;
pub use guest::{GuestMemory, GuestRegion};
pub use mapping::{Access, Mapping};
pub use shared::SharedMemory;
pub use zero::is_zero;
