//! What went wrong, in values that can be compared, sent to the other side and printed.
//!
//! [`DeviceError`] is one failed operation of one device. [`TransitionError`] adds where the device
//! was found afterwards. [`Failure`] is the whole answer that a user reads: side, device, phase,
//! state, errno, cause and advice; the other side's failure is the cause of this side's.

use crate::{DeviceId, DeviceState, Phase, Side};
use serde::{Deserialize, Serialize};
use std::fmt;

/// An error number of Linux. Positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident = $value:literal),* $(,)?) => {
        impl Errno {
            $(
                #[doc = concat!("`", stringify!($name), "`.")]
                pub const $name: Self = Self($value);
            )*

            /// The symbolic name, where this table has it.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM = 1, ENOENT = 2, EINTR = 4, EIO = 5, ENXIO = 6, E2BIG = 7, EBADF = 9, EAGAIN = 11,
    ENOMEM = 12, EACCES = 13, EFAULT = 14, EBUSY = 16, EEXIST = 17, ENODEV = 19, EINVAL = 22,
    EMFILE = 24, ENOTTY = 25, EFBIG = 27, ENOSPC = 28, EPIPE = 32, ERANGE = 34, ENOSYS = 38,
    ENOMSG = 42, EPROTO = 71, EBADMSG = 74, EOVERFLOW = 75, EMSGSIZE = 90, EOPNOTSUPP = 95,
    EADDRINUSE = 98, EADDRNOTAVAIL = 99, ENETUNREACH = 101, ECONNABORTED = 103, ECONNRESET = 104,
    ENOTCONN = 107, ESHUTDOWN = 108, ETIMEDOUT = 110, ECONNREFUSED = 111, EHOSTUNREACH = 113,
    EALREADY = 114, EINPROGRESS = 115, ESTALE = 116, ECANCELED = 125,
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({})", self.0),
            None => write!(f, "errno {}", self.0),
        }
    }
}

/// What kind of thing went wrong with a device; it decides what may be tried next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceErrorKind {
    /// The device answered with an error.
    Refused,
    /// The device, its server or its connection is gone.
    Lost,
    /// No answer before the deadline. The device may still be busy.
    TimedOut,
    /// The device or its server broke its interface's rules.
    Protocol,
    /// The device does not have what was asked for.
    Unsupported,
    /// The call was ended by its [`Interrupter`](crate::Interrupter).
    Interrupted,
    /// Airlift used the device in a state that does not allow it.
    Misuse,
}

/// One operation of one device that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{operation}: {message}{}", errno.map(|e| format!(": {e}")).unwrap_or_default())]
pub struct DeviceError {
    /// What was being done, in the interface's words (`SET MIG_DEVICE_STATE`, `MIG_DATA_READ`).
    pub operation: String,
    /// The kind, for decisions.
    pub kind: DeviceErrorKind,
    /// The device's error number, where it gave one.
    pub errno: Option<Errno>,
    /// What happened, for a person.
    pub message: String,
}

impl DeviceError {
    /// An error of this kind without an error number.
    #[must_use]
    pub fn new(kind: DeviceErrorKind, operation: impl Into<String>, message: impl Into<String>) -> Self {
        Self { operation: operation.into(), kind, errno: None, message: message.into() }
    }

    /// The device answered `errno`.
    #[must_use]
    pub fn refused(operation: impl Into<String>, errno: Errno) -> Self {
        Self {
            operation: operation.into(),
            kind: DeviceErrorKind::Refused,
            errno: Some(errno),
            message: "the device refused".into(),
        }
    }
}

/// A transition that did not reach its target. The state was read back after the failure and is
/// never guessed (V2-READBACK).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{from} -> {to}: {error}; the device is now {}", describe(reached))]
pub struct TransitionError {
    /// The state before.
    pub from: DeviceState,
    /// The state asked for.
    pub to: DeviceState,
    /// Where the device was found, or why that cannot be said.
    pub reached: Result<DeviceState, DeviceError>,
    /// What the device answered to the transition.
    pub error: DeviceError,
}

fn describe(reached: &Result<DeviceState, DeviceError>) -> String {
    match reached {
        Ok(state) => format!("in {state}"),
        Err(error) => format!("in a state that cannot be read ({error})"),
    }
}

/// Everything that is known of a failed migration on one side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The side where it happened.
    pub side: Side,
    /// The device it happened to.
    pub device: Option<DeviceId>,
    /// The phase of that side.
    pub phase: Phase,
    /// The state in which that device was found.
    pub state: Option<DeviceState>,
    /// The error number, where there is one.
    pub errno: Option<Errno>,
    /// What happened.
    pub message: String,
    /// Why, where another error was the reason: often the other side's.
    #[source]
    pub cause: Option<Box<Self>>,
    /// What the user can do.
    pub advice: Option<String>,
}

impl Failure {
    /// A failure of no device in particular.
    #[must_use]
    pub fn new(side: Side, phase: Phase, message: impl Into<String>) -> Self {
        Self {
            side,
            device: None,
            phase,
            state: None,
            errno: None,
            message: message.into(),
            cause: None,
            advice: None,
        }
    }

    /// The same with the device named.
    #[must_use]
    pub fn on_device(mut self, device: &DeviceId) -> Self {
        self.device = Some(device.clone());
        self
    }

    /// The same with an error number.
    #[must_use]
    pub fn with_errno(mut self, errno: Option<Errno>) -> Self {
        self.errno = errno;
        self
    }

    /// The same with the state in which the device was found.
    #[must_use]
    pub fn in_state(mut self, state: Option<DeviceState>) -> Self {
        self.state = state;
        self
    }

    /// The same with its cause.
    #[must_use]
    pub fn because(mut self, cause: Self) -> Self {
        self.cause = Some(Box::new(cause));
        self
    }

    /// The same with advice.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}
