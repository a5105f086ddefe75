//! A VMM that has no migration of its own: it implements `Machine` and gives the rest to
//! `Source` and `Destination`.
//!
//! `SimVm` stands for the VMM; `crates/softdevice/src/simvm/machine.rs` is its `Machine`, method by
//! method. Run it: `cargo run --release -p airlift --example vmm_whole`.

mod support;

use airlift::link::{LinkOptions, Uri, UriAcceptor, UriConnector};
use airlift::machine::Machine;
use airlift::vfio_user::{ClientOptions, MigrationInterface, VfioUserDevice};
use airlift::vmm::VmmDevices;
use airlift::{
    Destination, DestinationOptions, Durability, Environment, FileJournal, Outcome, Source, SourceDevice,
    SourceOptions,
};
use airlift_softdevice::simvm::SimVm;
use std::error::Error;
use std::time::{Duration, Instant};

fn main() -> Result<(), Box<dyn Error>> {
    let v2 = MigrationInterface::V2;
    let (here, there) = (support::Host::new(2, &v2)?, support::Host::new(2, &v2)?);
    let journals = tempfile::tempdir()?;

    // The destination: a machine that waits for its state, its devices, an address, a journal.
    let mut incoming = SimVm::new(there.guest(true))?;
    let arrived = incoming.monitor();
    let its_devices = devices(&mut incoming)?.into_iter().map(|d| d.device).collect();
    let acceptor = UriAcceptor::bind(&"tcp:127.0.0.1:0".parse()?, LinkOptions::default())?;
    let address: Uri = acceptor.local_uri().clone();
    let destination = Destination::new(
        Box::new(incoming),
        its_devices,
        Box::new(acceptor),
        Box::new(FileJournal::create(journals.path().join("destination"), Durability::Process)?),
        Environment::default(),
        DestinationOptions::default(),
    );
    let destination = std::thread::spawn(move || destination.run());

    // The source: a guest that runs, writes memory and lets its devices write to each other.
    let mut guest = SimVm::new(here.guest(false))?;
    guest.resume()?;
    let its_devices = devices(&mut guest)?;
    let source = Source::new(
        Box::new(guest),
        its_devices,
        Box::new(UriConnector::new(address, LinkOptions::default())),
        Box::new(FileJournal::create(journals.path().join("source"), Durability::Process)?),
        Environment::default(),
        SourceOptions::default(),
    );
    let sent = source.run();
    let received = destination.join().map_err(|_| "the destination's thread panicked")?;

    println!("source: {:?}, destination: {:?}", sent.report.outcome, received.report.outcome);
    let mut error = sent.report.error.as_ref();
    while let Some(failure) = error {
        println!("  {} in {}: {failure}", failure.side, failure.phase);
        error = failure.cause.as_deref();
    }
    if let Some(terms) = &sent.report.downtime_terms_ms {
        println!("  downtime: {:.1?} ms: {terms:.1?}", sent.report.downtime_ms);
    }
    let check = arrived.check(Instant::now() + Duration::from_secs(30));
    println!("  the guest on the destination found everything in place: {}", check.is_clean());
    if sent.report.outcome != Outcome::Completed || !check.is_clean() {
        return Err("the migration did not go well".into());
    }
    Ok(())
}

/// A migration works on sockets of its own: guest accesses never wait behind migration data.
fn devices(vm: &mut SimVm) -> Result<Vec<SourceDevice>, Box<dyn Error>> {
    let mut devices = Vec::new();
    for handle in vm.devices()? {
        let device = VfioUserDevice::from_stream(handle.id, handle.fd.into(), ClientOptions::default())?;
        let dirty = device.dirty_source().map(|source| Box::new(source) as _);
        devices.push(SourceDevice { device: Box::new(device), dirty });
    }
    Ok(devices)
}
