//! What tests of Airlift, and of devices served with it, are made of.
//!
//! [`faults`] wraps devices, dirty sources and machines so that one thing goes wrong; [`simulator`]
//! explores the session machines of both sides against each other; [`v1`] has devices with a migration region
//! that follow the interface, or do not, and judge their user.
#![forbid(unsafe_code)]

pub mod faults;
pub mod simulator;
pub mod v1;
