//! One migration of the demo: a fresh destination, `receive`, `send`, the fault, and what is found
//! afterwards.

use super::child::{Cast, ChildId, Name};
use super::faults;
use super::host::{Args, Host};
use super::overlap::{Live, device_live, first_overlap};
use super::parts::Parts;
use super::peak::Peak;
use super::relay::Relay;
use super::result::{DemoResult, PeakView};
use super::{ANSWER, DemoError, START, is_set, verify};
use crate::args::{DemoArgs, TransportChoice};
use crate::json::{ErrorView, Output, ReportView};
use airlift::link::Uri;
use airlift::{Outcome, Running};
use airlift_core::Side;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

pub(crate) use faults::Fault;

/// How long the way back, or the way forward after COMMIT, may take after the demo has given up.
const WAY_BACK: Duration = Duration::from_secs(60);

/// How long `receive` may wait for more after `send` has ended: longer than its own deadlines.
const LEFT_ALONE: Duration = Duration::from_secs(15);

/// One migration.
pub(crate) struct Attempt<'a> {
    /// What was asked for.
    pub(crate) args: &'a DemoArgs,
    /// The seed of everything.
    pub(crate) seed: u64,
    /// Where to write.
    pub(crate) output: &'a Arc<Output>,
    /// Set by SIGINT and SIGTERM.
    pub(crate) interrupted: &'a AtomicBool,
    /// 1, or 2 for the retry.
    pub(crate) number: u32,
    /// The fault to place.
    pub(crate) fault: Option<Fault>,
    /// The host that the guest is on.
    pub(crate) source: &'a Host,
}

impl Attempt<'_> {
    /// Makes the migration with these devices. An `Ok` is a migration that ended, well or not.
    ///
    /// # Errors
    /// When the demo itself could not go on.
    pub(crate) fn run(&self, cast: &mut Cast, ids: &[String]) -> Result<DemoResult, DemoError> {
        let side = Side::Destination;
        let destination = Host::start(cast, self.args, self.seed, side, self.number, ids)?;
        let result = self.migrate(cast, &destination);
        cast.end(&destination.children());
        result
    }

    fn migrate(&self, cast: &mut Cast, destination: &Host) -> Result<DemoResult, DemoError> {
        let receiver = self.spawn_receiver(cast, destination)?;
        let uri = cast.until_alive(Instant::now() + START, "receive listened", &[receiver], |cast| {
            cast.facts(receiver).listening.clone()
        })?;
        let relay = self.relay(&uri, destination)?;
        let uri = relay.as_ref().map_or(uri, |r| r.uri().to_string());
        let sender = self.spawn_sender(cast, &uri)?;
        let watch = |pid| Peak::watch(pid).map_err(|e| DemoError::new(format!("no sampler: {e}")));
        let peaks = (watch(cast.pid(sender))?, watch(cast.pid(receiver))?);

        let parts = Parts { sender, receiver, source: self.source, destination, relay: relay.as_ref() };
        let placed = match self.fault {
            Some(fault) => faults::place(cast, fault, &parts, self.args.timeout.0, self.output)?,
            None => true,
        };
        self.wait_for_the_end(cast, sender, receiver)?;
        let mut result = self.conclude(cast, &parts)?;
        result.peak_anon_bytes = PeakView { source: peaks.0.bytes(), destination: peaks.1.bytes() };
        if let (Some(fault), false) = (self.fault, placed) {
            let text = fault.text();
            result
                .notes
                .push(format!("the fault was not placed ({text}): the migration ended before that phase"));
        }
        Ok(result)
    }

    fn relay(&self, uri: &str, destination: &Host) -> Result<Option<Relay>, DemoError> {
        if !matches!(self.fault, Some(Fault::Cut(_))) {
            return Ok(None);
        }
        let to: Uri = uri.parse().map_err(|e| DemoError::new(format!("receive listens at {uri}: {e}")))?;
        let dir = destination.path("");
        Relay::start(&to, &dir).map(Some)
    }

    /// What both sides get in the same way.
    fn common(&self, subcommand: &str, host: &Host, side: Side) -> Args {
        let sabotage = self.args.sabotage.filter(|s| match side {
            Side::Source => s.is_senders(),
            Side::Destination => s.is_receivers(),
        });
        let hold = self.fault.filter(|f| f.held_side() == side).map(|f| f.phase().name());
        Args::new(subcommand)
            .with("--vmm", host.vmm())
            .with("--journal", host.path(&format!("journal-{}", self.number)))
            // Two processes on one machine answer at once: whoever is silent for this long is gone.
            .with("--deadline", "commit=5s")
            .with("--deadline", "silence=6s")
            .with_some("--hold-at", hold)
            .with_some("--sabotage", sabotage.map(|s| s.name()))
    }

    fn spawn_receiver(&self, cast: &mut Cast, host: &Host) -> Result<ChildId, DemoError> {
        let uri = match self.args.transport {
            TransportChoice::Tcp => "tcp:127.0.0.1:0".into(),
            TransportChoice::Unix => {
                let mut uri = std::ffi::OsString::from("unix:");
                uri.push(host.path("migration.sock"));
                uri
            }
        };
        let args = self.common("receive", host, Side::Destination).positional(uri);
        let name = Name { side: Side::Destination, attempt: self.number, role: "receive".into() };
        cast.spawn(name, args.done())
    }

    fn spawn_sender(&self, cast: &mut Cast, uri: &str) -> Result<ChildId, DemoError> {
        let args = self
            .common("send", self.source, Side::Source)
            .with("--downtime-limit", self.args.downtime_limit.argument())
            .with("--channels", self.args.channels.to_string())
            .flag("--assume-no-peer-dma", self.args.no_peer_dma())
            .positional(uri);
        let name = Name { side: Side::Source, attempt: self.number, role: "send".into() };
        cast.spawn(name, args.done())
    }

    /// Waits until both processes have ended; cancels at a signal or after the time that the user
    /// gave, and kills in the end.
    fn wait_for_the_end(&self, cast: &mut Cast, sender: ChildId, receiver: ChildId) -> Result<(), DemoError> {
        let mut give_up = Instant::now() + self.args.timeout.0;
        let mut cancelled = false;
        let mut left_alone = None;
        loop {
            let tick = Instant::now() + Duration::from_millis(100);
            let ended = cast.until(tick, "both ends", |cast| {
                [sender, receiver].iter().all(|id| cast.facts(*id).ended.is_some()).then_some(())
            });
            if ended.is_ok() {
                return Ok(());
            }
            let now = Instant::now();
            // A source that died before it said anything leaves a destination that listens for the next.
            let patience = if cast.facts(receiver).phase == "listen" { ANSWER / 10 } else { LEFT_ALONE };
            if cast.facts(sender).ended.is_some() && now > *left_alone.get_or_insert(now + patience) {
                cast.tell(receiver, "cancel");
                left_alone = Some(now + WAY_BACK);
            }
            let late = now >= give_up;
            if !cancelled && (late || is_set(self.interrupted)) {
                self.output.say(if late { "Out of time: cancelling." } else { "Cancelling; going back." });
                cast.tell(sender, "cancel");
                if cast.facts(sender).ended.is_some() {
                    cast.tell(receiver, "cancel");
                }
                cancelled = true;
                give_up = Instant::now() + WAY_BACK;
            } else if late {
                cast.kill(sender);
                cast.kill(receiver);
                give_up = Instant::now() + ANSWER;
            }
        }
    }

    fn conclude(&self, cast: &mut Cast, parts: &Parts<'_>) -> Result<DemoResult, DemoError> {
        let sent = cast.facts(parts.sender).result.clone();
        let received = cast.facts(parts.receiver).result.clone();
        let mut resolved = None;
        if sent.is_none() {
            resolved = Some(self.resolve(cast)?);
        }
        let source = verify::where_it_runs(cast, parts.source)?;
        let destination = verify::where_it_runs(cast, parts.destination)?;

        let mut result = DemoResult::failed(self.seed, ErrorView::new(String::new()));
        result.take_reports(sent.as_ref(), received.as_ref());
        result.source_running = source;
        result.destination_running = destination;
        result.outcome = outcome(sent.as_ref(), received.as_ref(), source, destination);
        if result.outcome == Outcome::Completed && result.total_ms == 0.0 {
            result.total_ms = received.as_ref().map_or(0.0, |r| r.total_ms);
        }
        result.error = match result.outcome {
            Outcome::Completed => None,
            _ => Some(self.error(cast, parts, sent.as_ref(), received.as_ref())),
        };
        result.notes.extend(resolved.into_iter().flatten());
        verify::fill_in(cast, parts, &mut result)?;
        self.check_for_contradictions(cast, parts, sent.as_ref(), &mut result);
        Ok(result)
    }

    /// After `send` was killed: what an operator would do on the source. Its words, for the notes.
    fn resolve(&self, cast: &mut Cast) -> Result<Option<String>, DemoError> {
        let args = Args::bare("resolve")
            .with("--vmm", self.source.vmm())
            .with("--journal", self.source.path(&format!("journal-{}", self.number)));
        let name = Name { side: Side::Source, attempt: self.number, role: "resolve".into() };
        let child = cast.spawn(name, args.done())?;
        let limit = Instant::now() + WAY_BACK;
        cast.until(limit, "the answer of resolve", |cast| cast.facts(child).ended.map(drop))?;
        Ok(cast.facts(child).resolved.clone().map(|words| format!("airlift resolve on the source: {words}")))
    }

    /// The error of the side that knows most.
    fn error(
        &self,
        cast: &Cast,
        parts: &Parts<'_>,
        sent: Option<&ReportView>,
        received: Option<&ReportView>,
    ) -> ErrorView {
        let theirs = received.and_then(|r| r.error.clone());
        if let Some(error) = sent.and_then(|r| r.error.clone()) {
            return error;
        }
        if sent.is_some_and(|r| r.outcome == Outcome::Cancelled) {
            let phase = self.fault.map_or("unknown", |f| f.phase().name());
            return ErrorView::new("the migration was cancelled").on("source").phase(phase);
        }
        let status = cast.facts(parts.sender).ended.map(|s| s.to_string()).unwrap_or_default();
        let phase = self.fault.map_or("unknown", |f| f.phase().name());
        ErrorView::new(format!("send ended without a result ({status})"))
            .on("source")
            .phase(phase)
            .because(theirs)
            .advise("the journal says whether the guest may run on the source: airlift resolve has read it")
    }

    /// Never both sides, and no side's word against what its machine does.
    fn check_for_contradictions(
        &self,
        cast: &Cast,
        parts: &Parts<'_>,
        sent: Option<&ReportView>,
        result: &mut DemoResult,
    ) {
        let mut problem = None;
        if let Some(report) = sent
            && report.source_running != Running::Unknown
            && result.source_running != Running::Unknown
            && report.source_running != result.source_running
        {
            problem = Some(format!(
                "send says that the guest on the source {}, and it {}",
                does_run(report.source_running),
                does_run(result.source_running)
            ));
        }
        let source = live(cast, parts.source);
        let destination = live(cast, parts.destination);
        if let Some((s, d)) = first_overlap(&source, &destination) {
            problem = Some(format!(
                "both sides were live at once: {} of the source from {} to {:?} ns and {} of the \
                 destination from {} to {:?} ns",
                s.what, s.when.start_ns, s.when.end_ns, d.what, d.when.start_ns, d.when.end_ns
            ));
        }
        if let Some(problem) = problem {
            let advice = "this is a defect in airlift: please report it with the seed and the options";
            result.error = Some(ErrorView::new(problem).because(result.error.take()).advise(advice));
            if result.outcome == Outcome::Completed {
                result.outcome = Outcome::Aborted;
            }
        }
    }
}

const fn does_run(running: Running) -> &'static str {
    match running {
        Running::Yes => "runs",
        Running::No => "does not run",
        Running::Unknown => "may run",
    }
}

/// When vCPUs and devices of a host were live, from their own logs.
fn live(cast: &Cast, host: &Host) -> Vec<Live> {
    let vm = cast.facts(host.vm).report.iter().flat_map(|r| &r.run_intervals);
    let mut all: Vec<Live> = vm.map(|when| Live { what: "vCPUs".into(), when: *when }).collect();
    for server in &host.devices {
        let facts = cast.facts(server.child);
        let spans = device_live(&facts.soft, host.side == Side::Source, facts.killed_ns);
        all.extend(spans.into_iter().map(|when| Live { what: format!("device {}", server.id), when }));
    }
    all
}

/// The end, from both reports and from where the guest was found.
fn outcome(
    sent: Option<&ReportView>,
    received: Option<&ReportView>,
    source: Running,
    destination: Running,
) -> Outcome {
    let arrived = received.is_some_and(|r| r.outcome == Outcome::Completed)
        && destination == Running::Yes
        && source == Running::No;
    match sent.map(|r| r.outcome) {
        // The source was not told, or is no more; whoever can see both sides knows.
        None | Some(Outcome::InDoubt) if arrived => Outcome::Completed,
        Some(outcome) => outcome,
        None if source == Running::Yes && destination != Running::Yes => Outcome::Aborted,
        None => Outcome::InDoubt,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    fn report(outcome: Outcome) -> ReportView {
        let mut report = ReportView::refused("source", ErrorView::new("x"), Exit::Failed);
        report.outcome = outcome;
        report
    }

    #[test]
    fn a_killed_sender_leaves_the_answer_to_where_the_guest_runs() {
        let done = report(Outcome::Completed);
        let failed = report(Outcome::Aborted);
        use Running::{No, Unknown, Yes};
        assert_eq!(outcome(None, Some(&done), No, Yes), Outcome::Completed);
        assert_eq!(outcome(None, Some(&failed), Yes, No), Outcome::Aborted);
        assert_eq!(outcome(None, None, No, No), Outcome::InDoubt);
        assert_eq!(outcome(None, None, Unknown, No), Outcome::InDoubt);
    }

    #[test]
    fn a_source_in_doubt_is_answered_by_a_destination_that_runs() {
        let doubt = report(Outcome::InDoubt);
        assert_eq!(
            outcome(Some(&doubt), Some(&report(Outcome::Completed)), Running::No, Running::Yes),
            Outcome::Completed
        );
        assert_eq!(outcome(Some(&doubt), None, Running::No, Running::No), Outcome::InDoubt);
    }
}
