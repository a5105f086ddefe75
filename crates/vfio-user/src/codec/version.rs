//! VERSION: two numbers and a text in JSON.
//!
//! Unknown keys are passed over; known ones must have the right type. The server's text has no
//! spaces: there are clients that take no more bytes than they sent (VU-VERSION).

use super::MAX_FDS;
use serde_json::{Map, Value, json};

/// What `max_data_xfer_size` is when a peer does not say.
pub const DEFAULT_MAX_DATA_XFER_SIZE: u32 = 1 << 20;

/// What a peer says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionCaps {
    /// Most descriptors in one message.
    pub max_msg_fds: u32,
    /// Most bytes of data in one message.
    pub max_data_xfer_size: u32,
    /// It says that it has migration, at this page size. Its absence says nothing.
    pub migration_pgsize: Option<u64>,
}

impl Default for VersionCaps {
    fn default() -> Self {
        Self { max_msg_fds: 1, max_data_xfer_size: DEFAULT_MAX_DATA_XFER_SIZE, migration_pgsize: None }
    }
}

/// The payload of VERSION, both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionMessage {
    /// Major version, 0.
    pub major: u16,
    /// Minor version.
    pub minor: u16,
    /// The capabilities.
    pub caps: VersionCaps,
}

/// A VERSION that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// It does not hold two numbers.
    #[error("the message is too short")]
    Short,
    /// The text does not end in NUL.
    #[error("the text has no NUL at its end")]
    NotTerminated,
    /// The text is not what it must be.
    #[error("the text is not valid: {0}")]
    Text(String),
}

impl VersionMessage {
    /// The payload's bytes. The text has no spaces.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut caps = Map::new();
        caps.insert("max_msg_fds".into(), json!(self.caps.max_msg_fds));
        caps.insert("max_data_xfer_size".into(), json!(self.caps.max_data_xfer_size));
        if let Some(pgsize) = self.caps.migration_pgsize {
            caps.insert("migration".into(), json!({ "pgsize": pgsize }));
        }
        let mut out = Vec::new();
        out.extend(self.major.to_ne_bytes());
        out.extend(self.minor.to_ne_bytes());
        out.extend(json!({ "capabilities": caps }).to_string().into_bytes());
        out.push(0);
        out
    }

    /// The payload's bytes, at most `limit` of them: without `migration`, or without any text, where
    /// they would be more. Some clients take no answer that is longer than their question
    /// (VU-VERSION).
    #[must_use]
    pub fn encode_within(&self, limit: usize) -> Vec<u8> {
        let whole = self.encode();
        if whole.len() <= limit {
            return whole;
        }
        let caps = VersionCaps { migration_pgsize: None, ..self.caps };
        let mut short = Self { caps, ..*self }.encode();
        if short.len() > limit {
            short.truncate(4);
        }
        short
    }

    /// Reads a payload. A text may be missing; what it does not say has the protocol's default.
    ///
    /// # Errors
    /// When it is too short, the text does not end in NUL or is no JSON object, or a known key has
    /// the wrong type.
    pub fn decode(payload: &[u8]) -> Result<Self, VersionError> {
        let (&[a, b, c, d], text) = payload.split_first_chunk().ok_or(VersionError::Short)?;
        let (major, minor) = (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]));
        let mut caps = VersionCaps::default();
        if !text.is_empty() {
            let text = text.strip_suffix(&[0]).ok_or(VersionError::NotTerminated)?;
            let value: Value = serde_json::from_slice(text).map_err(|e| VersionError::Text(e.to_string()))?;
            let object = value.as_object().ok_or_else(|| wrong("the text"))?;
            if let Some(value) = object.get("capabilities") {
                caps.read(value.as_object().ok_or_else(|| wrong("capabilities"))?)?;
            }
        }
        Ok(Self { major, minor, caps })
    }
}

fn wrong(what: &str) -> VersionError {
    VersionError::Text(format!("{what} has the wrong type"))
}

impl VersionCaps {
    fn read(&mut self, object: &Map<String, Value>) -> Result<(), VersionError> {
        let number = |key: &str| match object.get(key) {
            None => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or_else(|| wrong(key)),
        };
        if let Some(fds) = number("max_msg_fds")? {
            // More than we ever send is of no use.
            self.max_msg_fds = u32::try_from(fds.min(MAX_FDS as u64)).unwrap_or(1);
        }
        if let Some(size) = number("max_data_xfer_size")? {
            let size = u32::try_from(size.min(u64::from(u32::MAX))).unwrap_or(u32::MAX);
            if size < 4096 {
                // Region accesses of a few bytes must fit; 1024 is what a known sample client says.
                self.max_data_xfer_size = size.max(64);
            } else {
                self.max_data_xfer_size = size;
            }
        }
        if let Some(migration) = object.get("migration") {
            let migration = migration.as_object().ok_or_else(|| wrong("migration"))?;
            self.migration_pgsize = migration.get("pgsize").and_then(Value::as_u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_known_peers_are_read() {
        let qemu = br#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}"#;
        let mut payload = vec![0, 0, 0, 0];
        payload.extend(qemu);
        payload.push(0);
        let message = VersionMessage::decode(&payload).unwrap();
        let caps = VersionCaps { max_msg_fds: 16, max_data_xfer_size: 1 << 20, migration_pgsize: Some(4096) };
        assert_eq!(message, VersionMessage { major: 0, minor: 0, caps });
        // Its own request has 214 bytes with the header; a reply must not be longer (VU-VERSION).
        assert!(message.encode().len() + 16 <= 125);
        let short = VersionMessage::decode(&message.encode_within(90)).unwrap();
        assert_eq!(short.caps, VersionCaps { migration_pgsize: None, ..caps });
        assert_eq!(message.encode_within(10), [0, 0, 0, 0]);
        assert_eq!(VersionMessage::decode(&message.encode()), Ok(message));
    }

    #[test]
    fn a_text_may_be_missing_but_not_broken() {
        let bare = VersionMessage::decode(&[0, 0, 1, 0]).unwrap();
        assert_eq!(bare.caps, VersionCaps::default());
        assert_eq!(VersionMessage::decode(&[0, 0, 1]), Err(VersionError::Short));
        assert_eq!(VersionMessage::decode(b"\0\0\0\0{}"), Err(VersionError::NotTerminated));
        assert!(VersionMessage::decode(b"\0\0\0\0{\0").is_err());
        assert!(VersionMessage::decode(b"\0\0\0\0[]\0").is_err());
        assert!(VersionMessage::decode(b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":\"x\"}}\0").is_err());
    }
}
