//! The configuration of a PCI device: what a guest has set in it, as a record.
//!
//! `layout` knows where things are in a configuration space, `record` the bytes of a record, `registers`
//! what of it may be written, and `config` does it. Whether the host's bus has the same devices around this
//! one is not checked.

mod access;
mod config;
mod layout;
mod record;
mod registers;

pub use config::PciConfig;
pub(crate) use layout::capabilities;
