//! What is counted: for a vCPU, for a VM, for a run.

use core::fmt;

use sld::Verdict;
use vmx::exit::BasicReason;
use vmx::vcpu::Counters as Exits;

use crate::events::Object;

/// Split locks, by what was done.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct SplitLocks {
    /// #AC delivered to the guest: its own.
    pub inject: u64,
    /// Let pass, with all that follow.
    pub warn: u64,
    /// Let pass, this one only.
    pub step: u64,
    /// VM stopped.
    pub kill: u64,
    /// So many of all these may have been ordinary alignment checks.
    pub legacy: u64,
}

impl SplitLocks {
    /// Counts a verdict. `legacy`: the #AC may have been an ordinary alignment check.
    pub fn count(&mut self, verdict: Verdict, legacy: bool) {
        self.legacy += u64::from(legacy);
        match verdict {
            Verdict::Inject => self.inject += 1,
            Verdict::Warn { .. } => self.warn += 1,
            Verdict::Step { .. } => self.step += 1,
            Verdict::Kill | Verdict::KillBogus => self.kill += 1,
        }
    }

    /// Adds another one's.
    pub fn add(&mut self, other: &Self) {
        self.inject += other.inject;
        self.warn += other.warn;
        self.step += other.step;
        self.kill += other.kill;
        self.legacy += other.legacy;
    }

    /// How many split locks there were.
    pub fn seen(&self) -> u64 {
        self.inject + self.warn + self.step + self.kill - self.legacy
    }

    /// Writes them as fields of an event.
    pub fn write(&self, json: &mut Object<'_>) -> fmt::Result {
        json.number("inject", self.inject)?;
        json.number("warn", self.warn)?;
        json.number("step", self.step)?;
        json.number("kill", self.kill)
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
            split_locks: SplitLocks { inject: 0, warn: 0, step: 0, kill: 0, legacy: 0 },
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
