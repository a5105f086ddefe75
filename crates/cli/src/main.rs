//! The command `airlift`.
//!
//! Arguments are parsed in `args`, each subcommand has a module of its own, `json` has the shapes of
//! the machine-readable output and `render` the words for a person. The migration itself is the
//! crate `airlift`; nothing of it is decided here.
#![forbid(unsafe_code)]

mod afterwards;
mod args;
mod demo;
mod engine;
mod exit;
mod json;
mod lines;
mod log;
mod memory;
mod no_guest;
mod open;
mod probe;
mod receive;
mod render;
mod resolve;
mod send;
mod signals;
mod sim_vm;
mod sockets;
mod soft_device;
mod units;
mod vmm;
mod watcher;

use args::{Cli, Command};
use clap::Parser;
use exit::Exit;
use json::{ErrorView, Output};
use lines::Bystander;
use std::process::ExitCode;

/// Help and version are no errors; wrong arguments are, and a script that asked for JSON gets its
/// result line for them too.
fn refuse(error: &clap::Error) -> ExitCode {
    // If stdout and stderr are gone there is nobody to tell.
    let _ = error.print();
    if !error.use_stderr() {
        return Exit::Done.into();
    }
    if std::env::args_os().any(|arg| arg == "--json") {
        let message = error.render().to_string();
        let first = message.lines().next().unwrap_or_default().trim_start_matches("error: ");
        let refused = Bystander::failed(ErrorView::new(first).advise("see --help"));
        Output::new(true).event("result", &refused);
    }
    Exit::Usage.into()
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse(&error),
    };
    // Two options can be right each and wrong together.
    if let Err(error) = cli.check() {
        return refuse(&error);
    }
    log::start();
    let exit = match cli.command {
        Command::Demo(args) => demo::run(&args),
        Command::SoftDevice(args) => soft_device::run(&args),
        Command::SimVm(args) => sim_vm::run(&args),
        Command::Probe(args) => probe::run(&args),
        Command::Send(args) => send::run(&args),
        Command::Receive(args) => receive::run(&args),
        Command::Resolve(args) => resolve::run(&args),
    };
    exit.into()
}
