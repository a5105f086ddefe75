//! Addresses: `tcp:HOST:PORT` and `unix:PATH`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where the other side is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// `tcp:HOST:PORT`; an IPv6 host stands in brackets. Port 0 lets the system choose, on the
    /// listening side.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// `unix:PATH`.
    Unix(PathBuf),
}

/// A text that is no address that this version takes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an address: {why}")]
pub struct UriError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub why: &'static str,
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let error = |why| UriError { text: text.to_owned(), why };
        let (scheme, rest) = text
            .split_once(':')
            .ok_or_else(|| error("it must begin with tcp: or unix:, as in tcp:192.0.2.7:4444"))?;
        match scheme {
            "tcp" => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(|| error("tcp: wants HOST:PORT"))?;
                let host = match host.strip_prefix('[') {
                    Some(inner) => inner.strip_suffix(']').ok_or_else(|| error("a [ without its ]"))?,
                    None if host.contains(':') => return Err(error("an IPv6 address stands in brackets")),
                    None => host,
                };
                if host.is_empty() {
                    return Err(error("the host is missing"));
                }
                let port = port.parse().map_err(|_| error("the port is a number from 0 to 65535"))?;
                Ok(Self::Tcp { host: host.to_owned(), port })
            }
            "unix" if rest.is_empty() => Err(error("the path is missing")),
            "unix" => Ok(Self::Unix(rest.into())),
            "vsock" | "fd" | "file" | "exec" => Err(error(
                "this version connects over tcp: and unix: only; vsock:, fd:, file: and exec: are not there yet",
            )),
            _ => Err(error("the scheme is not known; use tcp:HOST:PORT or unix:PATH")),
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_they_are_written() {
        for text in ["tcp:127.0.0.1:4444", "tcp:[::1]:0", "tcp:host.example:1", "unix:/run/a:b.sock"] {
            assert_eq!(text.parse::<Uri>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for text in [
            "",
            "tcp",
            "tcp:1",
            "tcp::1",
            "tcp:::1:5",
            "tcp:[::1:5",
            "tcp:h:70000",
            "unix:",
            "file:x",
            "rdma:h:1",
        ] {
            assert!(text.parse::<Uri>().is_err(), "{text} was taken");
        }
    }
}
