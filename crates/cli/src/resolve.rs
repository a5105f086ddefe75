//! `airlift resolve`: after a crash, what the journal says about the guest here, and what is done
//! about it.
//!
//! The journal alone decides what may be done without an operator: a source whose COMMIT is not
//! durable may run its guest again. After COMMIT nothing is done here but on the operator's word.

use crate::args::ResolveArgs;
use crate::engine;
use crate::exit::Exit;
use crate::json::{ErrorView, Output};
use crate::no_guest::NoGuest;
use crate::open::{self, Purpose};
use airlift::machine::Machine;
use airlift::vmm::RemoteVmm;
use airlift::{FileJournal, Running, SourceDevice};
use airlift_core::commit::{
    BootId, DestinationVerdict, Durability, Journal, Opened, Record, SourceVerdict, destination_verdict,
    source_verdict,
};
use airlift_core::{
    Action, DeviceState, Failure, Fate, MigrationDevice, Phase, ResetPolicy, ResumeDevice, Rollback, Side,
};
use serde::Serialize;
use std::path::PathBuf;

/// What was found and done.
#[derive(Debug, Serialize)]
struct Resolved {
    /// `completed`: the guest is where it belongs; `in_doubt`: nothing was done.
    outcome: &'static str,
    side: Side,
    source_running: Running,
    destination_running: Running,
    /// What the journal says.
    verdict: String,
    /// What was done, in a sentence.
    message: String,
    /// Devices that were given up on the way, with the reason.
    quarantined: Vec<String>,
    error: Option<ErrorView>,
}

/// The journal of one side.
struct Found {
    side: Side,
    path: PathBuf,
    records: Vec<Record>,
}

/// The machine of this host and its devices.
struct Here {
    machine: Box<dyn Machine>,
    devices: Vec<SourceDevice>,
}

/// Reads the journal and acts on it.
pub(crate) fn run(args: &ResolveArgs) -> Exit {
    let output = Output::new(args.json);
    let (resolved, exit) = resolve(args).unwrap_or_else(|(side, error)| {
        let resolved = Resolved {
            outcome: "aborted",
            side,
            source_running: Running::Unknown,
            destination_running: Running::Unknown,
            verdict: String::new(),
            message: error.message.clone(),
            quarantined: Vec::new(),
            error: Some(*error),
        };
        (resolved, Exit::Failed)
    });
    if let Some(error) = &resolved.error {
        output.say(crate::render::error_text(error));
    } else {
        output.say(format!("The journal: {}.\n{}.", resolved.verdict, resolved.message));
    }
    output.event("result", &resolved);
    exit
}

type Failed = (Side, Box<ErrorView>);

fn resolve(args: &ResolveArgs) -> Result<(Resolved, Exit), Failed> {
    let found = find(args).map_err(|e| (Side::Source, e))?;
    let side = found.side;
    let boot = airlift::kernel_boot_id();
    match side {
        Side::Source => source(args, &found, &boot),
        Side::Destination => destination(args, &found, &boot),
    }
    .map_err(|e| (side, Box::new(e.on(&side.to_string()))))
}

/// The journal in the directory: of one side, not of both.
fn find(args: &ResolveArgs) -> Result<Found, Box<ErrorView>> {
    let path = |side| engine::journal_path(&args.journal, side);
    let side = match (path(Side::Source).exists(), path(Side::Destination).exists()) {
        (true, true) => {
            return Err(Box::new(
                ErrorView::new(format!("{} has journals of both sides", args.journal.display()))
                    .advise("each host keeps its own directory: name the one of this host"),
            ));
        }
        (false, true) => Side::Destination,
        // No journal at all is the source's question too: it is answered with doubt, below.
        _ => Side::Source,
    };
    let path = path(side);
    let records = if path.exists() {
        FileJournal::read(&path).map_err(|e| {
            Box::new(ErrorView::new(e.to_string()).advise(
                "what it would have said is in doubt: look at the other host, then decide with \
                 --run-here or --stay-stopped",
            ))
        })?
    } else {
        Vec::new()
    };
    Ok(Found { side, path, records })
}

fn opened(records: &[Record]) -> Option<&Opened> {
    match records.first() {
        Some(Record::Opened(opened)) => Some(opened),
        _ => None,
    }
}

fn here(args: &ResolveArgs, side: Side) -> Result<Here, Box<ErrorView>> {
    if let Some(address) = &args.vmm {
        let mut vmm: RemoteVmm = engine::greet(address)?;
        let opened = open::from_vmm(&mut vmm, Purpose::Resolve)?;
        return Ok(Here { machine: Box::new(vmm), devices: opened.devices });
    }
    let mut devices = open::named(&args.devices, Purpose::Resolve, None)?.devices;
    // Without a guest it is the devices that run or do not.
    let live = |d: &mut SourceDevice| d.device.state().is_ok_and(DeviceState::is_live);
    let running = side == Side::Source && devices.iter_mut().all(live);
    Ok(Here { machine: Box::new(NoGuest::new(running)), devices })
}

fn source(args: &ResolveArgs, found: &Found, boot: &BootId) -> Result<(Resolved, Exit), ErrorView> {
    let verdict = source_verdict(&found.records, boot);
    let words = match verdict {
        SourceVerdict::RunHere { .. } => "COMMIT was never sent, so this guest may run here".to_owned(),
        SourceVerdict::RolledBack => {
            "the destination had abandoned it, so this guest may run here".to_owned()
        }
        SourceVerdict::Committed => {
            "COMMIT may have been sent, so the destination may run this guest".to_owned()
        }
        SourceVerdict::Done => "the guest runs on the destination".to_owned(),
        SourceVerdict::InDoubt(doubt) => doubt.to_string(),
    };
    let mut here = here(args, Side::Source).map_err(|e| *e)?;
    let running = here.machine.running().map_err(|e| ErrorView::new(e.to_string()).errno(e.errno))?;
    let may_run = match verdict {
        SourceVerdict::RunHere { .. } | SourceVerdict::RolledBack => true,
        // vCPUs are paused before COMMIT and by nobody else: a guest that runs was never committed.
        SourceVerdict::InDoubt(_) => running || args.run_here,
        SourceVerdict::Committed | SourceVerdict::Done => args.run_here,
    };
    if args.stay_stopped || !may_run {
        let done = verdict == SourceVerdict::Done || args.stay_stopped;
        let resolved = Resolved {
            outcome: if done { "completed" } else { "in_doubt" },
            side: Side::Source,
            source_running: if running { Running::Yes } else { Running::No },
            destination_running: if verdict == SourceVerdict::Done { Running::Yes } else { Running::Unknown },
            verdict: words,
            message: if done {
                "The guest stays stopped here".into()
            } else {
                "Nothing was done. Ask the destination; if the guest does not run there and never will, \
                 use --run-here, else --stay-stopped"
                    .into()
            },
            quarantined: Vec::new(),
            error: None,
        };
        return Ok((resolved, if done { Exit::Done } else { Exit::InDoubt }));
    }
    note(found, verdict)?;
    let quarantined = walk_back(&mut here.devices, opened(&found.records))?;
    if !running {
        start(&mut *here.machine)?;
    }
    let running = here.machine.running().unwrap_or(false);
    let message = match (running, quarantined.is_empty()) {
        (true, true) => "The guest and all of its devices run here again".into(),
        (true, false) => format!("The guest runs here again, without: {}", quarantined.join("; ")),
        (false, _) => "The guest was told to run here and does not".into(),
    };
    let exit = match (running, quarantined.is_empty()) {
        (true, true) => Exit::Done,
        (true, false) => Exit::DeviceLost,
        (false, _) => Exit::Failed,
    };
    let resolved = Resolved {
        outcome: if running { "completed" } else { "aborted" },
        side: Side::Source,
        source_running: if running { Running::Yes } else { Running::No },
        destination_running: if args.run_here { Running::Unknown } else { Running::No },
        verdict: words,
        message,
        quarantined,
        error: None,
    };
    Ok((resolved, exit))
}

/// Writes down that the guest runs here again, before it does: a journal with COMMIT alone would say
/// otherwise the next time.
fn note(found: &Found, verdict: SourceVerdict) -> Result<(), ErrorView> {
    let cause = |message: &str| Box::new(Failure::new(Side::Source, Phase::Commit, message));
    let record = match verdict {
        SourceVerdict::RunHere { aborted: true } | SourceVerdict::RolledBack => return Ok(()),
        // Without OPENED there is no session to say anything of.
        _ if opened(&found.records).is_none() => return Ok(()),
        SourceVerdict::RunHere { aborted: false } => {
            Record::Aborted { cause: cause("airlift send ended without a result; airlift resolve took over") }
        }
        _ => Record::RolledBack { cause: cause("the operator's word: airlift resolve --run-here") },
    };
    let durability = opened(&found.records).map_or(Durability::Process, |o| o.durability);
    let failed = |e: String| {
        ErrorView::new(format!("the journal does not take {}: {e}", record.kind()))
            .advise("nothing was started; free the disk and try again")
    };
    let (mut journal, _) = FileJournal::reopen(&found.path, durability).map_err(|e| failed(e.to_string()))?;
    journal.append(&record).map_err(|e| failed(e.to_string()))
}

/// Takes every device back to where it was before the migration, in the order that keeps peers
/// apart. Names those that were given up.
fn walk_back(devices: &mut [SourceDevice], opened: Option<&Opened>) -> Result<Vec<String>, ErrorView> {
    let ran = |device: &dyn MigrationDevice| {
        let before = opened.and_then(|o| o.devices.iter().find(|(id, _)| id == device.id()));
        // What is not written down was never touched, and runs.
        before.is_none_or(|(_, state)| state.is_live())
    };
    let members = devices
        .iter_mut()
        .map(|d| ResumeDevice {
            id: d.device.id().clone(),
            capabilities: d.device.capabilities(),
            ran_before: ran(&*d.device),
            found: d.device.state(),
        })
        .collect();
    let mut rollback = Rollback::new(members, ResetPolicy::Never);
    while let Some(stage) = rollback.next_stage() {
        for step in stage.steps {
            let Some(member) = devices.iter_mut().find(|d| *d.device.id() == step.device) else { continue };
            let result = match step.action {
                Action::SetState(target) => {
                    member.device.set_state(target).map(drop).map_err(|e| e.to_string())
                }
                Action::Reset => member.device.reset().map_err(|e| e.to_string()),
            };
            if let Err(error) = result {
                tracing::warn!(device = %step.device, %error, "a step of the way back failed");
            }
            let found = member.device.state();
            rollback.report(&step.device, found);
        }
    }
    let given_up = rollback.finish().into_iter().filter_map(|r| match r.fate {
        Fate::Quarantined { reason } => Some(format!("{}: {reason}", r.device)),
        Fate::Running | Fate::Stopped => None,
    });
    for device in devices {
        if let Some(dirty) = &mut device.dirty {
            // Logging that was never started, or ended with the connection, is off already.
            let _ = dirty.stop();
        }
    }
    Ok(given_up.collect())
}

/// Lets the guest run here again.
fn start(machine: &mut dyn Machine) -> Result<(), ErrorView> {
    let step =
        |e: airlift::machine::MachineError| ErrorView::new(format!("the guest cannot be started: {e}"));
    machine.reclaim_shared().map_err(step)?;
    // What was raised meanwhile, and what `send` had taken and could not give back.
    let pending = machine.drain_interrupts().map_err(step)?;
    machine.open_device_access().map_err(step)?;
    machine.inject_interrupts(&pending).map_err(step)?;
    machine.resume().map_err(step)
}

fn destination(args: &ResolveArgs, found: &Found, boot: &BootId) -> Result<(Resolved, Exit), ErrorView> {
    let verdict = destination_verdict(&found.records, boot);
    let words = match verdict {
        DestinationVerdict::NeverRan => "LOADED was never sent, so nothing of it ran here".to_owned(),
        DestinationVerdict::Abandoned => "it was abandoned, so it never runs here".to_owned(),
        DestinationVerdict::Hold => "LOADED may have been sent, so the source may have committed".to_owned(),
        DestinationVerdict::Committed => "COMMIT has arrived, and nothing was started".to_owned(),
        DestinationVerdict::MayHaveRun { ran: false } => "it was about to run here, and may have".to_owned(),
        DestinationVerdict::MayHaveRun { ran: true } => "it ran here".to_owned(),
        DestinationVerdict::InDoubt(doubt) => doubt.to_string(),
    };
    if args.run_here {
        return Err(ErrorView::new(format!(
            "the guest cannot be started here by hand ({words}): what the source had drained was lost \
             with airlift receive"
        ))
        .advise(
            "if the guest does not run here, use --stay-stopped here and then --run-here on the source",
        ));
    }
    let harmless = matches!(verdict, DestinationVerdict::NeverRan | DestinationVerdict::Abandoned);
    let resolved = |outcome, running, message: &str| Resolved {
        outcome,
        side: Side::Destination,
        source_running: Running::Unknown,
        destination_running: running,
        verdict: words.clone(),
        message: message.to_owned(),
        quarantined: Vec::new(),
        error: None,
    };
    if !harmless && !args.stay_stopped {
        let message = "Nothing was done. Ask the source; if the guest shall not run here, use --stay-stopped, \
                       which resets the devices here";
        return Ok((resolved("in_doubt", Running::Unknown, message), Exit::InDoubt));
    }
    let mut here = here(args, Side::Destination).map_err(|e| *e)?;
    if here.machine.running().map_err(|e| ErrorView::new(e.to_string()).errno(e.errno))? {
        return Err(ErrorView::new("the guest runs here")
            .advise("stop it in its VMM first, if it really shall not run here"));
    }
    for member in &mut here.devices {
        let reset = member.device.reset().and_then(|()| member.device.state());
        if !matches!(reset, Ok(DeviceState::Running)) {
            let id = member.device.id().to_string();
            return Err(ErrorView::new(format!("its reset failed: {reset:?}")).device(&id));
        }
    }
    if verdict != DestinationVerdict::Abandoned && opened(&found.records).is_some() {
        abandon(found)?;
    }
    Ok((
        resolved("completed", Running::No, "The devices were reset; this session never runs here"),
        Exit::Done,
    ))
}

fn abandon(found: &Found) -> Result<(), ErrorView> {
    let durability = opened(&found.records).map_or(Durability::Process, |o| o.durability);
    let failed = |e: String| ErrorView::new(format!("the journal does not take ABANDONED: {e}"));
    let cause = Failure::new(Side::Destination, Phase::Loaded, "abandoned by airlift resolve");
    let (mut journal, _) = FileJournal::reopen(&found.path, durability).map_err(|e| failed(e.to_string()))?;
    journal.append(&Record::Abandoned { cause: Box::new(cause) }).map_err(|e| failed(e.to_string()))
}
