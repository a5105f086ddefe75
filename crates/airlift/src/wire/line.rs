//! A session's control connection, and those that take its place after a loss.
//!
//! Whether a message that an earlier connection brought still counts is the session's to know.

use super::control::{Admission, Allowance, ControlLink, Ticket};
use super::frames::WireError;
use crate::spawn::{SpawnError, Spawner};
use airlift_stream::{Limits, Message};

/// What came over one of a session's control connections.
#[derive(Debug)]
pub(crate) struct Heard {
    number: u32,
    /// A message with its place among those that wait, or why the connection has ended.
    pub(crate) said: Result<(Message, Ticket), WireError>,
}

/// The connection that is used now, if there is one.
#[derive(Debug, Default)]
pub(crate) struct Line {
    link: Option<ControlLink>,
    number: u32,
}

impl Line {
    /// Uses this connection from now on, and reads it: `tell` gets all that comes, except for messages of
    /// which `at_once` says that it has dealt with them. More than may wait ends the connection (W-INBOX).
    pub(crate) fn adopt(
        &mut self,
        link: ControlLink,
        spawner: &dyn Spawner,
        limits: Limits,
        at_once: impl Fn(&Message) -> bool + Send + 'static,
        tell: impl Fn(Heard) + Send + 'static,
    ) -> Result<(), SpawnError> {
        self.number += 1;
        let number = self.number;
        let (allowance, bound) = (Allowance::default(), link.clone());
        let deliver = Box::new(move |message: Result<Message, WireError>| {
            if message.as_ref().is_ok_and(&at_once) {
                return;
            }
            let said = match message.map(|message| (allowance.admit(&message), message)) {
                Ok((Admission::Granted(ticket), message)) => Ok((message, ticket)),
                Ok((Admission::Refused(error), _)) => {
                    bound.shutdown();
                    Err(error)
                }
                Ok((Admission::Ended, _)) => return,
                Err(error) => Err(error),
            };
            tell(Heard { number, said });
        });
        link.read_on(spawner, limits, deliver)?;
        self.link = Some(link);
        Ok(())
    }

    /// It came over the connection that was adopted last.
    pub(crate) const fn is_newest(&self, heard: &Heard) -> bool {
        heard.number == self.number
    }

    pub(crate) const fn link(&self) -> Option<&ControlLink> {
        self.link.as_ref()
    }

    pub(crate) const fn is_open(&self) -> bool {
        self.link.is_some()
    }

    /// Sends a message; without a connection it is dropped. A connection that does not take it is lost,
    /// which its reader reports.
    pub(crate) fn send(&self, message: &Message) {
        let Some(link) = &self.link else { return };
        if let Err(error) = link.send(message) {
            tracing::warn!(error = %error, message = %message.kind(), "a message could not be sent");
            link.shutdown();
        }
    }

    /// Says that nothing more will be sent. `false`: there is no connection.
    pub(crate) fn finish(&self) -> bool {
        if let Some(link) = &self.link {
            link.finish();
        }
        self.is_open()
    }

    /// Ends the connection.
    pub(crate) fn close(&mut self) {
        if let Some(link) = self.link.take() {
            link.shutdown();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Stream;
    use crate::spawn::StdSpawner;
    use crossbeam_channel::unbounded;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(20);

    fn pair() -> (ControlLink, ControlLink) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ControlLink::new(Stream::from(ours)), ControlLink::new(Stream::from(theirs)))
    }

    #[test]
    fn what_an_earlier_connection_says_is_known_to_be_of_that_one() {
        let (ours, theirs) = pair();
        let (tell, told) = unbounded();
        let mut line = Line::default();
        let adopt = |line: &mut Line, link| {
            let tell = tell.clone();
            let at_once = |message: &Message| matches!(message, Message::Credit { .. });
            let tell = move |heard| tell.send(heard).unwrap();
            line.adopt(link, &StdSpawner, Limits::default(), at_once, tell).unwrap();
        };
        adopt(&mut line, ours);
        let acknowledgement = Message::InitAck { device: 1, generation: 2 };
        // What is dealt with at once is not told.
        theirs.send(&Message::Credit { device: 0, frames: 1 }).unwrap();
        theirs.send(&acknowledgement).unwrap();
        let heard = told.recv_timeout(LONG).unwrap();
        assert!(line.is_newest(&heard));
        assert_eq!(heard.said.unwrap().0, acknowledgement);

        let (ours, newer) = pair();
        line.close();
        adopt(&mut line, ours);
        let lost = told.recv_timeout(LONG).unwrap();
        assert!(lost.said.is_err() && !line.is_newest(&lost), "the end of the one before");
        newer.shutdown();
        let lost = told.recv_timeout(LONG).unwrap();
        assert!(lost.said.is_err() && line.is_newest(&lost));
    }
}
