//! Frames on connections: control messages both ways, data frames out and in, and the room that
//! keeps them bounded.
//!
//! What a message means, and whether it may come now, is the phases' to know.

pub(crate) mod control;
pub(crate) mod credit;
pub(crate) mod frames;
pub(crate) mod inbound;
pub(crate) mod line;
pub(crate) mod outbound;
mod pool;
pub(crate) mod rehearsal;

pub(crate) use pool::Pool;
pub use pool::PooledBuf;
