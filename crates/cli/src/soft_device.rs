//! `airlift soft-device`.

use crate::args::SoftDeviceArgs;
use crate::exit::Exit;
use crate::json::{ErrorView, Output};
use crate::lines::{Bystander, Listening};
use crate::sockets::Listener;
use crate::units::millis;
use airlift_softdevice::{SoftDevice, SoftDeviceOptions, SoftEvent};
use airlift_vfio_user::{Server, ServerHandle, ServerOptions};
use serde::Serialize;
use std::sync::Arc;

/// An event with the name of its device.
#[derive(Serialize)]
struct Named<'a> {
    device: &'a str,
    #[serde(flatten)]
    event: &'a SoftEvent,
}

/// Serves the device until it is told to end.
pub(crate) fn run(args: &SoftDeviceArgs) -> Exit {
    let output = Arc::new(Output::new(args.json));
    match serve(args, &output) {
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

fn serve(args: &SoftDeviceArgs, output: &Arc<Output>) -> Result<(), Box<ErrorView>> {
    let failed = |message: String| Box::new(ErrorView::new(message).device(&args.name));
    let listener = Listener::bind(&args.socket).map_err(|e| Box::new(e.device(&args.name)))?;
    let (events, name) = (Arc::clone(output), args.name.clone());
    let device = SoftDevice::new(options(args), move |event| tell(&events, &name, &event))
        .map_err(|e| failed(chain(&e)))?;
    let server = Server::new(Box::new(device), ServerOptions::default());
    end_when_told(args.supervised, server.handle()).map_err(|e| failed(format!("no thread: {e}")))?;

    let socket = listener.socket.try_clone().map_err(|e| failed(format!("the socket: {e}")))?;
    let uri = format!("vfio-user:{}", args.socket.display());
    output.say(format!("Serving {} at {uri}", args.name));
    output.event("listening", &Listening { uri });
    server.serve(socket).map(drop).map_err(|e| failed(format!("serving ended: {e}")))
}

/// Ends the server at the first SIGINT or SIGTERM; when supervised also with `quit` or the end of
/// stdin, and then not at SIGINT.
fn end_when_told(supervised: bool, handle: ServerHandle) -> std::io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    if supervised {
        crate::signals::ignore_interrupt()?;
        let lines = crate::signals::stdin_lines()?;
        let handle = handle.clone();
        std::thread::Builder::new().name("supervise".into()).spawn(move || {
            let _ = lines.iter().find(|line| line == "quit");
            handle.stop();
        })?;
    }
    let wanted: &[_] = if supervised { &[SIGTERM] } else { &[SIGTERM, SIGINT] };
    let mut signals = signal_hook::iterator::Signals::new(wanted)?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if signals.forever().next().is_some() {
            handle.stop();
        }
    })?;
    Ok(())
}

fn options(args: &SoftDeviceArgs) -> SoftDeviceOptions {
    SoftDeviceOptions {
        seed: args.seed,
        state_size: args.device.state_size.0,
        dirty_rate: args.device.device_dirty_rate.0,
        ring_rate: args.device.device_dma_rate.0,
        interface: args.device.v1.interface(args.interface),
        accept_other_interface: args.device.device_accept_other_interface,
        precopy: !args.device.device_no_precopy,
        p2p: !args.device.device_no_p2p,
        dma_logging: !args.device.device_no_dirty_log,
        load_time: args.device.device_load_time.0,
        load_rate: args.device.device_load_rate.map(|r| r.0),
        stop_delay: args.stop_delay.0,
        interrupt_in_last_arc: args.last_arc_interrupt,
        validate: !args.no_validate,
        ..SoftDeviceOptions::default()
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

fn tell(output: &Output, device: &str, event: &SoftEvent) {
    if output.is_json() {
        output.tagged(&Named { device, event });
        return;
    }
    let text = match event {
        SoftEvent::Attached { state } => format!("{device}: a client came and found it in {state}"),
        SoftEvent::Detached { reason, state } => {
            format!("{device}: the client went ({reason}); it is in {state}")
        }
        SoftEvent::Reset { .. } => format!("{device}: reset"),
        SoftEvent::Transition { from, to, start_ns, end_ns, errno, reached } => {
            #[expect(clippy::cast_precision_loss, reason = "only for show")]
            let took = millis(end_ns.saturating_sub(*start_ns) as f64 / 1e6);
            match errno {
                None => format!("{device}: {from} -> {to} in {took}"),
                Some(errno) => {
                    format!("{device}: {from} -> {to} failed with {errno} after {took}; in {reached}")
                }
            }
        }
        SoftEvent::Stopped { .. } => return,
        SoftEvent::Loaded { verified: true, .. } => {
            format!("{device}: every byte that was loaded is as seed and sequence demand")
        }
        SoftEvent::Loaded { bad_page, .. } => {
            let page = bad_page.map(|page| format!(", first on page {page}")).unwrap_or_default();
            format!("{device}: what was loaded is WRONG{page}")
        }
    };
    output.say(text);
}
