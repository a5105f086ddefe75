//! The command `airlift`.
#![forbid(unsafe_code)]
fn main() {}
