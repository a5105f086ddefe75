//! What each page of guest memory is for.
//!
//! Pages are numbered from 0 through both regions. Page 0 is the pvclock's; then come the rings, one
//! for each device; then blocks of 64 pages: 32 that vCPUs write, 16 that are filled at boot and never
//! written again, 16 that stay zero. vCPU pages beyond the working set are filled at boot too.

use super::config::{SimVmConfig, SimVmError};
use super::content::{Order, PAGE_BYTES, mix};
use crate::registers::ring_bytes;

const BLOCK: u64 = 64;
const BLOCK_VCPU: u64 = 32;
const BLOCK_BOOT: u64 = 48;
/// Where the upper region begins, and the hole for devices ends.
pub(super) const HIGH_START: u64 = 4 << 30;
const MAX_LOW: u64 = 3 << 30;
/// Where the BAR of the first device is mapped, and how far the next one is.
const BAR_START: u64 = MAX_LOW;
const BAR_STRIDE: u64 = 32 << 20;
/// The page that the pvclock record writes when it is saved.
pub(super) const PVCLOCK_PAGE: u64 = 0;

/// What a page is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The pvclock's or a ring's: checked by those.
    Reserved,
    /// Written by a vCPU.
    Vcpu {
        /// Which.
        vcpu: usize,
        /// Number of the page among that vCPU's.
        local: u64,
    },
    /// Filled at boot.
    Boot,
    /// Never written.
    Zero,
}

/// The use of guest memory.
#[derive(Clone, Debug)]
pub(super) struct Pages {
    /// Pages in all.
    pub(super) total: u64,
    /// Pages of the lower region.
    pub(super) low: u64,
    reserved: u64,
    ring_pages: u64,
    vcpus: u64,
    /// Pages that vCPUs write, in all.
    written: u64,
    /// For each vCPU, the order in which it writes its pages.
    pub(super) orders: Vec<Order>,
}

impl Pages {
    pub(super) fn new(config: &SimVmConfig) -> Result<Self, SimVmError> {
        let total = config.memory / PAGE_BYTES;
        let low = (config.memory / 2).min(MAX_LOW) / PAGE_BYTES;
        let ring_pages = ring_bytes(config.ring_entries).div_ceil(PAGE_BYTES);
        let reserved = 1 + config.devices.len() as u64 * ring_pages;
        if reserved > low {
            let why = format!("{} bytes are too few for the rings of the devices", config.memory);
            return Err(SimVmError::Config { what: "memory", why });
        }
        let rest = total - reserved;
        let most = rest / BLOCK * BLOCK_VCPU + (rest % BLOCK).min(BLOCK_VCPU);
        let wanted = config.working_set.map_or(most, |bytes| bytes.div_ceil(PAGE_BYTES));
        let vcpus = u64::from(config.vcpus);
        let written = wanted.min(most);
        if written < vcpus {
            let why = format!("{written} pages are fewer than {vcpus} vCPUs");
            return Err(SimVmError::Config { what: "working_set", why });
        }
        let order = |vcpu: u64| Order::new((written - vcpu).div_ceil(vcpus), mix(config.seed ^ mix(vcpu)));
        let orders = (0..vcpus).map(order).collect();
        Ok(Self { total, low, reserved, ring_pages, vcpus, written, orders })
    }

    /// First page of the ring of device number `device`.
    pub(super) const fn ring(&self, device: u64) -> u64 {
        1 + device * self.ring_pages
    }

    /// Where the guest sees a page.
    pub(super) const fn gpa(&self, page: u64) -> u64 {
        if page < self.low { page * PAGE_BYTES } else { HIGH_START + (page - self.low) * PAGE_BYTES }
    }

    /// What a page is for.
    pub(super) fn role(&self, page: u64) -> Role {
        let Some(page) = page.checked_sub(self.reserved) else { return Role::Reserved };
        let in_block = page % BLOCK;
        if in_block >= BLOCK_BOOT {
            return Role::Zero;
        }
        let number = page / BLOCK * BLOCK_VCPU + in_block;
        if in_block >= BLOCK_VCPU || number >= self.written {
            return Role::Boot;
        }
        // Below the number of vCPUs, at most 64.
        let vcpu = usize::try_from(number % self.vcpus).unwrap_or(0);
        Role::Vcpu { vcpu, local: number / self.vcpus }
    }

    /// The page with number `local` among those of `vcpu`.
    pub(super) const fn vcpu_page(&self, vcpu: usize, local: u64) -> u64 {
        let number = local * self.vcpus + vcpu as u64;
        self.reserved + number / BLOCK_VCPU * BLOCK + number % BLOCK_VCPU
    }
}

/// Where the guest maps BAR2 of device number `device`.
pub(super) const fn bar_address(device: u64) -> u64 {
    BAR_START + device * BAR_STRIDE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vcpu_page_is_found_again_and_each_role_is_there() {
        for (vcpus, working_set) in [(1, None), (3, None), (2, Some(100 * PAGE_BYTES))] {
            let config = SimVmConfig { memory: 4 << 20, vcpus, working_set, ..SimVmConfig::default() };
            let pages = Pages::new(&config).unwrap();
            let mut counts = [0_u64; 4];
            for page in 0..pages.total {
                match pages.role(page) {
                    Role::Reserved => counts[0] += 1,
                    Role::Vcpu { vcpu, local } => {
                        assert_eq!(pages.vcpu_page(vcpu, local), page);
                        counts[1] += 1;
                    }
                    Role::Boot => counts[2] += 1,
                    Role::Zero => counts[3] += 1,
                }
            }
            assert_eq!(counts.iter().sum::<u64>(), 1024);
            assert!(counts.iter().all(|&n| n > 0), "{counts:?}");
            assert_eq!(counts[1], working_set.map_or(512, |_| 100));
        }
    }
}
