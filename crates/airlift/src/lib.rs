//! Placeholder.
#![forbid(unsafe_code)]

pub mod machine;
pub mod vmm;
