//! An error as one chain: what, where, why, what to do.

use crate::json::ErrorView;

/// The chain as text, a line for each fact, without a last newline.
pub(crate) fn error_text(error: &ErrorView) -> String {
    let mut lines = vec![format!("Failed: {}.", sentence(&error.message))];
    if let Some(place) = place(error) {
        lines.push(format!("  where:   {place}"));
    }
    let mut cause = error.cause.as_deref();
    while let Some(error) = cause {
        let place = place(error).map(|p| format!(" ({p})")).unwrap_or_default();
        lines.push(format!("  because: {}{place}", sentence(&error.message)));
        cause = error.cause.as_deref();
    }
    let mut advised = Some(error);
    while let Some(error) = advised {
        if let Some(advice) = &error.advice {
            lines.push(format!("  advice:  {}.", sentence(advice)));
        }
        advised = error.cause.as_deref();
    }
    lines.join("\n")
}

/// Without the full stop that the caller sets.
fn sentence(text: &str) -> &str {
    text.trim().trim_end_matches('.')
}

fn place(error: &ErrorView) -> Option<String> {
    let mut parts = Vec::new();
    if let Some(side) = &error.side {
        parts.push(side.clone());
    }
    if let Some(device) = &error.device {
        parts.push(format!("device {device}"));
    }
    if let Some(phase) = &error.phase {
        parts.push(format!("phase {phase}"));
    }
    if let Some(state) = &error.state {
        parts.push(format!("state {state}"));
    }
    if let Some(errno) = &error.errno {
        parts.push(if errno.name.is_empty() {
            format!("errno {}", errno.number)
        } else {
            format!("{} ({})", errno.name, errno.number)
        });
    }
    (!parts.is_empty()).then(|| parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use airlift_core::Errno;

    #[test]
    fn the_chain_names_every_fact_once() {
        let cause = ErrorView::new("the state's checksum does not match.")
            .on("destination")
            .device("dev1")
            .phase("load")
            .errno(Some(Errno::EINVAL))
            .advise("compare the versions of both device servers");
        let error = ErrorView::new("the destination refused").on("source").phase("await-loaded");
        assert_eq!(
            error_text(&error.because(Some(cause))),
            "Failed: the destination refused.\n\
             \x20 where:   source, phase await-loaded\n\
             \x20 because: the state's checksum does not match (destination, device dev1, phase load, EINVAL (22))\n\
             \x20 advice:  compare the versions of both device servers."
        );
    }
}
