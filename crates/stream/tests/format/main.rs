//! The format as a whole: every message and frame goes over unchanged, its bytes are those of the
//! fixtures, and what the fuzz targets assert holds of the checked-in corpus.
#![allow(clippy::unwrap_used, reason = "a test may stop at what it did not expect")]

mod corpus;
mod fixtures;
mod messages;
mod samples;
