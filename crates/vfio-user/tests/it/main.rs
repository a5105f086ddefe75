//! Client and server against each other and against peers that break the rules, over real sockets.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;
mod data;
mod dma;
mod peers;
mod robust;
mod serving;
mod transitions;
mod unread;
mod v1_client;
mod v1_server;
mod v1_server_faults;
mod v1_server_private;
mod v1_server_wrong;
mod v1_user;
