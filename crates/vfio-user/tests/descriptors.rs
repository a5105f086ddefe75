//! Descriptors of clients that come and go. A process of its own: it counts what is open.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "it/common.rs"]
mod common;

use airlift_vfio_user::DmaAccess;
use common::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::os::fd::AsFd;

#[test]
fn a_hundred_clients_leave_no_descriptor_behind() {
    let served = serve();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let connect = || {
        let client = served.client();
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        client.set_irqs(2, 0, &[fd.as_fd()]).unwrap();
        let memfd = memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memfd, 4096).unwrap();
        client.dma_map(0, 4096, DmaAccess::READ, Some((memfd.as_fd(), 0))).unwrap();
        drop(client.migration_socket().unwrap());
        // More than a request takes.
        let surplus = [fd.as_fd(), memfd.as_fd()];
        assert!(client.set_irqs(0, 0, &surplus).is_err());
    };
    let settle = |most: usize| {
        let mut now = usize::MAX;
        let deadline = std::time::Instant::now() + SOON;
        while now > most && std::time::Instant::now() < deadline {
            std::thread::yield_now();
            now = open();
        }
        now
    };
    connect();
    // The server's own threads may still be opening and closing theirs.
    let before = open() + 3;
    for _ in 0..100 {
        connect();
    }
    let after = settle(before);
    assert!(after <= before, "{after} descriptors are open, {before} were");
}
