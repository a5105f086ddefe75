//! `airlift receive`.

use crate::afterwards;
use crate::args::ReceiveArgs;
use crate::engine::{self, Prepared};
use crate::exit::Exit;
use crate::json::{ErrorView, Output, ReportView};
use crate::lines::Listening;
use crate::render;
use crate::watcher::Ticker;
use airlift::link::{LinkOptions, UriAcceptor};
use airlift::{Destination, DestinationOptions};
use airlift_core::Side;
use std::sync::Arc;

/// Runs the destination's side.
pub(crate) fn run(args: &ReceiveArgs) -> Exit {
    let output = Arc::new(Output::new(args.attach.json));
    match migrate(args, &output) {
        Ok(report) => {
            output.event("result", &report.0);
            report.1
        }
        Err(error) => engine::refuse(&output, Side::Destination, *error),
    }
}

fn migrate(args: &ReceiveArgs, output: &Arc<Output>) -> Result<(ReportView, Exit), Box<ErrorView>> {
    let prepared = engine::prepare(&args.attach, Side::Destination, output)?;
    let options = DestinationOptions {
        receive_budget: args.receive_budget.0,
        deadlines: engine::deadlines(&args.attach),
        listen: args.wait.map(|w| w.0),
        ..DestinationOptions::default()
    };
    let acceptor =
        UriAcceptor::bind(&args.uri, LinkOptions { insecure: args.attach.insecure }).map_err(|e| {
            Box::new(ErrorView::new(e.to_string()).on("destination").phase("listen").errno(e.errno))
        })?;
    let uri = acceptor.local_uri().to_string();
    let Prepared { machine, devices, kernel, notes, journal, environment, canceller, vmm } = prepared;
    let devices: Vec<_> = devices.into_iter().map(|d| d.device).collect();
    let ids = devices.iter().map(|d| d.id().clone()).collect();

    let destination = Destination::new(machine, devices, Box::new(acceptor), journal, environment, options);
    let control = destination.control();
    canceller.arm(control.clone());
    output.event("listening", &Listening { uri: uri.clone() });
    output.say(format!("Listening at {uri}"));
    let ticker = Ticker::start(Arc::clone(output), control, ids)
        .map_err(|e| Box::new(ErrorView::new(format!("no thread for progress: {e}")).on("destination")))?;
    let ended = destination.run();
    ticker.stop();
    if let Some(vmm) = vmm {
        vmm.ended(ended.report.outcome);
    }
    let mut report = ReportView::new("destination", &ended.report);
    report.notes.extend(notes);
    report.notes.extend(afterwards::closing(&kernel, Side::Destination, ended.report.outcome));
    report.name_memory(&args.attach.memory);
    // A person reads it before somebody else takes over; in JSON it is the last line.
    output.say(render::report_text(&report));
    let exit = match Exit::of_report(&ended.report) {
        Exit::Done if args.afterwards.is_any() => {
            let (exit, error) = afterwards::run(&args.afterwards, &kernel, &canceller, output);
            report.error = error.map(|e| *e);
            exit
        }
        Exit::InDoubt => {
            afterwards::hold_in_doubt(&kernel, Side::Destination, &canceller, output);
            Exit::InDoubt
        }
        exit => exit,
    };
    report.exit_code = exit.code();
    // Devices were open until here, and what they reach by DMA was mapped.
    drop(ended);
    Ok((report, exit))
}
