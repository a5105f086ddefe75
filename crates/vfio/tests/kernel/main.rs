//! The kernel's VFIO with real drivers: the kernel's own sample `mtty`, and ours (`tests/kmod`). Runs in
//! the test VM only (`cargo xtask vm-test`).
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod dirty_container;
mod dirty_driver;
mod dirty_mock_iommu;
mod faults;
mod life;
mod p2p;
mod raw;
mod region;
mod reset;
mod save_load;
mod streams;
mod support;
mod transitions;
mod v1;
mod v1_faults;
mod v1_support;
