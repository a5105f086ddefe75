//! Both session machines against each other, over everything that can happen from the last byte on.
//!
//! The exploration is exhaustive: breadth first over all joint states of the real
//! [`SourceMachine`](airlift_core::commit::SourceMachine) and
//! [`DestinationMachine`](airlift_core::commit::DestinationMachine), two journals, two sets of
//! devices and the network. A message that was sent may arrive never, late, any number of times, and
//! after a restart. Deadlines pass, links break and users cancel at any time. Either process may die
//! between any two steps, also with an append under way that landed and was not acknowledged; either
//! host may lose power, and with it devices and unsynced records; appends, resets and starts may
//! fail; devices of the destination may be lost. Deaths, power losses and failures are bounded by
//! [`Options::faults`]; the rest is free.
//!
//! Every state is checked for [`Violation`]s, and every state must be able to come to exactly one
//! running side if from there on nothing more goes wrong; those that cannot are listed by [`Kind`].
//!
//! Not explored: the phases before the last byte (each is a deadline and one way back, which a table
//! test sweeps), and what a device does inside an operation: a rollback and a start count as running
//! from the moment they are asked for, a reset counts when it has been reported.
//!
//! States are told apart by a 128-bit fingerprint.

mod fingerprint;
mod host;
mod journal;
mod step;
mod world;

pub use journal::Landing;
pub use step::{Breakage, Message, Step, Violation};

use airlift_core::commit::Durability;
use fingerprint::{FingerprintMap, fingerprint};
use host::Devices;
use std::collections::{BTreeSet, HashSet};
use std::fmt;
use world::World;

/// What to explore.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How durable both journals are.
    pub durability: Durability,
    /// How many faults at most.
    pub faults: u8,
    /// Which rule to leave out.
    pub breakage: Breakage,
}

/// A state that needs an operator, by what matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind {
    /// The source machine's state.
    pub source: &'static str,
    /// The destination machine's state.
    pub destination: &'static str,
    /// The source's devices are still there.
    pub source_devices: bool,
    /// The destination's devices are still there.
    pub destination_devices: bool,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let devices = |there| if there { "there" } else { "gone" };
        write!(
            f,
            "source {} (devices {}), destination {} (devices {})",
            self.source,
            devices(self.source_devices),
            self.destination,
            devices(self.destination_devices)
        )
    }
}

/// What an exploration has found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Joint states.
    pub states: usize,
    /// Steps between them.
    pub steps: usize,
    /// Distinct boundaries: a kind of step at a pair of machine states.
    pub boundaries: usize,
    /// States from which the two sides cannot come to exactly one that runs, by kind.
    pub in_doubt: BTreeSet<Kind>,
    /// How many states that are.
    pub states_in_doubt: usize,
    /// The first violation, with the shortest way to it.
    pub violation: Option<(Violation, Vec<Step>)>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} states, {} steps, {} boundaries; {} states of {} kinds need an operator",
            self.states,
            self.steps,
            self.boundaries,
            self.states_in_doubt,
            self.in_doubt.len()
        )?;
        for kind in &self.in_doubt {
            writeln!(f, "  {kind}")?;
        }
        if let Some((violation, way)) = &self.violation {
            writeln!(f, "{violation}, after {} steps:", way.len())?;
            for step in way {
                writeln!(f, "  {step:?}")?;
            }
        }
        Ok(())
    }
}

/// What is kept of a visited state.
struct Visited {
    before: u32,
    step: Step,
    /// Its place in the list of kinds.
    kind: u16,
    settled: bool,
}

/// The kinds that were met, each once.
#[derive(Default)]
struct Kinds {
    list: Vec<Kind>,
    places: FingerprintMap<u16>,
}

impl Kinds {
    fn place(&mut self, kind: Kind) -> u16 {
        *self.places.entry(fingerprint(&kind)).or_insert_with(|| {
            self.list.push(kind);
            u16::try_from(self.list.len() - 1).expect("there are fewer kinds than pairs of machine states")
        })
    }

    fn at(&self, place: u16) -> Kind {
        self.list[usize::from(place)]
    }
}

/// Explores all states, or up to the first violation.
#[must_use]
pub fn explore(options: &Options) -> Report {
    let mut visited = Vec::new();
    let mut index = FingerprintMap::default();
    let mut edges: Vec<(u32, u32)> = Vec::new();
    let mut kinds = Kinds::default();
    let mut boundaries = FingerprintMap::default();
    let mut report = Report::default();
    let mut frontier = Vec::new();
    let mut steps = Vec::new();

    let start = World::new(options.durability, options.faults);
    index.insert(fingerprint(&start), 0_u32);
    visited.push(Visited {
        before: 0,
        step: Step::Reconnected(airlift_core::Side::Source),
        kind: kinds.place(kind_of(&start)),
        settled: start.is_settled(),
    });
    frontier.push((0_u32, start));

    while !frontier.is_empty() {
        let mut next = Vec::new();
        for (from, world) in frontier {
            let kind = visited[from as usize].kind;
            world.steps(options.breakage, &mut steps);
            for step in &steps {
                report.steps += 1;
                boundaries.entry(fingerprint(&(*step, kind))).or_insert((*step, kind));
                let after = match world.after(*step, options.breakage) {
                    Ok(after) => after,
                    Err(violation) => {
                        let mut way = way_to(&visited, from);
                        way.push(*step);
                        report.violation = Some((violation, way));
                        report.states = visited.len();
                        report.boundaries = count(&boundaries, &kinds);
                        return report;
                    }
                };
                let fresh = u32::try_from(visited.len()).expect("fewer than 2^32 states fit in memory");
                let to = *index.entry(fingerprint(&after)).or_insert(fresh);
                if to == fresh {
                    visited.push(Visited {
                        before: from,
                        step: *step,
                        kind: kinds.place(kind_of(&after)),
                        settled: after.is_settled(),
                    });
                    next.push((fresh, after));
                }
                if step.is_helpful() && to != from {
                    edges.push((to, from));
                }
            }
        }
        frontier = next;
    }

    report.states = visited.len();
    report.boundaries = count(&boundaries, &kinds);
    let settles = can_settle(&visited, edges);
    for (state, _) in visited.iter().zip(&settles).filter(|(_, settles)| !**settles) {
        report.states_in_doubt += 1;
        report.in_doubt.insert(kinds.at(state.kind));
    }
    report
}

/// Kinds tell devices apart too; boundaries do not.
fn count(boundaries: &FingerprintMap<(Step, u16)>, kinds: &Kinds) -> usize {
    let apart: HashSet<_> = boundaries
        .values()
        .map(|(step, kind)| (*step, kinds.at(*kind).source, kinds.at(*kind).destination))
        .collect();
    apart.len()
}

fn kind_of(world: &World) -> Kind {
    Kind {
        source: world.source_machine.state_name(),
        destination: world.destination_machine.state_name(),
        source_devices: world.source.devices != Devices::Gone,
        destination_devices: !matches!(world.destination.devices, Devices::Gone | Devices::Blank),
    }
}

fn way_to(visited: &[Visited], mut state: u32) -> Vec<Step> {
    let mut way = Vec::new();
    while state != 0 {
        way.push(visited[state as usize].step);
        state = visited[state as usize].before;
    }
    way.reverse();
    way
}

/// For each state whether helpful steps lead from it to a settled one. `edges` are (to, from).
fn can_settle(visited: &[Visited], mut edges: Vec<(u32, u32)>) -> Vec<bool> {
    edges.sort_unstable();
    edges.dedup();
    let mut settles: Vec<bool> = visited.iter().map(|state| state.settled).collect();
    let mut queue: Vec<u32> =
        (0_u32..).zip(&settles).filter(|(_, settled)| **settled).map(|(state, _)| state).collect();
    while let Some(state) = queue.pop() {
        let first = edges.partition_point(|(to, _)| *to < state);
        for (_, from) in edges[first..].iter().take_while(|(to, _)| *to == state) {
            if !std::mem::replace(&mut settles[*from as usize], true) {
                queue.push(*from);
            }
        }
    }
    settles
}
