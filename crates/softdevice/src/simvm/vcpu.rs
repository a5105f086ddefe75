//! The vCPU threads: they write page after page at a chosen rate.

use super::content::PAGE_BYTES;
use super::shared::Shared;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// A vCPU that has fallen this far behind its rate does not catch up.
const MAX_LAG: Duration = Duration::from_millis(100);

/// Runs vCPU number `vcpu` until the machine ends.
pub(super) fn run(shared: &Shared, vcpu: usize) {
    let rate = shared.config.write_rate as f64 / f64::from(shared.config.vcpus) / PAGE_BYTES as f64;
    while shared.gate.enter() {
        if rate == 0.0 {
            while !shared.gate.halted() {
                shared.gate.sleep(Duration::from_secs(1));
            }
            continue;
        }
        let interval = Duration::from_secs_f64((1.0 / rate).min(3600.0));
        let mut due = Instant::now();
        while !shared.gate.halted() {
            let now = Instant::now();
            if now < due {
                shared.gate.sleep(due - now);
                continue;
            }
            if now - due > MAX_LAG {
                due = now;
            }
            due += interval;
            step(shared, vcpu);
        }
    }
}

/// Writes the next page of a vCPU. The lock makes page and counter one for whoever compares them.
fn step(shared: &Shared, vcpu: usize) {
    let mut steps = shared.steps[vcpu].lock().unwrap_or_else(PoisonError::into_inner);
    let pages = &shared.memory.pages;
    let page = pages.vcpu_page(vcpu, pages.orders[vcpu].page(*steps));
    // The page is within memory by construction; a failure would show as wrong content.
    if shared.memory.write_page(page, *steps).is_ok() {
        *steps += 1;
        shared.log.wrote();
    }
}
