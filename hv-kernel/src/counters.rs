//! What is counted: for a vCPU, for a VM, for a run.

use core::fmt;

use vmx::exit::BasicReason;
use vmx::split_lock::AcOutcome;
use vmx::vcpu::Counters as Exits;

use crate::events::Object;

/// #ACs, by what was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SplitLocks {
    outcomes: [u64; AcOutcome::ALL.len()],
    /// So many of all these may have been ordinary alignment checks.
    legacy: u64,
}

impl SplitLocks {
    /// None.
    pub const fn new() -> Self {
        Self { outcomes: [0; AcOutcome::ALL.len()], legacy: 0 }
    }

    /// Counts one. `legacy`: the #AC may have been an ordinary alignment check.
    #[inline]
    pub fn count(&mut self, outcome: AcOutcome, legacy: bool) {
        self.outcomes[outcome as usize] += 1;
        self.legacy += u64::from(legacy);
    }

    /// Adds another one's.
    pub fn add(&mut self, other: &Self) {
        self.outcomes.iter_mut().zip(other.outcomes).for_each(|(sum, count)| *sum += count);
        self.legacy += other.legacy;
    }

    /// All of them, whatever was done.
    pub fn all(&self) -> u64 {
        self.outcomes.iter().sum()
    }

    /// How often this was done.
    pub fn of(&self, outcome: AcOutcome) -> u64 {
        self.outcomes[outcome as usize]
    }

    /// How many split locks there were: one that comes back is counted when something is done about it.
    pub fn seen(&self) -> u64 {
        let comes_back = [AcOutcome::Again, AcOutcome::Throttle];
        let done = AcOutcome::ALL.iter().filter(|outcome| !comes_back.contains(outcome));
        done.map(|outcome| self.of(*outcome)).sum::<u64>() - self.legacy
    }

    /// Writes them as fields of an event.
    pub fn write(&self, json: &mut Object<'_>) -> fmt::Result {
        let mut counts = AcOutcome::ALL.iter().zip(self.outcomes);
        counts.try_for_each(|(outcome, count)| json.number(outcome.as_str(), count))
    }
}

/// What a vCPU, or all of a VM's or of a run's, have done.
#[derive(Debug, Clone)]
pub struct Counters {
    /// VM exits.
    pub exits: Exits,
    /// Split locks.
    pub split_locks: SplitLocks,
    /// How often the real bit was written on its account.
    pub real_bit_writes: u64,
    /// How often it was loaded.
    pub loads: u64,
    /// How often on another CPU than the last time.
    pub migrations: u64,
    /// How long it was on a CPU, in ticks of the TSC.
    pub ticks: u64,
}

impl Counters {
    /// All zero.
    pub const fn new() -> Self {
        Self {
            exits: Exits::NONE,
            split_locks: SplitLocks::new(),
            real_bit_writes: 0,
            loads: 0,
            migrations: 0,
            ticks: 0,
        }
    }

    /// Adds another one's.
    pub fn add(&mut self, other: &Self) {
        for (sum, count) in self.exits.exits.iter_mut().zip(other.exits.exits) {
            *sum += count;
        }
        self.exits.bus_locks += other.exits.bus_locks;
        self.split_locks.add(&other.split_locks);
        self.real_bit_writes += other.real_bit_writes;
        self.loads += other.loads;
        self.migrations += other.migrations;
        self.ticks += other.ticks;
    }

    /// Writes them as the object `counters`.
    pub fn write(&self, json: &mut Object<'_>) -> fmt::Result {
        json.object("counters", |json| {
            json.object("exits", |json| {
                self.exits.exits().try_for_each(|(reason, count)| {
                    json.number(reason.name().unwrap_or("other"), count)
                })
            })?;
            json.object("split_locks", |json| self.split_locks.write(json))?;
            json.number("bus_locks", self.exits.bus_locks)?;
            json.number("real_bit_writes", self.real_bit_writes)?;
            json.number("loads", self.loads)?;
            json.number("migrations", self.migrations)?;
            json.number("ticks", self.ticks)
        })
    }

    /// All VM exits.
    pub fn all_exits(&self) -> u64 {
        self.exits.exits().map(|(_, count): (BasicReason, u64)| count).sum()
    }
}
