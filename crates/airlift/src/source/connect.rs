//! Connect: what the machine says against a migration, then the control connection.

use super::roll_back::Standing;
use super::session::Session;
use crate::set::DeviceSet;
use crate::wire::control::ControlLink;
use airlift_core::{Failure, Phase, Side};

/// A connection that nobody uses yet. HELLO goes over it first.
pub(super) struct Connected {
    pub(super) set: DeviceSet,
    pub(super) link: ControlLink,
}

pub(super) fn run(session: &mut Session, set: DeviceSet) -> Result<Connected, Standing> {
    session.announce(Phase::Connect);
    session.catch_up();
    if session.fallen() {
        return Err(Standing::Idle(set));
    }
    match session.machine.blockers() {
        Ok(blockers) if blockers.is_empty() => {}
        Ok(blockers) => {
            let list: Vec<_> = blockers.iter().map(|b| format!("{}: {}", b.owner, b.reason)).collect();
            session.fail(
                Failure::new(
                    Side::Source,
                    Phase::Connect,
                    format!("the machine cannot be migrated now: {}", list.join("; ")),
                )
                .advise("remove what blocks the migration, then try again"),
            );
            return Err(Standing::Idle(set));
        }
        Err(error) => {
            session.fail_machine(Phase::Connect, &error);
            return Err(Standing::Idle(set));
        }
    }
    match connect(session) {
        Ok(link) => Ok(Connected { set, link }),
        Err(failure) => {
            session.fail(failure);
            Err(Standing::Idle(set))
        }
    }
}

fn connect(session: &mut Session) -> Result<ControlLink, Failure> {
    let deadlines = session.options.deadlines;
    let fail = |e: crate::link::LinkError| {
        Failure::new(Side::Source, Phase::Connect, e.to_string())
            .with_errno(e.errno)
            .advise("check that the destination listens there (airlift receive)")
    };
    let stream = session.connector.connect(deadlines.connect).map_err(fail)?;
    stream.set_silence(deadlines.silence).map_err(fail)?;
    Ok(ControlLink::new(stream))
}
