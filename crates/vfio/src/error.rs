//! How errors of system calls become errors of a device.

use crate::sys::CallError;
use airlift_core::{DeviceError, DeviceErrorKind, Errno};

/// What an error number says of the device itself.
const fn kind(errno: Errno) -> DeviceErrorKind {
    match errno {
        // Hardware that has gone, or a session whose state the device has left.
        Errno::ENODEV | Errno::ENXIO => DeviceErrorKind::Lost,
        Errno::ENOTTY | Errno::EOPNOTSUPP => DeviceErrorKind::Unsupported,
        _ => DeviceErrorKind::Refused,
    }
}

/// The kernel answered `errno` to `operation`.
pub(crate) fn refused(operation: &str, errno: Errno) -> DeviceError {
    let message = match kind(errno) {
        DeviceErrorKind::Lost => "the device is gone, or was reset under the session",
        DeviceErrorKind::Unsupported => "the driver does not have it",
        _ => "the driver refused",
    };
    DeviceError {
        operation: operation.into(),
        kind: kind(errno),
        errno: Some(errno),
        message: message.into(),
    }
}

/// A call named `operation` ended in this way.
pub(crate) fn ended(operation: &str, error: CallError) -> DeviceError {
    match error {
        CallError::Errno(errno) => refused(operation, errno),
        CallError::TimedOut => DeviceError {
            errno: Some(Errno::ETIMEDOUT),
            ..DeviceError::new(
                DeviceErrorKind::TimedOut,
                operation,
                "the driver did not answer in time, and the call was given up",
            )
        },
        CallError::Interrupted => DeviceError {
            errno: Some(Errno::EINTR),
            ..DeviceError::new(DeviceErrorKind::Interrupted, operation, "the call was ended from outside")
        },
    }
}

/// The driver broke the interface's rules.
pub(crate) fn protocol(operation: &str, message: impl Into<String>) -> DeviceError {
    DeviceError::new(DeviceErrorKind::Protocol, operation, message)
}
