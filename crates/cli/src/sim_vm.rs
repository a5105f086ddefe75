//! `airlift sim-vm`.

use crate::args::SimVmArgs;
use crate::exit::Exit;
use crate::json::{ErrorView, Output};
use crate::lines::{Bystander, Listening, SessionEnded};
use crate::signals;
use crate::sockets::Listener;
use airlift::machine::Machine;
use airlift::vmm::{ServeEnd, serve};
use airlift_softdevice::simvm::{SimDevice, SimMonitor, SimReport, SimVm, SimVmConfig};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a check may wait for devices, entries and interrupts.
const CHECK: Duration = Duration::from_secs(20);

/// Runs the machine until it is told to end.
pub(crate) fn run(args: &SimVmArgs) -> Exit {
    let output = Arc::new(Output::new(args.json));
    match machine(args, &output) {
        Ok(()) => {
            output.event("result", &Bystander::done());
            Exit::Done
        }
        Err(error) => {
            output.say(crate::render::error_text(&error));
            output.event("result", &Bystander::failed(*error));
            Exit::Failed
        }
    }
}

fn machine(args: &SimVmArgs, output: &Arc<Output>) -> Result<(), Box<ErrorView>> {
    let failed = |message: String| Box::new(ErrorView::new(message));
    let listener = Listener::bind(&args.listen.0)?;
    let mut vm = SimVm::new(config(args)).map_err(|e| failed(e.to_string()))?;
    if !args.incoming {
        vm.resume().map_err(|e| failed(e.to_string()))?;
    }
    let ended = end_when_told(args, vm.monitor(), output).map_err(|e| failed(format!("no thread: {e}")))?;

    let uri = args.listen.to_string();
    output.say(if args.incoming {
        format!("The guest waits for a migration; use --vmm {uri}")
    } else {
        format!("The guest runs; migrate it with --vmm {uri}")
    });
    output.event("listening", &Listening { uri });
    let (to, sessions) = crossbeam_channel::bounded(0);
    let socket = listener.socket.try_clone().map_err(|e| failed(format!("the socket: {e}")))?;
    std::thread::Builder::new()
        .name("accept".into())
        .spawn(move || while socket.accept().is_ok_and(|(stream, _)| to.send(stream).is_ok()) {})
        .map_err(|e| failed(format!("no thread: {e}")))?;
    loop {
        let stream = crossbeam_channel::select! {
            recv(sessions) -> stream => stream.map_err(|_| failed("no more connections can be taken".into()))?,
            recv(ended) -> _ => return Ok(()),
        };
        // One migration process at a time: the next one waits until this one has gone.
        let line = match serve(&mut vm, stream, "airlift sim-vm") {
            ServeEnd::Closed { outcome } => SessionEnded { outcome, problem: None },
            ServeEnd::Broken(error) => SessionEnded { outcome: None, problem: Some(error.to_string()) },
        };
        let outcome = line.outcome.as_deref().unwrap_or("it did not say how it ended");
        output.say(format!("A migration process has gone: {outcome}"));
        output.event("session-ended", &line);
    }
}

fn config(args: &SimVmArgs) -> SimVmConfig {
    let device = |d: &crate::args::NamedSocket| SimDevice { id: d.id.clone(), socket: d.socket.clone() };
    SimVmConfig {
        memory: args.memory.0,
        vcpus: u32::from(args.vcpus),
        write_rate: args.dirty_rate.0,
        seed: args.seed,
        devices: args.devices.iter().map(device).collect(),
        incoming: args.incoming,
        peer_dma: !args.no_peer_dma,
        ..SimVmConfig::default()
    }
}

/// Obeys lines on stdin; the channel gets a value, or ends, when the machine is to end.
fn end_when_told(
    args: &SimVmArgs,
    monitor: SimMonitor,
    output: &Arc<Output>,
) -> std::io::Result<crossbeam_channel::Receiver<()>> {
    let (to, ended) = crossbeam_channel::bounded(1);
    if args.supervised {
        signals::ignore_interrupt()?;
    }
    let (output, supervised) = (Arc::clone(output), args.supervised);
    let lines = signals::stdin_lines()?;
    std::thread::Builder::new().name("control".into()).spawn(move || {
        let mut quit = supervised;
        for line in &lines {
            match line.as_str() {
                "report" => show(&output, "report", &monitor.report()),
                "check" => show(&output, "check", &monitor.check(Instant::now() + CHECK)),
                "quit" => {
                    quit = true;
                    break;
                }
                "" => {}
                _ => output.say("Known lines are: report, check, quit"),
            }
        }
        // Without a supervisor the end of stdin, as of a service, is no reason to end.
        if quit {
            let _ = to.send(());
        } else {
            // Kept open: a channel that ends means the same as `quit`.
            std::mem::forget(to);
        }
    })?;
    Ok(ended)
}

fn show(output: &Output, event: &str, report: &SimReport) {
    output.event(event, report);
    if output.is_json() {
        return;
    }
    let asked = |count: Option<u64>| count.map_or_else(|| "not asked".to_owned(), |n| n.to_string());
    let word = if report.is_clean() { "nothing is wrong" } else { "SOMETHING IS WRONG" };
    let runs = if report.running { "runs" } else { "does not run" };
    output.say(format!(
        "The guest {runs}; {word}. Sequence numbers missing {}, doubled {}, out of order {}; entries {}; \
         interrupts received {}, lost {}, too many {}; memory {}.",
        report.sequence_gaps,
        report.sequence_duplicates,
        report.out_of_order,
        report.entries_consumed,
        report.interrupts.received,
        asked(report.interrupts.lost),
        asked(report.interrupts.spurious),
        match report.memory_verified {
            Some(true) => "is right",
            Some(false) => "is WRONG",
            None => "was not compared",
        }
    ));
}
