//! Takes a device's state: pages go straight to their place, so that no more than one small record
//! is ever held. What is wrong with the form of the stream is refused at once; whether the whole is
//! right is said when the load ends.

use super::bitmap::PageSet;
use super::content::PAGE;
use super::format::{HEAD, HEADER, Head, Kind, RUN, TRAILER, Trailer, check_header};
use super::registers::{Registers, SAVED_BYTES};
use super::shared::{Core, Shared};
use airlift_core::Errno;
use airlift_vfio_user::Loader;
use crc_fast::{CrcAlgorithm, Digest};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A load that goes on.
pub(crate) struct LoadSession {
    id: u64,
    expect: Expect,
    part: Vec<u8>,
    crc: Digest,
    bytes: u64,
    pages: u64,
    seen: PageSet,
    bar2: Option<Vec<u8>>,
    registers: Option<(u64, u64, Registers)>,
    trailer: Option<Trailer>,
    sums: Option<Sums>,
    failed: Option<Errno>,
}

/// What this side counted before the trailer.
#[derive(Clone, Copy)]
struct Sums {
    pages: u64,
    bytes: u64,
    crc: u64,
}

/// What the next bytes are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    Header,
    Head,
    Pages { page: usize, left: usize, offset: usize },
    Bar2,
    Registers,
    Trailer,
    End,
}

/// What a load that has ended says of itself.
pub(crate) struct LoadEnd {
    /// The device's digest is the one that the source wrote.
    pub(crate) digest_agrees: bool,
}

impl LoadSession {
    pub(crate) fn new(id: u64, pages: usize) -> Self {
        Self {
            id,
            expect: Expect::Header,
            part: Vec::new(),
            crc: Digest::new(CrcAlgorithm::Crc64Nvme),
            bytes: 0,
            pages: 0,
            seen: PageSet::empty(pages),
            bar2: None,
            registers: None,
            trailer: None,
            sums: None,
            failed: None,
        }
    }

    /// Whether `data` is the next record, all of it and nothing else: a transaction as the saver gave it
    /// (V1-CHUNK).
    fn is_whole_record(&self, data: &[u8]) -> bool {
        match self.expect {
            Expect::Header => data.len() == HEADER,
            Expect::Head if self.part.is_empty() => data.first_chunk().is_some_and(|head| {
                Head::get(head).is_ok_and(|head| data.len() as u64 == HEAD as u64 + head.payload())
            }),
            _ => false,
        }
    }

    /// Nothing more is taken.
    const fn refuse(&mut self, errno: Errno) -> Errno {
        self.failed = Some(errno);
        errno
    }

    fn feed(&mut self, shared: &Shared, data: &[u8]) -> Result<(), Errno> {
        if let Some(errno) = self.failed {
            return Err(errno);
        }
        let result = self.take(shared, data);
        self.failed = result.err();
        result
    }

    fn take(&mut self, shared: &Shared, mut data: &[u8]) -> Result<(), Errno> {
        let bar2_size = usize::try_from(shared.options.bar2_size).map_err(|_| Errno::EINVAL)?;
        while !data.is_empty() {
            if let Expect::Pages { .. } = self.expect {
                data = self.take_pages(&mut shared.core(), data);
                continue;
            }
            let need = match self.expect {
                Expect::Header => HEADER,
                Expect::Head => HEAD,
                Expect::Bar2 => bar2_size,
                Expect::Registers => SAVED_BYTES,
                Expect::Trailer => TRAILER,
                Expect::Pages { .. } => 0,
                Expect::End => return Err(Errno::ENOSPC),
            };
            let (part, rest) = data.split_at(data.len().min(need - self.part.len()));
            self.part.extend_from_slice(part);
            data = rest;
            if self.part.len() == need {
                let part = std::mem::take(&mut self.part);
                self.take_part(shared, &part)?;
            }
        }
        Ok(())
    }

    /// Takes bytes of pages; what is left of them.
    fn take_pages<'a>(&mut self, core: &mut Core, mut data: &'a [u8]) -> &'a [u8] {
        while let Expect::Pages { page, left, offset } = self.expect {
            let (part, rest) = data.split_at(data.len().min(PAGE - offset));
            if part.is_empty() {
                break;
            }
            core.memory.load(page, offset, part);
            self.crc.update(part);
            self.bytes += part.len() as u64;
            data = rest;
            self.expect = if offset + part.len() < PAGE {
                Expect::Pages { page, left, offset: offset + part.len() }
            } else {
                self.seen.insert(page);
                self.pages += 1;
                match left {
                    1 => Expect::Head,
                    _ => Expect::Pages { page: page + 1, left: left - 1, offset: 0 },
                }
            };
        }
        data
    }

    fn count(&mut self, part: &[u8]) {
        self.crc.update(part);
        self.bytes += part.len() as u64;
    }

    fn take_part(&mut self, shared: &Shared, part: &[u8]) -> Result<(), Errno> {
        match self.expect {
            Expect::Header => {
                let header = part.try_into().map_err(|_| Errno::EINVAL)?;
                check_header(header, shared.options.state_size, shared.options.bar2_size)?;
                self.count(part);
                self.expect = Expect::Head;
            }
            Expect::Head => {
                let head = Head::get(part.try_into().map_err(|_| Errno::EINVAL)?)?;
                if head.kind == Kind::Trailer {
                    // The trailer counts what is before its record.
                    self.sums = Some(Sums { pages: self.pages, bytes: self.bytes, crc: 0 });
                }
                self.count(part);
                self.expect = self.after(head, shared.options.bar2_size)?;
            }
            Expect::Bar2 => {
                self.count(part);
                self.bar2 = Some(part.to_vec());
                self.expect = Expect::Head;
            }
            Expect::Registers => {
                self.count(part);
                self.registers = Some(Registers::load(part).ok_or(Errno::EINVAL)?);
                self.expect = Expect::Head;
            }
            Expect::Trailer => {
                self.count(&part[..TRAILER - 8]);
                let crc = self.crc.finalize();
                self.sums = self.sums.map(|sums| Sums { crc, ..sums });
                self.trailer = Some(Trailer::get(part.try_into().map_err(|_| Errno::EINVAL)?));
                self.expect = Expect::End;
            }
            Expect::Pages { .. } | Expect::End => {}
        }
        Ok(())
    }

    /// What follows a record's head, if the record may come now.
    fn after(&self, head: Head, bar2_size: u64) -> Result<Expect, Errno> {
        let count = usize::try_from(head.count).map_err(|_| Errno::EINVAL)?;
        let first = usize::try_from(head.first).map_err(|_| Errno::EINVAL)?;
        let done = (self.bar2.is_some(), self.registers.is_some());
        let pages = self.seen.pages();
        match head.kind {
            Kind::Pages => {
                let fits = (1..=RUN).contains(&count) && first < pages && count <= pages - first;
                (fits && done == (false, false)).then_some(Expect::Pages {
                    page: first,
                    left: count,
                    offset: 0,
                })
            }
            Kind::Bar2 => {
                let good = done == (false, false) && u64::from(head.count) == bar2_size && first == 0;
                (good && self.seen.len() == pages).then_some(Expect::Bar2)
            }
            Kind::Registers => {
                let good = done == (true, false) && count == SAVED_BYTES && first == 0;
                good.then_some(Expect::Registers)
            }
            Kind::Trailer => {
                let good = done == (true, true) && count == TRAILER && first == 0;
                good.then_some(Expect::Trailer)
            }
        }
        .ok_or(Errno::EINVAL)
    }

    /// The trailer came, or what came was refused: there is nothing more to wait for.
    pub(crate) const fn is_complete(&self) -> bool {
        self.trailer.is_some() || self.failed.is_some()
    }

    /// Makes what was loaded the device's state (V2-VALIDATE). A load that is incomplete
    /// (V2-TOO-LITTLE), or whose sums are wrong, is refused; with `validate` off, wrong sums are let through.
    pub(crate) fn finish(self, shared: &Shared, core: &mut Core) -> Result<LoadEnd, Errno> {
        if let Some(errno) = self.failed {
            return Err(errno);
        }
        let (Some(bar2), Some((seed, tick, registers)), Some(trailer), Some(sums)) =
            (self.bar2, self.registers, self.trailer, self.sums)
        else {
            return Err(Errno::EINVAL);
        };
        shared.bar2.write(0, &bar2).map_err(|error| Errno(error.raw_errno()))?;
        core.bar2_at_stop = Some(bar2);
        core.registers = registers;
        core.memory.adopt(seed, tick);
        let digest_agrees = shared.digest(core) == trailer.digest;
        let sums_agree = (sums.pages, sums.bytes, sums.crc) == (trailer.pages, trailer.bytes, trailer.crc);
        if shared.options.validate && !(digest_agrees && sums_agree) {
            return Err(Errno::EINVAL);
        }
        Ok(LoadEnd { digest_agrees })
    }
}

/// Writes into the load that is open.
pub(crate) struct SoftLoader {
    shared: Arc<Shared>,
    session: u64,
    free_at: Instant,
}

impl SoftLoader {
    /// For the load that is open.
    pub(crate) fn new(shared: &Arc<Shared>) -> Result<Self, Errno> {
        let session = shared.load().as_ref().ok_or(Errno::ENODEV)?.id;
        Ok(Self { shared: Arc::clone(shared), session, free_at: Instant::now() })
    }
}

impl Loader for SoftLoader {
    fn write(&mut self, data: &[u8]) -> Result<(), Errno> {
        {
            let mut load = self.shared.load();
            let load = load.as_mut().filter(|load| load.id == self.session).ok_or(Errno::ENODEV)?;
            if self.shared.options.takes_whole_records() && !load.is_whole_record(data) {
                return Err(load.refuse(Errno::EINVAL));
            }
            load.feed(&self.shared, data)?;
        }
        if let Some(rate) = self.shared.options.load_rate {
            // The time that these bytes take begins when the last ones' has ended.
            let nanos = data.len() as u128 * 1_000_000_000 / u128::from(rate.max(1));
            let time = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            let now = Instant::now();
            self.free_at = self.free_at.max(now) + time;
            self.shared.sleep(self.free_at - now);
        }
        Ok(())
    }
}
