//! The command with devices of the kernel: the kernel's own sample `mtty`, and our test driver
//! (`tests/kmod`). Runs in the test VM only (`cargo xtask vm-test`).
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

#[path = "../common/mod.rs"]
mod common;

mod config;
mod damage;
mod descriptors;
mod killed;
mod machine;
mod memory;
mod moves;
mod p2p;
mod probe;
mod refused;
mod relay;
mod stuck;
mod support;
mod v1;
mod vmm;
