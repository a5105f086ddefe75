//! What a guest found: its counters, and the full check of memory, devices and interrupts.

use super::clock::RunInterval;
use super::content::PAGE;
use super::layout::Role;
use super::shared::{Shared, locked};
use crate::registers as reg;
use airlift_core::DeviceId;
use airlift_memory::MemoryError;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(5);
/// Looks at counters of interrupts that change all the time, at least.
const LOOKS: u32 = 12;
/// How long an interrupt may be under way.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a SimVm knows of itself. Times are CLOCK_MONOTONIC in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SimReport {
    /// The vCPUs run.
    pub running: bool,
    /// Pages that each vCPU has written, here and before.
    pub vcpu_steps: Vec<u64>,
    /// Entries that a device counts and no ring held, and writes of records to memory that were lost.
    pub sequence_gaps: u64,
    /// Entries that came twice, or are to come once more because a device went back.
    pub sequence_duplicates: u64,
    /// Entries that stood where an earlier one must be.
    pub out_of_order: u64,
    /// Of the gaps: records whose write to guest memory was not there when the guest was to run.
    pub record_mismatches: u64,
    /// Entries consumed from all rings.
    pub entries_consumed: u64,
    /// Interrupts of all devices.
    pub interrupts: InterruptReport,
    /// Memory holds what it must; `None`: not compared.
    pub memory_verified: Option<bool>,
    /// Pages that do not, as far as compared.
    pub memory_bad_pages: u64,
    /// The devices.
    pub devices: Vec<SimDeviceReport>,
    /// First write of a vCPU on this side.
    pub first_write_ns: Option<u64>,
    /// Last write of a vCPU on this side.
    pub last_write_ns: Option<u64>,
    /// Longest time between two writes, one after the other, of any vCPUs on this side.
    pub max_gap_ns: u64,
    /// When vCPUs ran on this side.
    pub run_intervals: Vec<RunInterval>,
    /// How the last migration ended on this side, as the migration process said.
    pub last_outcome: Option<String>,
}

/// Interrupts, of one device or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptReport {
    /// Received by the guest, here and before.
    pub received: u64,
    /// Raised, as the devices say; `None`: not asked.
    pub raised: Option<u64>,
    /// Raised and never received; `None`: not asked.
    pub lost: Option<u64>,
    /// Received more often than raised; `None`: not asked.
    pub spurious: Option<u64>,
}

/// One device, as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SimDeviceReport {
    /// Its name.
    pub id: DeviceId,
    /// It answers.
    pub alive: bool,
    /// Why it does not.
    pub lost: Option<String>,
    /// The device has compared its memory with seed and tick; `None`: not asked.
    pub verified: Option<bool>,
    /// Digest of its state, as it says; it changes while the device works.
    pub digest: Option<u64>,
    /// Its interrupts.
    pub interrupts: InterruptReport,
    /// Its rings: 0 in guest memory, 1 in the BAR of the next device.
    pub rings: Vec<RingReport>,
}

/// One ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingReport {
    /// Entries consumed.
    pub consumed: u64,
    /// Entries missed.
    pub gaps: u64,
    /// Entries that came twice.
    pub duplicates: u64,
}

impl SimReport {
    /// Nothing was found to be wrong. What was not asked does not count.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        let nothing = |count: Option<u64>| count.unwrap_or(0) == 0;
        self.sequence_gaps == 0
            && self.sequence_duplicates == 0
            && self.out_of_order == 0
            && nothing(self.interrupts.lost)
            && nothing(self.interrupts.spurious)
            && self.memory_verified != Some(false)
            && self.devices.iter().all(|d| d.alive && d.verified != Some(false))
    }
}

/// A fault that a test wants the machine to make, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sabotage {
    /// The next fetch of dirty pages with the vCPUs paused leaves out the page that the first vCPU
    /// wrote last.
    LoseDirtyPage,
    /// The next save of the pvclock's record does not write its guest page.
    LosePvclockPage,
    /// One byte of a page that was filled at boot is changed.
    FlipMemoryByte,
    /// The first device's first interrupt is raised once more than the device did.
    RaiseTwice,
}

/// A view of a [`SimVm`](super::SimVm) for other threads: it works while the machine is being
/// migrated.
#[derive(Clone, Debug)]
pub struct SimMonitor(pub(super) Arc<Shared>);

impl SimMonitor {
    /// The counters as they are. Asks no device and compares nothing.
    #[must_use]
    pub fn report(&self) -> SimReport {
        self.0.report()
    }

    /// The full check: compares memory page by page while the guest runs, has devices compare theirs,
    /// waits until the guest has consumed all that devices had produced when it began, and compares
    /// interrupts. With the guest paused or access closed it only compares memory.
    ///
    /// What a device has not answered before `deadline` stays `None`; interrupts and entries that have
    /// not arrived by then are lost.
    #[must_use]
    pub fn check(&self, deadline: Instant) -> SimReport {
        self.0.check(deadline)
    }

    /// Whether all of memory holds what it must.
    ///
    /// # Errors
    /// When there is no guest.
    pub fn verify_memory(&self) -> Result<bool, MemoryError> {
        self.0.bad_pages().map(|bad| bad == 0)
    }

    /// Makes a fault.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn sabotage(&self, what: Sabotage) -> Result<(), String> {
        let shared = &self.0;
        match what {
            Sabotage::LoseDirtyPage => shared.sabotage.lose_dirty_page.store(true, Ordering::Relaxed),
            Sabotage::LosePvclockPage => shared.sabotage.lose_pvclock_page.store(true, Ordering::Relaxed),
            Sabotage::FlipMemoryByte => {
                let mut pages = 0..shared.memory.pages.total;
                let page =
                    pages.find(|&p| shared.memory.pages.role(p) == Role::Boot).ok_or("no such page")?;
                let (mapping, at) = shared.memory.place(page);
                let word = mapping.load_u64(at).map_err(|e| e.to_string())?;
                mapping.store_u64(at, word ^ 1).map_err(|e| e.to_string())?;
            }
            Sabotage::RaiseTwice => {
                let port = shared.ports.first().ok_or("there is no device")?;
                port.vectors.raise(0, 1).map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }
}

impl Shared {
    fn report(&self) -> SimReport {
        let driver = locked(&self.driver);
        let status = locked(&self.status);
        let mut report = SimReport {
            running: self.gate.is_open(),
            vcpu_steps: self.steps.iter().map(|s| *locked(s)).collect(),
            sequence_gaps: status.record_mismatches,
            record_mismatches: status.record_mismatches,
            first_write_ns: self.log.first_write(),
            last_write_ns: self.log.last_write(),
            max_gap_ns: self.log.max_gap(),
            run_intervals: self.log.intervals(),
            last_outcome: status.last_outcome.clone(),
            ..SimReport::default()
        };
        for (device, port) in driver.devices.iter().zip(&self.ports) {
            let received = device.received.iter().sum();
            let lost = port.lost();
            let mut rings = Vec::new();
            for ring in &device.rings {
                let c = &ring.counters;
                report.sequence_gaps += c.gaps;
                report.sequence_duplicates += c.duplicates;
                report.out_of_order += c.out_of_order;
                report.entries_consumed += c.consumed;
                rings.push(RingReport { consumed: c.consumed, gaps: c.gaps, duplicates: c.duplicates });
            }
            report.interrupts.received += received;
            report.devices.push(SimDeviceReport {
                id: port.id.clone(),
                alive: lost.is_none(),
                lost,
                verified: None,
                digest: None,
                interrupts: InterruptReport { received, ..InterruptReport::default() },
                rings,
            });
        }
        report
    }

    fn check(&self, deadline: Instant) -> SimReport {
        let alive = locked(&self.status).alive;
        let memory = alive.then(|| self.bad_pages());
        let usable = self.gate.is_open() && locked(&self.status).access;
        let asked: Vec<_> = if usable { self.ask_devices(deadline) } else { Vec::new() };
        let mut report = self.report();
        match memory {
            Some(Ok(bad)) => (report.memory_verified, report.memory_bad_pages) = (Some(bad == 0), bad),
            Some(Err(_)) => report.memory_verified = Some(false),
            None => {}
        }
        for (device, asked) in report.devices.iter_mut().zip(asked) {
            let Some(asked) = asked else { continue };
            device.verified = asked.verified;
            device.digest = asked.digest;
            device.interrupts.raised = Some(asked.raised);
            device.interrupts.lost = Some(asked.lost);
            device.interrupts.spurious = Some(asked.spurious);
            let all = &mut report.interrupts;
            for (sum, one) in [
                (&mut all.raised, asked.raised),
                (&mut all.lost, asked.lost),
                (&mut all.spurious, asked.spurious),
            ] {
                *sum = Some(sum.unwrap_or(0) + one);
            }
        }
        report
    }

    /// Pages that do not hold what they must. A vCPU waits while one of its pages is copied.
    fn bad_pages(&self) -> Result<u64, MemoryError> {
        let pages = &self.memory.pages;
        let mut content = [0; PAGE];
        let mut bad = 0;
        for page in 0..pages.total {
            let last = match pages.role(page) {
                Role::Reserved => continue,
                Role::Zero => None,
                Role::Boot => Some(super::content::BOOT),
                Role::Vcpu { vcpu, local } => {
                    let steps = locked(&self.steps[vcpu]);
                    self.memory.read_page(page, &mut content)?;
                    pages.orders[vcpu].last_step(local, *steps)
                }
            };
            if !matches!(pages.role(page), Role::Vcpu { .. }) {
                self.memory.read_page(page, &mut content)?;
            }
            bad += u64::from(!self.memory.is_content(&content, page, last));
        }
        Ok(bad)
    }

    fn ask_devices(&self, deadline: Instant) -> Vec<Option<Asked>> {
        // All devices compare at the same time.
        for port in &self.ports {
            if port.read(reg::VERIFIED) == Some(reg::VERIFIED_NEVER) {
                let _ = port.write(reg::VERIFIED, 1);
            }
        }
        (0..self.ports.len()).map(|i| self.ask_device(i, deadline)).collect()
    }

    fn ask_device(&self, i: usize, deadline: Instant) -> Option<Asked> {
        let port = &self.ports[i];
        let verified = wait(deadline, || match port.read(reg::VERIFIED) {
            Some(reg::VERIFIED_RUNNING) => None,
            Some(reg::VERIFIED_YES) => Some(Some(true)),
            Some(reg::VERIFIED_NO) => Some(Some(false)),
            _ => Some(None),
        })
        .flatten();
        let rings: Vec<usize> = locked(&self.driver).devices[i].rings.iter().map(|r| r.index).collect();
        for (n, ring) in rings.into_iter().enumerate() {
            let produced = port.read(reg::ring_register(ring, reg::RING_PRODUCED))?;
            wait(deadline, || {
                let driver = locked(&self.driver);
                (driver.devices[i].rings[n].counters.consumed >= produced).then_some(())
            });
        }
        let mut asked = Asked { verified, digest: port.read(reg::DIGEST), ..Asked::default() };
        let (raised, missing) = self.count_interrupts(i, deadline)?;
        asked.raised = raised;
        for missing in missing {
            asked.lost += u64::try_from(missing).unwrap_or(0);
            asked.spurious += u64::try_from(-missing).unwrap_or(0);
        }
        Some(asked)
    }

    /// Interrupts that device `i` has raised, and how many more of each vector these are than were
    /// received. Some are always under way: the least of many looks is what stays missing. There are
    /// more looks while something is missing.
    fn count_interrupts(&self, i: usize, deadline: Instant) -> Option<(u64, Vec<i64>)> {
        let port = &self.ports[i];
        let patience = Instant::now() + PATIENCE;
        let mut missing: Vec<i64> = vec![i64::MAX; port.vectors.count()];
        for look in 1.. {
            let mut driver = locked(&self.driver);
            let received = &mut driver.devices[i].received;
            for (vector, received) in received.iter_mut().enumerate() {
                *received += port.vectors.take(vector).unwrap_or(0);
            }
            let raised = port.raised()?;
            for ((missing, raised), received) in missing.iter_mut().zip(&raised).zip(received.iter()) {
                *missing = (*missing).min(raised.wrapping_sub(*received).cast_signed());
            }
            drop(driver);
            let enough = look >= LOOKS && (missing.iter().all(|m| *m <= 0) || Instant::now() >= patience);
            if enough || Instant::now() >= deadline {
                return Some((raised.iter().sum(), missing));
            }
            std::thread::sleep(POLL);
        }
        None
    }
}

/// What a device answered.
#[derive(Debug, Default)]
struct Asked {
    verified: Option<bool>,
    digest: Option<u64>,
    raised: u64,
    lost: u64,
    spurious: u64,
}

/// Asks until there is an answer or `deadline` has passed.
fn wait<T>(deadline: Instant, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(POLL);
    }
}
