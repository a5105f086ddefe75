//! What tests of Airlift, and of devices served with it, are made of.
//!
//! [`simulator`] explores the session machines of both sides against each other.
#![forbid(unsafe_code)]

pub mod simulator;
