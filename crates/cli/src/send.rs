//! `airlift send`.

use crate::afterwards;
use crate::args::{SendArgs, StallChoice};
use crate::engine::{self, Prepared};
use crate::exit::Exit;
use crate::json::{ErrorView, Output, ReportView};
use crate::render;
use crate::watcher::Ticker;
use airlift::link::{LinkOptions, UriConnector};
use airlift::{Outcome, Source, SourceOptions, StallPolicy, TestOptions};
use airlift_core::Side;
use std::sync::Arc;

/// Runs the source's side.
pub(crate) fn run(args: &SendArgs) -> Exit {
    let output = Arc::new(Output::new(args.attach.json));
    match migrate(args, &output) {
        Ok(report) => {
            output.event("result", &report.0);
            report.1
        }
        Err(error) => engine::refuse(&output, Side::Source, *error),
    }
}

fn migrate(args: &SendArgs, output: &Arc<Output>) -> Result<(ReportView, Exit), Box<ErrorView>> {
    let prepared = engine::prepare(&args.attach, Side::Source, output)?;
    let options = options(args);
    let connector = UriConnector::new(args.uri.clone(), LinkOptions { insecure: args.attach.insecure });
    let Prepared { machine, devices, kernel, notes, journal, environment, canceller, vmm } = prepared;
    let ids = devices.iter().map(|d| d.device.id().clone()).collect();

    let source = Source::new(machine, devices, Box::new(connector), journal, environment, options);
    let control = source.control();
    canceller.arm(control.clone());
    let ticker = Ticker::start(Arc::clone(output), control, ids)
        .map_err(|e| Box::new(ErrorView::new(format!("no thread for progress: {e}")).on("source")))?;
    let ended = source.run();
    ticker.stop();
    if let Some(vmm) = vmm {
        vmm.ended(ended.report.outcome);
    }
    let mut report = ReportView::new("source", &ended.report);
    report.notes.extend(notes);
    report.notes.extend(afterwards::closing(&kernel, Side::Source, ended.report.outcome));
    report.name_memory(&args.attach.memory);
    // A person reads it before devices are held; in JSON it is the last line.
    output.say(render::report_text(&report));
    if ended.report.outcome == Outcome::InDoubt {
        afterwards::hold_in_doubt(&kernel, Side::Source, &canceller, output);
    }
    Ok((report, Exit::of_report(&ended.report)))
}

fn options(args: &SendArgs) -> SourceOptions {
    let sabotage = args.attach.sabotage;
    SourceOptions {
        downtime_limit: args.downtime_limit.0,
        channels: args.channels,
        stall_policy: match args.on_stall {
            StallChoice::Wait => StallPolicy::Wait,
            StallChoice::Force => StallPolicy::Force,
            StallChoice::Abort => StallPolicy::Abort,
        },
        assume_no_peer_dma: args.assume_no_peer_dma,
        deadlines: engine::deadlines(&args.attach),
        test: TestOptions {
            skip_p2p: sabotage == Some(crate::args::Sabotage::SkipP2p),
            sync_before_records: sabotage == Some(crate::args::Sabotage::SyncBeforeRecords),
        },
        ..SourceOptions::default()
    }
}
