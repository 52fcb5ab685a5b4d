//! Boots the hypervisor and checks what every run of it must show.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use anyhow::{Context, Error, Result, anyhow};
use xtask::config::{Policy, Setup, SldSource};
use xtask::events::{self, Ac, Body, Counters, Event, Outcome, Totals};
use xtask::guests::{self, End, Expected, Guest, SUCCESS, Situation};
use xtask::machine::{MachineConfig, RunOutcome};
use xtask::report;
use xtask::system::System;
use xtask::truth;

use crate::{Disk, check, check_eq, explain, run};

/// Everything that runs on the bare machine; built by the first test that needs it.
///
/// # Errors
/// If it cannot be built.
pub fn system() -> Result<&'static System> {
    static SYSTEM: OnceLock<Result<System, String>> = OnceLock::new();
    let system = SYSTEM.get_or_init(|| System::build().map_err(|why| format!("{why:#}")));
    system.as_ref().map_err(|why| anyhow!("{why}"))
}

/// The test guest with this name.
///
/// # Errors
/// If there is none.
pub fn find_guest(name: &str) -> Result<&'static Guest> {
    guests::find(name).with_context(|| format!("no guest `{name}`"))
}

/// Boots the hypervisor with this setup on this machine, and waits for the end. However it ends, the
/// events of each CPU are numbered without gaps.
///
/// # Errors
/// If it cannot be booted, or events are missing.
pub fn boot(setup: &Setup, config: MachineConfig) -> Result<RunOutcome> {
    let disk = Disk::new()?;
    system()?.disk(setup, disk.path())?;
    let outcome = run(&disk, config)?;
    match events::check_numbers(&outcome.events) {
        Ok(()) => Ok(outcome),
        Err(why) => Err(explain(&outcome, why)),
    }
}

/// Boots the hypervisor with these test guests as VMs, whose split locks nobody but the CPU detects.
///
/// # Errors
/// If it cannot be booted.
pub fn boot_guests(sld: Policy, guests: &[&Guest], config: MachineConfig) -> Result<RunOutcome> {
    let source = if config.sld { SldSource::Msr } else { SldSource::None };
    boot_guests_by(sld, source, guests, config)
}

/// The same where `source` detects them.
///
/// # Errors
/// As there.
pub fn boot_guests_by(
    sld: Policy,
    source: SldSource,
    guests: &[&Guest],
    config: MachineConfig,
) -> Result<RunOutcome> {
    let names: Vec<String> = guests.iter().map(|guest| guest.name.to_owned()).collect();
    boot(&Setup::of_guests_by(sld, Some(source), &names, false)?, config)
}

/// A machine on which `source` is what detects split locks: one without detection if it is not the CPU.
pub fn machine_for(source: SldSource) -> MachineConfig {
    MachineConfig { sld: source == SldSource::Msr, ..MachineConfig::default() }
}

/// Whether VMs that do not say otherwise were traced.
pub fn is_traced(outcome: &RunOutcome) -> bool {
    let traces =
        |body: &Body| matches!(body, Body::Boot { sld_source, .. } if sld_source == "trace");
    outcome.events.iter().any(|event| traces(&event.body))
}

/// The events with the bits by which VMs are traced in place of the CPUs' own.
pub fn traced_as_real(events: &[Event]) -> Vec<Event> {
    let translate = |event: &Event| {
        let body = match event.body.clone() {
            Body::RealBit { .. } => return None,
            Body::TraceBit { vm, vcpu, on, why } => Body::RealBit { vm, vcpu, on, why },
            other => other,
        };
        Some(Event { body, ..event.clone() })
    };
    events.iter().filter_map(translate).collect()
}

/// The mode and the default machine that make a situation.
pub fn make(situation: Situation) -> (Policy, MachineConfig) {
    let mode = match situation {
        Situation::Off => Policy::Off,
        Situation::NoFeature | Situation::Warn => Policy::Warn,
        Situation::Fatal => Policy::Fatal,
    };
    let sld = situation != Situation::NoFeature;
    (mode, MachineConfig { sld, ..MachineConfig::default() })
}

/// Checks that the hypervisor came up and shut down in order, with counters that add up, and that what it
/// reported is what happened.
///
/// # Errors
/// Whatever was wrong, and everything that the machine said.
pub fn check_orderly(outcome: &RunOutcome) -> Result<()> {
    report::judge(outcome).map_err(|why| explain(outcome, Error::msg(why)))?;
    let last = outcome.events.last().map(|event| &event.body);
    check(outcome, matches!(last, Some(Body::Shutdown { .. })), "shutdown is not the last event")?;
    check_counters(outcome)?;
    truth::check_truth(&outcome.events, &outcome.truth)
        .map_err(|wrong| explain(outcome, anyhow!("ground truth: {}", wrong.join("\n"))))
}

/// Checks that every VM and every vCPU that started has ended, and that the counters of vCPUs add up to
/// those of their VMs, and these to those of the run.
fn check_counters(outcome: &RunOutcome) -> Result<()> {
    /// VM exits, writes of the real bit, loads, migrations, ticks.
    type Sums = [u64; 5];
    let of = |counters: &Counters| -> Sums {
        let exits = counters.exits.values().sum();
        let Counters { real_bit_writes, loads, migrations, ticks, .. } = *counters;
        [exits, real_bit_writes, loads, migrations, ticks]
    };
    let add =
        |sums: &mut Sums, more: Sums| sums.iter_mut().zip(more).for_each(|(sum, n)| *sum += n);
    // vCPUs that have not ended, and what those that have ended have counted.
    let mut running: BTreeMap<&str, (u32, Sums)> = BTreeMap::new();
    let mut all = Sums::default();
    for event in &outcome.events {
        match &event.body {
            Body::VmStart { vm, vcpus, .. } => {
                running.insert(vm, (*vcpus, Sums::default()));
            }
            Body::VcpuEnd { vm, vcpu, counters } => {
                let of_vm = running.get_mut(&**vm).filter(|(left, _)| *left > 0);
                let Some((left, sums)) = of_vm else {
                    return check(outcome, false, &format!("vCPU {vcpu} of {vm} ends twice"));
                };
                *left -= 1;
                add(sums, of(counters));
            }
            Body::VmEnd { vm, counters, .. } => {
                let ended = running.remove(&**vm);
                check_eq(outcome, &format!("sums of {vm}"), ended, Some((0, of(counters))))?;
                add(&mut all, of(counters));
            }
            Body::Shutdown { counters: Totals { exits, loads, migrations, .. } } => {
                let [of_vms, _, loaded, migrated, _] = all;
                let totals = [*exits, *loads, *migrations];
                check_eq(outcome, "totals", totals, [of_vms, loaded, migrated])?;
            }
            _ => {}
        }
    }
    check(outcome, running.is_empty(), &format!("not ended: {:?}", running.keys()))
}

/// Checks that the VM of a test guest ended as it must, with the verdicts that it must get.
///
/// # Errors
/// As [`check_orderly`].
pub fn check_guest(outcome: &RunOutcome, guest: &Guest, situation: Situation) -> Result<()> {
    let Expected { end, inject, warn, kill, .. } = guest.expected(situation);
    let name = guest.name;
    let ends = outcome.events.iter().filter_map(|event| match &event.body {
        Body::VmEnd { vm, reason, status, .. } if vm == name => Some((reason.as_str(), *status)),
        _ => None,
    });
    let expected = (end.reason(), end.status().map(u32::from));
    check_eq(outcome, &format!("ends of {name}"), ends.collect::<Vec<_>>(), vec![expected])?;

    let mut found: BTreeMap<&str, u32> = BTreeMap::new();
    for event in &outcome.events {
        if let Body::Ac(Ac { vm, verdict, .. }) = &event.body
            && vm == name
        {
            *found.entry(verdict).or_default() += 1;
        }
    }
    // How many there are in a given time is the hypervisor's speed.
    let injected = found.get("inject").copied().unwrap_or_default();
    let inject = if end == End::TimeLimit { inject.max(injected) } else { inject };
    let expected = [("inject", inject), ("warn", warn), ("kill", kill)];
    let expected: BTreeMap<&str, u32> =
        expected.into_iter().filter(|(_, count)| *count > 0).collect();
    check_eq(outcome, &format!("verdicts on {name}"), found, expected)?;

    let counted = outcome.events.iter().find_map(|event| match &event.body {
        Body::VmEnd { vm, counters, .. } if vm == name => Some(&counters.split_locks),
        _ => None,
    });
    let counted = counted.map(|counted| {
        ["inject", "warn", "kill"].map(|verdict| counted.get(verdict).copied().unwrap_or_default())
    });
    let expected = Some([inject, warn, kill].map(u64::from));
    check_eq(outcome, &format!("counters of {name}"), counted, expected)
}

/// How many split locks of guests faulted, and how many took the bus.
pub fn split_locks(outcome: &RunOutcome) -> [usize; 2] {
    [Outcome::Faulted, Outcome::Taken].map(|wanted| {
        let guest = outcome.truth.iter().filter(|truth| truth.vmx);
        guest.filter(|truth| truth.outcome == wanted).count()
    })
}

/// How many of a VM's #ACs led to this verdict.
pub fn count_verdicts(outcome: &RunOutcome, name: &str, done: &str) -> usize {
    let is_it = |body: &Body| matches!(body, Body::Ac(Ac { vm, verdict, .. }) if vm == name && verdict == done);
    outcome.events.iter().filter(|event| is_it(&event.body)).count()
}

/// Checks that a VM's guest has ended it by itself, and well.
///
/// # Errors
/// As [`check_orderly`].
pub fn check_success(outcome: &RunOutcome, name: &str) -> Result<()> {
    let end = outcome.events.iter().find_map(|event| match &event.body {
        Body::VmEnd { vm, reason, status, .. } if vm == name => Some((reason.as_str(), *status)),
        _ => None,
    });
    check_eq(outcome, &format!("end of {name}"), end, Some(("exit", Some(SUCCESS.into()))))
}

/// Checks that as many split locks faulted and were taken in guests as these guests make together. Where
/// they are traced, none faults.
///
/// # Errors
/// As [`check_orderly`].
pub fn check_split_locks(
    outcome: &RunOutcome,
    guests: &[&Guest],
    situation: Situation,
) -> Result<()> {
    let sum = |part: fn(&Expected) -> u32| {
        guests.iter().map(|guest| part(&guest.expected(situation)) as usize).sum::<usize>()
    };
    let faulted = if is_traced(outcome) { 0 } else { sum(|guest| guest.faulted) };
    let expected = [faulted, sum(|guest| guest.taken)];
    let found = split_locks(outcome);
    check_eq(outcome, "split locks that faulted and that took the bus", found, expected)
}

/// Whether a guest's VM lives to its own end in this situation.
pub fn survives(guest: &Guest, situation: Situation) -> bool {
    matches!(guest.expected(situation).end, End::Exit(_))
}
