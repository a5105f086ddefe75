//! Several sources for one device, of which the first that starts is used.

use airlift_core::{DirtyError, DirtySource, DomainId, IovaRange};

/// Starts the first of its sources that can be started, and is that one from then on. Its
/// [`domain`](DirtySource::domain) changes with it.
struct Fallback {
    now: Box<dyn DirtySource>,
    /// The next is the last.
    others: Vec<Box<dyn DirtySource>>,
}

/// The sources as one, in the order in which they are tried; `None` when there are none.
pub(super) fn first_that_starts(mut sources: Vec<Box<dyn DirtySource>>) -> Option<Box<dyn DirtySource>> {
    sources.reverse();
    let now = sources.pop()?;
    if sources.is_empty() {
        return Some(now);
    }
    Some(Box::new(Fallback { now, others: sources }))
}

fn joined(first: Option<DirtyError>, then: DirtyError) -> DirtyError {
    match first {
        None => then,
        Some(first) => {
            let message = format!("{}; and then {then}", first.message);
            DirtyError { message, ..first }
        }
    }
}

impl DirtySource for Fallback {
    fn domain(&self) -> &DomainId {
        self.now.domain()
    }

    fn page_size(&self) -> u64 {
        self.now.page_size()
    }

    fn start(&mut self, ranges: &[IovaRange]) -> Result<(), DirtyError> {
        let mut why: Option<DirtyError> = None;
        loop {
            let Err(error) = self.now.start(ranges) else { return Ok(()) };
            let Some(next) = self.others.pop() else {
                // The last one's own error may hide why the better ones were not used.
                return Err(joined(why, error));
            };
            tracing::warn!(
                from = %self.now.domain(), to = %next.domain(), error = %error,
                "a source of dirty pages could not be started; the next one is tried"
            );
            why = Some(joined(why, error));
            self.now = next;
        }
    }

    fn report(&mut self, range: IovaRange, dirty: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError> {
        self.now.report(range, dirty)
    }

    fn stop(&mut self) -> Result<(), DirtyError> {
        self.now.stop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Source(DomainId, bool);

    impl DirtySource for Source {
        fn domain(&self) -> &DomainId {
            &self.0
        }
        fn page_size(&self) -> u64 {
            4096
        }
        fn start(&mut self, _: &[IovaRange]) -> Result<(), DirtyError> {
            if self.1 {
                return Ok(());
            }
            Err(DirtyError { operation: "start".into(), errno: None, message: format!("not {}", self.0) })
        }
        fn report(&mut self, _: IovaRange, _: &mut dyn FnMut(IovaRange)) -> Result<(), DirtyError> {
            Ok(())
        }
        fn stop(&mut self) -> Result<(), DirtyError> {
            Ok(())
        }
    }

    fn fallback(list: &[(&str, bool)]) -> Box<dyn DirtySource> {
        let sources = list.iter().map(|(name, works)| {
            let source: Box<dyn DirtySource> = Box::new(Source(DomainId((*name).into()), *works));
            source
        });
        first_that_starts(sources.collect()).unwrap()
    }

    #[test]
    fn the_first_that_starts_is_used_and_named() {
        let mut source = fallback(&[("page-table", false), ("device", false), ("container", true)]);
        assert_eq!(source.domain().0, "page-table");
        source.start(&[]).unwrap();
        assert_eq!(source.domain().0, "container");
        let mut first = fallback(&[("device", true), ("container", true)]);
        first.start(&[]).unwrap();
        assert_eq!(first.domain().0, "device");
        assert!(first_that_starts(Vec::new()).is_none());
    }

    #[test]
    fn when_none_starts_the_reasons_are_all_there() {
        let mut source = fallback(&[("page-table", false), ("device", false), ("container", false)]);
        let error = source.start(&[]).unwrap_err().to_string();
        for name in ["not page-table", "not device", "not container"] {
            assert!(error.contains(name), "{error}");
        }
    }
}
