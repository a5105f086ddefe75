//! Both sides of a migration, run to their ends over connections that a test can cut.

use super::{Dial, FakeMachine, LONG, MemoryJournal, memory, network};
use airlift::core::{Failure, MigrationDevice};
use airlift::link::{Connector, LinkError, Stream};
use airlift::{
    Deadlines, Destination, DestinationOptions, Ended, Environment, MigrationReport, Outcome, Running,
    Source, SourceDevice, SourceOptions,
};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// The connections of a source.
#[derive(Clone, Default)]
pub(crate) struct Wires(Arc<Mutex<Vec<Stream>>>);

impl Wires {
    /// Cuts all that there are now.
    pub(crate) fn cut(&self) {
        self.0.lock().unwrap().drain(..).for_each(|stream| stream.shutdown());
    }
}

struct Tap(Dial, Wires);

impl Connector for Tap {
    fn connect(&mut self, deadline: Duration) -> Result<Stream, LinkError> {
        let stream = self.0.connect(deadline)?;
        self.1.0.lock().unwrap().push(stream.try_clone()?);
        Ok(stream)
    }
}

/// What a migration begins with. Tests change what they are about.
pub(crate) struct Sides {
    pub(crate) from: FakeMachine,
    pub(crate) to: FakeMachine,
    pub(crate) source: SourceOptions,
    pub(crate) destination: DestinationOptions,
    pub(crate) wires: Wires,
}

impl Sides {
    pub(crate) fn new() -> Self {
        let deadlines = Deadlines { precopy: LONG, ..Deadlines::default() };
        Self {
            from: FakeMachine::new(Some(memory(7)), true),
            to: FakeMachine::new(Some(memory(0)), false),
            source: SourceOptions { deadlines, downtime_limit: LONG, ..SourceOptions::default() },
            destination: DestinationOptions { deadlines, ..DestinationOptions::default() },
            wires: Wires::default(),
        }
    }

    /// Moves these devices. Gives what both sides report.
    pub(crate) fn migrate(
        self,
        here: Vec<Box<dyn MigrationDevice>>,
        there: Vec<Box<dyn MigrationDevice>>,
    ) -> (MigrationReport, MigrationReport) {
        let (dial, door) = network();
        let environment = Environment::default;
        let journal = || Box::new(MemoryJournal);
        let destination = Destination::new(
            Box::new(self.to),
            there,
            Box::new(door),
            journal(),
            environment(),
            self.destination,
        );
        let received = std::thread::spawn(move || destination.run());
        let devices = here.into_iter().map(|device| SourceDevice { device, dirty: None }).collect();
        let tap = Tap(dial, self.wires);
        let source =
            Source::new(Box::new(self.from), devices, Box::new(tap), journal(), environment(), self.source);
        let sent: Ended = source.run();
        (sent.report, received.join().unwrap().report)
    }
}

/// Everything that an error says, with its causes and advice.
pub(crate) fn text(error: Option<&Failure>) -> String {
    let mut text = String::new();
    let mut next = error;
    while let Some(failure) = next {
        let device = failure.device.as_ref().map(|id| format!("{id}: ")).unwrap_or_default();
        let advice = failure.advice.as_ref().map(|advice| format!("; {advice}")).unwrap_or_default();
        text.push_str(&format!("{device}{failure}{advice}\n"));
        next = failure.cause.as_deref();
    }
    text
}

/// Everything that a report says in words.
pub(crate) fn words(report: &MigrationReport) -> String {
    format!("{:?}\n{}{}", report.outcome, text(report.error.as_ref()), report.notes.join("\n"))
}

/// Both sides have completed.
pub(crate) fn assert_completed((sent, received): &(MigrationReport, MigrationReport)) {
    assert_eq!(sent.outcome, Outcome::Completed, "{}", words(sent));
    assert_eq!(received.outcome, Outcome::Completed, "{}", words(received));
    assert_eq!((sent.source_running, sent.destination_running), (Running::No, Running::Yes));
}
