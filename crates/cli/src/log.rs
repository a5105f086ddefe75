//! Logs, on stderr and only on request (`AIRLIFT_LOG=debug`): what a user must know is in the output.
//!
//! A line has time, level, the event's name where it has one of its own (`docs/events.md`) or else the
//! module that it comes from, and its fields.

use std::fmt;
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// How the name of an event begins that was given none.
const UNNAMED: &str = "event ";

/// Begins to log what `AIRLIFT_LOG` asks for.
pub(crate) fn start() {
    let filter = EnvFilter::try_from_env("AIRLIFT_LOG").unwrap_or_else(|_| EnvFilter::new("off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).event_format(Named).init();
}

/// Lines with the names of events, which the library's own format leaves out.
struct Named;

impl<S, N> FormatEvent<S, N> for Named
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        SystemTime.format_time(&mut writer)?;
        let metadata = event.metadata();
        let name = match metadata.name() {
            name if name.starts_with(UNNAMED) => metadata.target(),
            name => name,
        };
        write!(writer, " {:>5} {name}: ", metadata.level().as_str())?;
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}
