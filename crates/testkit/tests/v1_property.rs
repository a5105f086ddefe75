//! The user's side of interface v1 against random devices: whatever they answer, it never loops without end,
//! never loses or doubles a byte, and ends in a state that it has read back.
//!
//! A device that is reset between the look at its state and the write that changes it is not among them:
//! the interface gives no means to see that.
#![allow(clippy::unwrap_used, reason = "a test fails where it must")]

use airlift_core::v1::V1Device;
use airlift_core::{
    Chunk, DeviceErrorKind, DeviceState, Errno, LoadSession, MigrationDevice, Piece, RegionArea, SaveSession,
    Session,
};
use airlift_testkit::v1::{Access, Double, DoubleOptions, DoubleRegion, Fault, Layout, Plan, Wrong, bytes};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

const STATES: [DeviceState; 6] = [
    DeviceState::Stop,
    DeviceState::Running,
    DeviceState::StopCopy,
    DeviceState::PreCopy,
    DeviceState::Resuming,
    DeviceState::Error,
];

/// What its user does with a device.
#[derive(Clone, Debug)]
enum Step {
    Set(DeviceState),
    /// Reads with a buffer of so many bytes, so many times.
    Read(usize, usize),
    Info,
    /// Begins a transaction of the first number of bytes where none is open, and writes the second number
    /// of them.
    Write(usize, usize),
    State,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let likely =
        vec![DeviceState::PreCopy, DeviceState::StopCopy, DeviceState::Resuming, DeviceState::Running];
    prop_oneof![
        3 => select(likely).prop_map(Step::Set),
        1 => select(STATES.to_vec()).prop_map(Step::Set),
        5 => (1..300_usize, 1..8_usize).prop_map(|(buffer, times)| Step::Read(buffer, times)),
        1 => Just(Step::Info),
        4 => (1..500_usize, 0..200_usize).prop_map(|(total, now)| Step::Write(total, now)),
        1 => Just(Step::State),
        1 => Just(Step::Reset),
    ]
}

/// Areas of a section of `section` bytes, apart from each other and in no order. They are as large as bytes
/// allow, not pages: nothing in the user's side may depend on it.
fn areas(section: u64) -> impl Strategy<Value = Vec<(u64, u64)>> {
    vec(0..=section, 0..8)
        .prop_map(|mut cuts| {
            cuts.sort_unstable();
            let pair = |pair: &[u64]| (pair[0], pair[1] - pair[0]);
            let mapped = cuts.chunks_exact(2).map(pair);
            mapped.filter(|(_, length)| *length > 0).collect::<Vec<_>>()
        })
        .prop_shuffle()
}

fn pending() -> impl Strategy<Value = u64> {
    prop_oneof![1..200_u64, Just(1), Just(u64::MAX), any::<u64>().prop_map(|n| n.max(1))]
}

fn hollow() -> impl Strategy<Value = u32> {
    prop_oneof![8 => Just(0), 3 => 1..18_u32, 1 => Just(u32::MAX)]
}

/// A correct device, except for what `hollow` gives: its section, what is mapped, what it gives and how.
fn options() -> impl Strategy<Value = DoubleOptions> {
    (1..=300_u64).prop_flat_map(|section| {
        let size = 1..=usize::try_from(section).unwrap();
        let plan = (
            vec(size, 0..10),
            0..10_usize,
            0..4_usize,
            vec(pending(), 0..4),
            vec(hollow(), 0..10),
            vec(0..section, 0..4),
        );
        (areas(section), plan, any::<u32>(), any::<bool>()).prop_map(
            move |(areas, plan, reserved, checks)| {
                let (sizes, precopy, late, pending, hollow, places) = plan;
                let chunks: Vec<_> =
                    sizes.iter().enumerate().map(|(n, size)| bytes(n as u64 + 100, *size)).collect();
                let expects = checks.then(|| chunks.concat());
                let base = DoubleOptions::new(Layout::Trapped, section);
                let start = if areas.is_empty() { base.start } else { 4096 };
                let area = |(offset, length)| RegionArea { offset: start + offset, length };
                DoubleOptions {
                    start,
                    areas: areas.into_iter().map(area).collect(),
                    reserved,
                    expects,
                    plan: Plan { chunks, precopy, late, pending, hollow, places },
                    ..base
                }
            },
        )
    })
}

/// What goes wrong, and where. What a device does by itself it does not do at the write of its state.
fn fault() -> impl Strategy<Value = Fault> {
    let reads = vec![
        Access::ReadState,
        Access::ReadPending,
        Access::ReadOffset,
        Access::ReadSize,
        Access::WriteSize,
        Access::ReadTrapped,
        Access::ReadMapped,
        Access::WriteTrapped,
        Access::WriteMapped,
    ];
    let outside = prop_oneof![0..32_u64, 5000..=u64::MAX, Just(u64::MAX)];
    let refused = Just(Wrong::Refused(Errno::EIO));
    let into = (0..8_u32).prop_map(|bits| Wrong::RefusedInto(Errno::EIO, bits));
    let wrong = prop_oneof![
        4 => (select(reads.clone()), refused).prop_map(|(access, wrong)| (Some(access), wrong)),
        4 => (select(reads.clone()), Just(Wrong::Reset)).prop_map(|(access, wrong)| (Some(access), wrong)),
        2 => (select(reads), select(vec![0, 1, 6]).prop_map(Wrong::Moved))
            .prop_map(|(access, wrong)| (Some(access), wrong)),
        2 => into.prop_map(|wrong| (Some(Access::WriteState), wrong)),
        2 => (0..8_u32).prop_map(|bits| (Some(Access::WriteState), Wrong::Into(bits))),
        2 => Just((Some(Access::WriteState), Wrong::Refused(Errno::EINVAL))),
        1 => Just((None, Wrong::Gone)),
        2 => outside.prop_map(|at| (Some(Access::ReadOffset), Wrong::Answers(at))),
        2 => (5000..=u64::MAX).prop_map(|size| (Some(Access::ReadSize), Wrong::Answers(size))),
    ];
    (wrong, 0..40_u64).prop_map(|((access, wrong), after)| Fault { access, after, times: 1, wrong })
}

/// Some of them. A write of the state that is not made, and a device that then moves where it was to go by
/// itself, look like a write that was made.
fn faults() -> impl Strategy<Value = Vec<Fault>> {
    vec(fault(), 0..3).prop_filter("a device that hides what it does", |faults| {
        let any = |what: fn(&Wrong) -> bool| faults.iter().any(|fault| what(&fault.wrong));
        !any(|wrong| matches!(wrong, Wrong::Into(_)))
            || !any(|wrong| matches!(wrong, Wrong::Reset | Wrong::Moved(_)))
    })
}

/// A device in use, and what is known of its data.
struct Use {
    double: Double,
    device: V1Device<DoubleRegion>,
    areas: usize,
    save: Option<Box<dyn SaveSession>>,
    load: Option<Box<dyn LoadSession>>,
    /// What the device had when its save session began.
    content: Vec<Vec<u8>>,
    /// The session has ended.
    ended: bool,
    /// Bytes that the save session gave, in transactions; and how many of the last one are to come.
    given: Vec<Vec<u8>>,
    rest: u64,
    /// Transactions that the load session took, and what is to come of the one that is open.
    taken: Vec<Vec<u8>>,
    open: Vec<u8>,
    seed: u64,
}

impl Use {
    fn new(options: DoubleOptions) -> Self {
        let areas = options.areas.len();
        let double = Double::new(options);
        let device = double.device("d0").unwrap();
        Self {
            double,
            device,
            areas,
            save: None,
            load: None,
            content: Vec::new(),
            ended: false,
            given: Vec::new(),
            rest: 0,
            taken: Vec::new(),
            open: Vec::new(),
            seed: 0,
        }
    }

    /// Most accesses that one call may make: 17 empty turns of 4, one whole turn, its data cut at each end of
    /// each area, and the look at the state behind an error.
    fn bound(&self) -> usize {
        18 * 4 + 2 * self.areas + 10
    }

    /// Runs a call, which has an end.
    fn call<T>(&mut self, call: impl FnOnce(&mut Self) -> T) -> T {
        self.call_of(0, call)
    }

    /// Runs calls that write so many bytes: each may be a round, in a piece of its own.
    fn call_of<T>(&mut self, bytes: usize, call: impl FnOnce(&mut Self) -> T) -> T {
        let before = self.double.accesses();
        let result = call(self);
        let made = self.double.accesses() - before;
        assert!(made <= self.bound() + 4 * bytes, "{made} accesses in one call");
        result
    }

    fn set(&mut self, target: DeviceState) {
        let hits = self.double.hits();
        let loading = self.load.is_some() && self.double.state() == DeviceState::Resuming;
        let outcome = self.call(|this| this.device.set_state(target));
        let now = self.double.state();
        match outcome {
            Ok(session) => {
                assert_eq!(now, target, "it says that the device is there");
                if loading && now != DeviceState::Resuming {
                    self.check_loaded();
                }
                self.opened(session, now);
            }
            Err(error) => {
                match error.reached {
                    Ok(reached) => assert_eq!(reached, now, "it was read back"),
                    Err(_) => {
                        assert!(self.double.hits() > hits || self.is_gone(), "the read-back has failed")
                    }
                }
                if !now.is_saving() {
                    self.save = None;
                }
                // One that was refused without a try changes nothing; otherwise it may have been left on
                // the way, and entered again.
                if now != DeviceState::Resuming || error.error.kind != DeviceErrorKind::Misuse {
                    self.load = None;
                }
            }
        }
    }

    fn is_gone(&self) -> bool {
        let mut buf = [0; 4];
        airlift_core::RegionAccess::read_trapped(&mut self.double.region(), 0, &mut buf).is_err()
    }

    fn opened(&mut self, session: Option<Session>, now: DeviceState) {
        match session {
            Some(Session::Save(session)) => {
                self.save = Some(session);
                self.content = self.double.content();
                self.ended = false;
                self.given.clear();
                self.rest = 0;
            }
            Some(Session::Load(session)) => {
                self.load = Some(session);
                self.taken.clear();
                self.open.clear();
            }
            None => {}
        }
        if !now.is_saving() {
            self.save = None;
        }
        if now != DeviceState::Resuming {
            self.load = None;
        }
    }

    /// `false`: the session has ended, or gives nothing for now.
    fn read(&mut self, buffer: usize) -> bool {
        let Some(mut session) = self.save.take() else { return false };
        let mut buf = vec![0; buffer];
        let state = self.double.state();
        let piece = self.call(|_| session.read(&mut buf));
        self.save = Some(session);
        match piece {
            Ok(Piece::Data { len, chunk }) => {
                assert!(len > 0 && len <= buffer);
                self.note(&buf[..len], chunk);
                true
            }
            Ok(Piece::Drained) => {
                assert_eq!(state, DeviceState::PreCopy, "a pause is in PRE_COPY only");
                assert_eq!(self.rest, 0, "a pause in the middle of a transaction");
                false
            }
            Ok(Piece::End) => {
                // Once said it stays so, wherever the device goes.
                assert!(self.ended || self.double.state() == DeviceState::StopCopy);
                let (given, all) = (self.given.len(), self.content.len());
                assert!(self.given == self.content, "the end, and {given} of {all} came");
                assert!(
                    self.ended || self.double.content() == self.content,
                    "the end of a device that was reset"
                );
                self.ended = true;
                assert_eq!(self.rest, 0);
                false
            }
            Err(_) => false,
        }
    }

    fn note(&mut self, data: &[u8], chunk: Chunk) {
        let Chunk::Part { of, offset } = chunk else { panic!("data of a stream") };
        if self.rest == 0 {
            self.given.push(Vec::new());
            self.rest = of;
        }
        let last = self.given.last_mut().unwrap();
        assert_eq!((last.len() as u64, self.rest), (offset, of - offset), "a transaction is in order");
        last.extend(data);
        self.rest -= data.len() as u64;
    }

    fn write(&mut self, total: usize, now: usize) {
        let Some(mut session) = self.load.take() else { return };
        let result = self.call_of(now, |this| {
            if this.open.is_empty() {
                this.seed += 1;
                session.begin_chunk(total as u64)?;
                this.open = bytes(this.seed, total);
                this.taken.push(this.open.clone());
            }
            let now = now.min(this.open.len());
            for byte in this.open.drain(..now).collect::<Vec<_>>().chunks(37) {
                session.write(byte)?;
            }
            if this.open.is_empty() { session.end_chunk() } else { Ok(()) }
        });
        // What has failed is never validated: then no write is needed for that either.
        if result.is_err() {
            self.open = vec![0];
        }
        self.load = Some(session);
    }

    /// The device has validated what was loaded.
    fn check_loaded(&self) {
        assert!(self.open.is_empty(), "in the middle of a transaction");
        let rounds = self.double.validated().unwrap();
        assert_eq!(rounds.concat(), self.taken.concat(), "what was loaded");
        // Each round is of one transaction.
        let mut rounds = rounds.into_iter();
        for chunk in &self.taken {
            let mut got = 0;
            while got < chunk.len() {
                got += rounds.next().unwrap().len();
            }
            assert_eq!(got, chunk.len(), "a round belongs to two transactions");
        }
        assert_eq!(rounds.next(), None);
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Set(target) => self.set(target),
            Step::Read(buffer, times) => {
                for _ in 0..times {
                    if !self.read(buffer) {
                        break;
                    }
                }
            }
            Step::Info => {
                if let Some(mut session) = self.save.take() {
                    let _ = self.call(|_| session.precopy_info());
                    self.save = Some(session);
                }
            }
            Step::Write(total, now) => self.write(total, now),
            Step::State => {
                let state = self.call(|this| this.device.state());
                if let Ok(state) = state {
                    assert_eq!(state, self.double.state());
                }
            }
            Step::Reset => {
                if self.call(|this| this.device.reset()).is_ok() {
                    assert_eq!(self.double.state(), DeviceState::Running);
                }
                (self.save, self.load) = (None, None);
            }
        }
        assert_eq!(self.double.violations(), Vec::<String>::new());
    }

    /// Reads to the end, if there is one.
    fn finish(&mut self) {
        self.set(DeviceState::StopCopy);
        for _ in 0..2000 {
            if !self.read(50) {
                break;
            }
        }
        self.set(DeviceState::Running);
        assert_eq!(self.double.violations(), Vec::<String>::new());
        assert_eq!(self.double.misplaced(), 0);
    }
}

/// Whether a device that is made so gives all that it has, if nothing else goes wrong.
fn gives_all(plan: &Plan) -> bool {
    plan.hollow.iter().take(plan.chunks.len()).all(|times| *times < 16)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60_000, failure_persistence: None, ..ProptestConfig::default() })]

    // V1-PENDING, V1-HOLLOW, V1-READBACK, V1-RESET, V1-OUTSTANDING, V1-LOOP-ERROR
    #[test]
    fn any_walk_over_any_device_loses_nothing_and_ends(
        options in options(),
        faults in faults(),
        steps in vec(step(), 0..25),
    ) {
        // It takes what is loaded, whatever that is.
        let mut device = Use::new(DoubleOptions { expects: None, ..options });
        for fault in faults {
            device.double.fail(fault);
        }
        for step in &steps {
            device.run(step);
        }
        device.finish();
    }

    // V1-PENDING, V1-STABLE, V1-CHUNK, V1-ROUNDS, V1-AREAS
    #[test]
    fn what_a_device_gives_another_one_has(
        from in options(),
        to in options(),
        precopy in any::<bool>(),
        (buffer, piece) in (1..400_usize, 1..400_usize),
    ) {
        let plan = from.plan.clone();
        let (section, at_start) = (to.section, to.plan.places.is_empty());
        let here = Double::new(from);
        let there = Double::new(DoubleOptions { expects: Some(plan.data()), ..to });
        let saved = airlift_testkit::v1::save(&mut here.device("a").unwrap(), precopy, buffer);
        prop_assert!(saved.is_ok() || !gives_all(&plan));
        // In PRE_COPY an empty turn is a pause, and not counted.
        prop_assert!(precopy || saved.is_err() || gives_all(&plan));
        if let Ok(saved) = saved {
            prop_assert!(saved == plan.chunks);
            airlift_testkit::v1::load(&mut there.device("b").unwrap(), &saved, piece).unwrap();
            prop_assert_eq!(there.loaded(), Some(plan.data()));
            if at_start && plan.chunks.iter().all(|chunk| chunk.len() as u64 <= section) {
                prop_assert!(there.received() == plan.chunks);
            }
        }
        prop_assert_eq!(here.violations(), Vec::<String>::new());
        prop_assert_eq!(there.violations(), Vec::<String>::new());
        prop_assert_eq!((here.misplaced(), there.misplaced()), (0, 0));
    }

    // V1-RESET, V1-LOOP-ERROR: whatever goes wrong, a load that is said to be made is made.
    #[test]
    fn a_load_that_ends_well_is_the_sources(
        to in options(),
        fault in fault(),
        sizes in vec(1..400_usize, 1..8),
        piece in 1..400_usize,
        target in select(vec![DeviceState::Stop, DeviceState::Running]),
    ) {
        let chunks: Vec<_> = sizes.iter().enumerate().map(|(n, size)| bytes(n as u64, *size)).collect();
        let there = Double::new(DoubleOptions { expects: None, ..to });
        let mut device = there.device("b").unwrap();
        there.fail(fault);
        let (whole, left) = load_to(&mut device, &chunks, piece, target);
        if whole && left {
            prop_assert_eq!(there.validated().map(|rounds| rounds.concat()), Some(chunks.concat()));
            prop_assert_eq!(there.state(), target);
        }
        if !whole {
            prop_assert_eq!(there.validated(), None, "a part of it was taken for all");
        }
        prop_assert_eq!(there.violations(), Vec::<String>::new());
    }
}

/// Loads, and leaves RESUMING: whether all was written, and whether the device took that.
fn load_to(
    device: &mut V1Device<DoubleRegion>,
    chunks: &[Vec<u8>],
    piece: usize,
    target: DeviceState,
) -> (bool, bool) {
    let Ok(Some(Session::Load(mut session))) = device.set_state(DeviceState::Resuming) else {
        return (false, false);
    };
    let whole = chunks.iter().all(|chunk| {
        session.begin_chunk(chunk.len() as u64).is_ok()
            && chunk.chunks(piece).all(|part| session.write(part).is_ok())
            && session.end_chunk().is_ok()
    });
    // Also where something has failed: it must not become a device.
    (whole, device.set_state(target).is_ok())
}
