//! Threads, started by the embedder.
//!
//! The engine starts no thread by itself: it asks a [`Spawner`], and says by [`Role`] what the
//! thread will do, so that a VMM can give each role its own seccomp filter, priority or name.

use std::fmt;

/// What a thread of the engine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Calls one device: its file descriptor or its vfio-user socket, and nothing else.
    Device,
    /// Reads guest memory and dirty reports on the source.
    Memory,
    /// Writes frames to one data connection.
    Sender,
    /// Reads frames from one data connection and writes guest memory.
    Receiver,
    /// Reads the control connection.
    Control,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "device",
            Self::Memory => "memory",
            Self::Sender => "sender",
            Self::Receiver => "receiver",
            Self::Control => "control",
        })
    }
}

/// A thread could not be started.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot start the {role} thread {name}: {message}")]
pub struct SpawnError {
    /// What it would have done.
    pub role: Role,
    /// Its name.
    pub name: String,
    /// Why not.
    pub message: String,
}

/// What a thread runs.
pub type Body = Box<dyn FnOnce() + Send + 'static>;

/// Starts threads for the engine. Nobody joins them: each ends by itself when its channel closes,
/// except one that a device blocks for ever, which is left behind with its device.
pub trait Spawner: Send + Sync {
    /// Starts a thread that runs `body`. `name` has at most 15 bytes, as the kernel keeps of it.
    ///
    /// # Errors
    /// When no thread can be started; `body` has then not run.
    fn spawn(&self, role: Role, name: &str, body: Body) -> Result<(), SpawnError>;
}

/// Plain threads of the standard library.
#[derive(Clone, Copy, Debug, Default)]
pub struct StdSpawner;

impl Spawner for StdSpawner {
    fn spawn(&self, role: Role, name: &str, body: Body) -> Result<(), SpawnError> {
        std::thread::Builder::new().name(name.to_owned()).spawn(body).map(drop).map_err(|e| SpawnError {
            role,
            name: name.to_owned(),
            message: e.to_string(),
        })
    }
}
