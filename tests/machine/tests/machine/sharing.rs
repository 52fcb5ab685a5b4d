//! VMs that share a CPU, or several, and are switched and moved hundreds of times, each of which wants
//! something else of split-lock detection: the real bits are written exactly when the operations say,
//! and every guest gets what it asked for.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, ensure};
use libtest_mimic::Trial;
use machine_tests::hypervisor::{is_traced, machine_for, traced_as_real};
use machine_tests::trial;
use xtask::config::{HvConfig, Policy, SldSource, Vm};
use xtask::events::{Ac, Body, Counters, Event, Outcome};
use xtask::guests::{self, SUCCESS};
use xtask::machine::{MachineConfig, RunOutcome};

use crate::operations;
use crate::vms::{self, on};

pub fn trials() -> Vec<Trial> {
    use Role::{Declines, Strict, Toggles, Unaware, Wants};
    let pairs = [[Wants, Declines], [Wants, Unaware], [Declines, Unaware]];
    let all = [Wants, Declines, Unaware, Toggles, Strict];
    let mut machines: Vec<(Policy, u32, Vec<Role>)> = Vec::new();
    for mode in [Policy::Warn, Policy::Fatal] {
        machines.extend(pairs.map(|pair| (mode, 1, pair.to_vec())));
        machines.extend([1, 2, 4].map(|cpus| (mode, cpus, all.to_vec())));
    }
    let name = |mode: Policy, cpus: u32, roles: &[Role]| {
        let names: Vec<&str> = roles.iter().map(|role| role.name()).collect();
        let cpus = if cpus > 1 { format!("_on_{cpus}") } else { String::new() };
        format!("sharing::{mode:?}_{}{cpus}", names.join("_")).to_lowercase()
    };
    let traced = [1, 2].map(|cpus| {
        let name = format!("trace::{}", name(Policy::Warn, cpus, &all));
        trial(name, move || share(Policy::Warn, cpus, &all, SldSource::Trace))
    });
    let by_cpu = machines.into_iter().map(|(mode, cpus, roles)| {
        trial(name(mode, cpus, &roles), move || share(mode, cpus, &roles, SldSource::Msr))
    });
    by_cpu.chain(traced).collect()
}

/// What the guest `sld-shared` is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Turns detection on and expects its #AC.
    Wants,
    /// Knows of detection and leaves it off.
    Declines,
    /// Knows nothing.
    Unaware,
    /// Turns detection on and off all the time.
    Toggles,
    /// As `Declines`, but its own policy is `fatal`.
    Strict,
}

/// How much a guest does.
#[derive(Clone, Copy)]
struct Rounds {
    /// Split locks of a guest.
    count: usize,
    /// Split locks of a guest that splits one with detection on and one with it off in turn, each.
    toggles: usize,
    /// Rounds without a split lock before the first, of a guest that the first ends.
    calm: usize,
    /// A turn.
    slice_ticks: u64,
}

/// Turns are so short that every guest is interrupted more than [`SWITCHES`] times.
const ROUNDS: Rounds = Rounds { count: 300, toggles: 100, calm: 250, slice_ticks: 6_000 };
/// Where VMs are traced, each round takes several hundred times as long.
const TRACED_ROUNDS: Rounds = Rounds { count: 30, toggles: 10, calm: 25, slice_ticks: 40_000 };
/// Instructions a second of a machine of several CPUs: output takes little of their time.
const IPS: u32 = 1_000_000;
const SWITCHES: u64 = 100;
/// On several CPUs a vCPU moves on after so many VM exits, and each does so this often at least.
const MIGRATE_EXITS: u64 = 1;
const MIGRATIONS: u64 = 20;

/// What comes of a VM.
#[derive(Clone, Copy)]
struct Expected {
    /// Ended by its own exit, or for a split lock.
    succeeds: bool,
    /// `ac` events, all with this verdict.
    verdict: &'static str,
    acs: usize,
    /// Split locks that fault and that are taken, by the ground truth.
    faulted: usize,
    taken: usize,
    /// Writes of 0x33 that are stored only and that reach the real bit.
    writes: [usize; 2],
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Wants => "wants",
            Self::Declines => "declines",
            Self::Unaware => "unaware",
            Self::Toggles => "toggles",
            Self::Strict => "strict",
        }
    }

    fn vm(self, mode: Policy, rounds: Rounds) -> Vm {
        let Rounds { count, toggles, calm, .. } = rounds;
        let killed = mode == Policy::Fatal || self == Self::Strict;
        let calm = if killed { calm } else { 0 };
        let cmdline = match self {
            Self::Wants => format!("wants count={count}"),
            Self::Declines | Self::Strict => format!("declines count={count} calm={calm}"),
            Self::Unaware => format!("count={count} calm={calm}"),
            Self::Toggles if killed => format!("toggles held count={toggles}"),
            Self::Toggles => format!("toggles count={toggles}"),
        };
        Vm {
            name: self.name().to_owned(),
            memory_mib: 4,
            expose_sld: self != Self::Unaware,
            policy: (self == Self::Strict).then_some(Policy::Fatal),
            cmdline,
            ..Vm::of_guest(guest())
        }
    }

    fn expected(self, mode: Policy, rounds: Rounds) -> Expected {
        let Rounds { count, toggles, .. } = rounds;
        let warn = mode == Policy::Warn;
        let killed = Expected {
            succeeds: false,
            verdict: "kill",
            acs: 1,
            faulted: 1,
            taken: 0,
            writes: [0, 0],
        };
        let injected = |count, taken, writes| Expected {
            succeeds: true,
            verdict: "inject",
            acs: count,
            faulted: count,
            taken,
            writes,
        };
        match self {
            Self::Wants => injected(count, 0, if warn { [0, 1] } else { [1, 0] }),
            Self::Toggles if warn => injected(toggles, toggles, [0, 2 * toggles]),
            Self::Toggles => injected(toggles, 0, [2 * toggles, 0]),
            Self::Declines if warn => injected(0, count, [0, 0]),
            Self::Unaware if warn => {
                Expected { verdict: "warn", acs: 1, faulted: 1, ..injected(0, count, [0, 0]) }
            }
            Self::Strict | Self::Declines | Self::Unaware => killed,
        }
    }
}

fn guest() -> &'static guests::Guest {
    guests::find("sld-shared").expect("it is registered")
}

fn share(mode: Policy, cpus: u32, roles: &[Role], source: SldSource) -> Result<()> {
    let rounds = if source == SldSource::Trace { TRACED_ROUNDS } else { ROUNDS };
    let config = HvConfig {
        source: Some(source),
        slice_ticks: Some(rounds.slice_ticks),
        migrate_exits: (cpus > 1).then_some(MIGRATE_EXITS),
        verify: true,
        ..HvConfig::new(mode, roles.iter().map(|role| role.vm(mode, rounds)).collect())
    };
    let usual = machine_for(source);
    let ips = if cpus > 1 { IPS } else { usual.ips };
    let outcome = vms::run(&config, MachineConfig { cpus: cpus.into(), ips, ..usual })?;
    judge(mode, cpus, roles, rounds, &outcome)
        .map_err(|why| on(&format!("{mode:?} {cpus} {roles:?}"), &outcome, why))
}

fn judge(
    mode: Policy,
    cpus: u32,
    roles: &[Role],
    rounds: Rounds,
    outcome: &RunOutcome,
) -> Result<()> {
    let traced = is_traced(outcome);
    let translated = traced.then(|| traced_as_real(&outcome.events));
    let bits = translated.as_ref().unwrap_or(&outcome.events);
    let summary = operations::replay(bits).map_err(|why| anyhow!(why))?;
    operations_are_checked(bits, if cpus > 1 { 10 } else { 50 })?;
    if mode == Policy::Fatal {
        let reasons: Vec<&str> = summary.writes.keys().map(String::as_str).collect();
        ensure!(reasons == ["boot", "offline"], "writes under fatal: {:?}", summary.writes);
    }

    // All guests are one binary at one address: where a split lock stands tells whose it is.
    let mut of_rip: BTreeMap<u64, [usize; 2]> = BTreeMap::new();
    let (mut interrupted, mut migrated) = (Vec::new(), Vec::new());
    for role in roles {
        let expected = role.expected(mode, rounds);
        let acs = acs_of(&outcome.events, role.name());
        ensure!(acs.len() == expected.acs, "{role:?}: {} #AC", acs.len());
        let other = acs.iter().find(|ac| ac.verdict != expected.verdict);
        ensure!(other.is_none(), "{role:?}: {other:?}");

        let writes = ["stored", "propagated"]
            .map(|result| test_ctrl_writes(&outcome.events, role.name(), result));
        ensure!(writes == expected.writes, "{role:?}: writes of MSR 0x33: {writes:?}");

        let (reason, status, counters) = end_of(&outcome.events, role.name())?;
        let end = if expected.succeeds {
            ("exit", Some(u32::from(SUCCESS)))
        } else {
            ("split lock", None)
        };
        ensure!((reason, status) == end, "{role:?} ended: {reason}, {status:?}");
        // Where each instruction exits there is no need of a timer.
        let timer = counters.exits.get("preemption-timer").copied().unwrap_or(0);
        interrupted.push(if traced { counters.loads } else { timer });
        migrated.push(counters.migrations);

        let [first, second] = match split_locks_of(&outcome.serial, role.name()) {
            Some(places) => places?,
            // Ended before it could say.
            None => [acs.first().context("no #AC")?.rip.0, 0],
        };
        let ac = acs.iter().find(|ac| ac.rip.0 != first);
        ensure!(ac.is_none(), "{role:?}: #AC elsewhere than at {first:#x}: {ac:?}");
        let counts = of_rip.entry(first).or_default();
        counts[0] += if traced { 0 } else { expected.faulted };
        if second == 0 {
            counts[1] += expected.taken;
        } else {
            of_rip.entry(second).or_default()[1] += expected.taken;
        }
    }

    let mut truth: BTreeMap<u64, [usize; 2]> = BTreeMap::new();
    for split_lock in &outcome.truth {
        let taken = usize::from(split_lock.outcome == Outcome::Taken);
        truth.entry(split_lock.rip.0).or_default()[taken] += 1;
    }
    of_rip.retain(|_, counts| *counts != [0, 0]);
    ensure!(truth == of_rip, "by RIP, faulted and taken: {truth:x?}\nexpected: {of_rip:x?}");

    // The first VM that ended had the others beside it all the time.
    let (moved, due) = if cpus > 1 { (&migrated, MIGRATIONS) } else { (&interrupted, SWITCHES) };
    // Who is not traced all the time is soon at its end.
    let is_long = |role: &Role| !traced || !matches!(role, Role::Declines | Role::Unaware);
    let of_long = roles.iter().zip(moved).filter(|(role, _)| is_long(role));
    let least = of_long.map(|(_, moved)| moved).min().context("no VMs")?;
    ensure!(*least > due, "interrupted {interrupted:?} times, migrated {migrated:?} times");
    println!(
        "{mode:?} {roles:?} on {cpus}: interrupted {interrupted:?} times, migrated {migrated:?} times, \
         real bit written {:?}",
        summary.writes
    );
    Ok(())
}

/// The replay must notice every write that is missing, doubled, reversed or given another reason:
/// so many of them are tried, spread over the run.
fn operations_are_checked(events: &[Event], tried: usize) -> Result<()> {
    let is_write = |event: &Event| matches!(event.body, Body::RealBit { .. });
    let writes: Vec<usize> = (0..events.len()).filter(|&index| is_write(&events[index])).collect();
    for &index in writes.iter().step_by(writes.len().div_ceil(tried)).chain(writes.last()) {
        let with = |change: &dyn Fn(&mut bool, &mut String)| {
            let mut events = events.to_vec();
            if let Body::RealBit { on, why, .. } = &mut events[index].body {
                change(on, why);
            }
            events
        };
        let mut missing = events.to_vec();
        missing.remove(index);
        let mut doubled = events.to_vec();
        doubled.insert(index, events[index].clone());
        let reversed = with(&|on, _| *on = !*on);
        let misnamed = with(&|_, why| {
            let other = match why.as_str() {
                "load" => "put",
                "put" => "task-switch",
                _ => "load",
            };
            *why = other.to_owned();
        });
        let changed = [
            ("missing", missing),
            ("doubled", doubled),
            ("reversed", reversed),
            ("misnamed", misnamed),
        ];
        for (what, changed) in changed {
            let event = &events[index];
            ensure!(operations::replay(&changed).is_err(), "{what}, and unnoticed: {event:?}");
        }
    }
    Ok(())
}

fn acs_of<'a>(events: &'a [Event], name: &str) -> Vec<&'a Ac> {
    let ac = |event: &'a Event| match &event.body {
        Body::Ac(ac) if ac.vm == name => Some(ac),
        _ => None,
    };
    events.iter().filter_map(ac).collect()
}

fn test_ctrl_writes(events: &[Event], name: &str, wanted: &str) -> usize {
    let is_it = |event: &&Event| match &event.body {
        Body::TestCtrlWrite { vm, result, .. } => vm == name && result == wanted,
        _ => false,
    };
    events.iter().filter(is_it).count()
}

/// Reason, status and counters of a VM.
fn end_of<'a>(events: &'a [Event], name: &str) -> Result<(&'a str, Option<u32>, &'a Counters)> {
    let end = |event: &'a Event| match &event.body {
        Body::VmEnd { vm, reason, status, counters } if vm == name => {
            Some((reason.as_str(), *status, counters))
        }
        _ => None,
    };
    events.iter().find_map(end).with_context(|| format!("{name} has no end"))
}

/// The addresses that the guest prints at its end.
fn split_locks_of(serial: &str, name: &str) -> Option<Result<[u64; 2]>> {
    let prefix = format!("[{name}] split locks at ");
    let line = serial.lines().find_map(|line| line.strip_prefix(&prefix))?;
    Some(parse(line).with_context(|| format!("{name}: {line}")))
}

fn parse(line: &str) -> Result<[u64; 2]> {
    let (first, second) = line.trim().split_once(' ').context("not two addresses")?;
    let number = |text: &str| {
        let digits = text.strip_prefix("0x").context("no 0x")?;
        Ok::<u64, anyhow::Error>(u64::from_str_radix(digits, 16)?)
    };
    Ok([number(first)?, number(second)?])
}
