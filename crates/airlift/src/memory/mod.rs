//! Guest memory on the source: who says what is dirty, and how dirty pages become frames.

mod dirty;
mod domains;
mod sweep;

pub(crate) use dirty::DirtyTracking;
pub(crate) use sweep::{Sweep, SweepStats, Sweeper};
