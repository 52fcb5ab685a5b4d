//! Split locks that are stepped or emulated while something else happens: faults of the instruction,
//! single steps, interrupts, NMIs, siblings that do the same. The guest sees to it that nothing is lost.
//! That detection is off for exactly one instruction is seen in the machine's ground truth: the
//! guest's handlers split locks themselves, so that one which slipped in would take the bus unseen.

use std::collections::BTreeMap;

use anyhow::Result;
use libtest_mimic::Trial;
use machine_tests::hypervisor::{check_success, find_guest, split_locks};
use machine_tests::{check, check_eq, trial};
use xtask::config::{HvConfig, Policy, Vm};
use xtask::events::{Ac, Body, Event, Outcome, Truth};
use xtask::machine::{MachineConfig, RunOutcome};
use xtask::topology::Topology;

use crate::vms;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (policy, done, seed) in [(Policy::Step, "step", 1), (Policy::Emulate, "emulate", 2)] {
        let name = format!("stepping::random_operations_{policy}");
        trials.push(trial(name, move || operations(policy, done, seed)));
    }
    for policy in [Policy::Step, Policy::Emulate] {
        for (cpus, vcpus, parts) in [
            ("1", 1, "trap fault hole storm"),
            ("1", 4, "storm unmap"),
            // Without page faults in a step: Bochs with several CPUs saves the faulting instruction's
            // RIP at a VM exit between an exception's delivery and its handler's first instruction.
            ("4", 4, "storm"),
            ("1:2:2", 4, "storm"),
        ] {
            let name = format!("stepping::{policy}_{vcpus}_on_{}", cpus.replace(':', "_"));
            trials.push(trial(name, move || run(policy, cpus.parse()?, vcpus, parts)));
        }
    }
    trials
}

/// More than it takes, and less than the guest waits for what does not come.
const LIMIT_TICKS: u64 = 100_000_000;

fn run(policy: Policy, cpus: Topology, vcpus: u32, parts: &str) -> Result<()> {
    let guest = find_guest("stepping")?;
    let cmdline = format!("{parts} count=15");
    let vm = Vm { vcpus, cmdline, limit_ticks: Some(LIMIT_TICKS), ..Vm::of_guest(guest) };
    let config =
        HvConfig { slice_ticks: Some(50_000), verify: true, ..HvConfig::new(policy, vec![vm]) };
    let machine = MachineConfig { cpus, ips: 1_000_000, ..MachineConfig::default() };
    let outcome = vms::run(&config, machine)?;
    check_success(&outcome, guest.name)?;
    let violations =
        outcome.events.iter().filter(|event| matches!(event.body, Body::Violation { .. })).count();
    check_eq(&outcome, "violations", violations, 0)?;
    let count = |done: &str| acs(&outcome).filter(|ac| ac.verdict == done).count();
    let [_, taken] = split_locks(&outcome);
    println!(
        "{policy} of {vcpus} on {cpus}: {} stepped, {} emulated, {} again",
        count("step"),
        count("emulate"),
        count("again")
    );
    match policy {
        Policy::Step => {
            check_eq(&outcome, "bus locks", taken, count("step"))?;
            check(&outcome, taken > 50, "there were hardly any")?;
        }
        _ => {
            check_eq(&outcome, "bus locks", taken, 0)?;
            check_eq(&outcome, "steps", count("step"), 0)?;
            check(&outcome, count("emulate") > 50, "there were hardly any")?;
        }
    }
    if policy == Policy::Step && parts.contains("unmap") {
        check(&outcome, count("again") > 0, "no page fault came in a step")?;
    }
    check_steps(&outcome)?;
    check_bits(&outcome)
}

/// Random locked instructions do the same where they are stepped or emulated as on an aligned operand.
fn operations(policy: Policy, done: &str, seed: u64) -> Result<()> {
    const COUNT: usize = 4000;
    let guest = find_guest("locked-ops")?;
    let vm = Vm { cmdline: format!("count={COUNT} seed={seed}"), ..Vm::of_guest(guest) };
    let outcome = vms::run(&HvConfig::new(policy, vec![vm]), MachineConfig::default())?;
    check_success(&outcome, guest.name)?;
    let counted = acs(&outcome).filter(|ac| ac.verdict == done).count();
    check_eq(&outcome, done, counted, COUNT)?;
    check_eq(&outcome, "all #AC", acs(&outcome).count(), COUNT)?;
    let locks = if policy == Policy::Step { COUNT } else { 0 };
    let [_, taken] = split_locks(&outcome);
    check_eq(&outcome, "bus locks", taken, locks)?;
    check_steps(&outcome)
}

fn acs(outcome: &RunOutcome) -> impl Iterator<Item = &Ac> {
    outcome.events.iter().filter_map(|event| match &event.body {
        Body::Ac(ac) => Some(ac),
        _ => None,
    })
}

/// On each CPU, what takes the bus is the split lock that faulted right before, and no other.
fn check_steps(outcome: &RunOutcome) -> Result<()> {
    let mut faulted: BTreeMap<u32, Option<&Truth>> = BTreeMap::new();
    for truth in outcome.truth.iter().filter(|truth| truth.vmx) {
        let before = faulted.entry(truth.cpu).or_default();
        if truth.outcome == Outcome::Taken {
            let same = before.is_some_and(|before| before.rip == truth.rip);
            check(outcome, same, &format!("{truth:?} slipped in after {before:?}"))?;
            *before = None;
        } else {
            *before = Some(truth);
        }
    }
    Ok(())
}

/// On each CPU, a bit that goes off for a step goes on again, and what was stepped is reported, before
/// anything else happens.
fn check_bits(outcome: &RunOutcome) -> Result<()> {
    let mut per_cpu: BTreeMap<u32, Vec<&Event>> = BTreeMap::new();
    for event in &outcome.events {
        per_cpu.entry(event.cpu).or_default().push(event);
    }
    let step = |event: &&Event, wanted: bool| matches!(&event.body, Body::RealBit { on, why, .. } if why == "step" && *on == wanted);
    for (cpu, events) in per_cpu {
        let mut events = events.iter();
        while let Some(event) = events.next() {
            if !step(event, false) {
                check(outcome, !step(event, true), &format!("CPU {cpu}: no step before"))?;
                continue;
            }
            let on = events.next().is_some_and(|event| step(event, true));
            check(outcome, on, &format!("CPU {cpu}: {event:?} is not over before something else"))?;
            let reported = events.next().is_some_and(|event| match &event.body {
                Body::Ac(ac) => ac.verdict == "step" || ac.verdict == "again",
                _ => false,
            });
            check(outcome, reported, &format!("CPU {cpu}: {event:?} is not reported"))?;
        }
    }
    Ok(())
}
