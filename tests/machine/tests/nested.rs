//! The hypervisor under QEMU and KVM, which run in Linux in the reference machine: `cargo xtask test
//! --nested`. Its guests are then guests of a guest (L2).

use std::process::ExitCode;

use anyhow::{Result, anyhow, bail};
use libtest_mimic::Arguments;
use machine_tests::hypervisor::{
    check_guest, check_orderly, find_guest, is_traced, split_locks, system,
};
use machine_tests::{check, check_eq, explain, trial};
use xtask::config::{Policy, Setup, SldSource};
use xtask::events::{Body, Event};
use xtask::guests::{self, Guest, Situation};
use xtask::linux::End;
use xtask::machine::RunOutcome;
use xtask::nested::{self, L0, MITIGATIONS_OFF, Nested};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Each machine's memory is a GiB.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    let trials = [
        trial("nested::guests_run_under_kvm", guests_run_under_kvm),
        trial("nested::guests_are_traced_under_kvm", guests_are_traced_under_kvm),
        trial("nested::every_kind_of_exit_works_under_kvm", every_kind_of_exit_works_under_kvm),
        trial("nested::what_kvm_does_not_offer_is_named", what_kvm_does_not_offer_is_named),
        trial("nested::l0_warns_of_l2", l0_warns_of_l2),
        trial("nested::l0_stops_l1_for_l2", l0_stops_l1_for_l2),
        trial("nested::l0_has_no_reason_to_stop_l1", l0_has_no_reason_to_stop_l1),
    ];
    // They take minutes: only who asks for them gets them.
    let trials = trials.map(|trial| trial.with_ignored_flag(true)).into();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// L0's options: it prints its warnings.
const WARNINGS: &str = "loglevel=5";
/// SIGBUS, by which Linux ends who splits a lock in mode `fatal`.
const SIGBUS: u8 = 7;

/// The guests that `cargo xtask run` shows.
fn guests() -> Vec<&'static Guest> {
    guests::demo().collect()
}

/// The guests in a hypervisor that traces nothing.
fn run(guests: &[&Guest], options: &str) -> Result<Nested> {
    run_by(Policy::Warn, SldSource::None, guests, options)
}

fn run_by(sld: Policy, source: SldSource, guests: &[&Guest], options: &str) -> Result<Nested> {
    let names: Vec<String> = guests.iter().map(|guest| guest.name.to_owned()).collect();
    let setup = Setup::of_guests_by(sld, Some(source), &names, false)?;
    let options = format!("{MITIGATIONS_OFF} {WARNINGS} {options}");
    nested::run(system()?, &setup, L0 { options: &options, kvm: "" })
}

/// Checks that the hypervisor detected nothing, ended in order, and that all guests ended as they must there.
/// Split locks are compared by the caller: L0 has a say in them.
fn check_guests(nested: &Nested, guests: &[&Guest]) -> Result<()> {
    let Nested { outcome, end, .. } = nested;
    check_eq(outcome, "QEMU's end", *end, End::Exit(0))?;
    let source = outcome.events.iter().find_map(|event| match &event.body {
        Body::Boot { sld_source, .. } => Some(&**sld_source),
        _ => None,
    });
    check_eq(outcome, "source", source, Some("none"))?;
    let without_truth = RunOutcome { truth: Vec::new(), ..outcome.clone() };
    check_orderly(&without_truth)?;
    guests.iter().try_for_each(|guest| check_guest(outcome, guest, Situation::NoFeature))
}

/// All split locks of these guests, where nothing stops them.
fn all(guests: &[&Guest]) -> usize {
    let taken = guests.iter().map(|guest| guest.expected(Situation::NoFeature).taken as usize);
    taken.sum()
}

/// KVM's VMX is enough for the hypervisor, and its guests see what they see on a CPU without detection.
fn guests_run_under_kvm() -> Result<()> {
    let guests = guests();
    let nested = run(&guests, "split_lock_detect=off")?;
    check_guests(&nested, &guests)?;
    let outcome = &nested.outcome;
    check_eq(outcome, "split locks of L2", split_locks(outcome), [0, all(&guests)])
}

/// Few, since each of their instructions goes from L2 by L0 to L1 and back: one that splits locks and knows
/// nothing of it, and one that wants its own #AC.
fn traced_guests() -> Result<Vec<&'static Guest>> {
    ["split-add-cpl0", "sld-aware"].into_iter().map(find_guest).collect()
}

/// Without MSR 0x33, guests get what they would with it: by default the hypervisor traces them.
fn guests_are_traced_under_kvm() -> Result<()> {
    let guests = traced_guests()?;
    let nested = run_by(Policy::Warn, SldSource::Auto, &guests, "split_lock_detect=off")?;
    let Nested { outcome, end, .. } = &nested;
    check_eq(outcome, "QEMU's end", *end, End::Exit(0))?;
    check(outcome, is_traced(outcome), "nothing was traced")?;
    check_orderly(outcome)?;
    guests.iter().try_for_each(|guest| check_guest(outcome, guest, Situation::Warn))?;
    let taken = guests.iter().map(|guest| guest.expected(Situation::Warn).taken as usize).sum();
    check_eq(outcome, "split locks of L2", split_locks(outcome), [0, taken])
}

/// Guests that need more of VMX: single steps, injection, what VM entry checks, absent memory, extended state.
///
/// None that waits for another vCPU or a timer with interrupts off: in Bochs an external interrupt does not
/// end such a guest's run, and KVM's preemption timer for L2 is one.
const EXITS: [&str; 9] = [
    "ac-delivery",
    "triple-fault",
    "hlt-forever",
    "wild",
    "bad-rip",
    "privileged",
    "registers",
    "isolation",
    "vmx-hidden",
];

/// What KVM does otherwise than the hardware shows in no guest.
fn every_kind_of_exit_works_under_kvm() -> Result<()> {
    let guests: Vec<_> = EXITS.into_iter().map(find_guest).collect::<Result<_>>()?;
    let nested = run(&guests, "split_lock_detect=off")?;
    check_guests(&nested, &guests)
}

/// A KVM without VPID offers none: the hypervisor does not run, and says why.
fn what_kvm_does_not_offer_is_named() -> Result<()> {
    let setup = Setup::of_guests(Policy::Warn, &[], false)?;
    let l0 = L0 { options: MITIGATIONS_OFF, kvm: "vpid=0" };
    let Nested { outcome, .. } = nested::run(system()?, &setup, l0)?;
    let refused = outcome.events.iter().find_map(|event| match &event.body {
        Body::Refused { why } => Some(&**why),
        _ => None,
    });
    let expected = "this CPU's VT-x lacks: ENABLE_VPID, INVVPID single-context";
    check_eq(&outcome, "why", refused, Some(expected))
}

/// L0 in mode `warn` lets L2's split locks happen after it has said so, and L1 sees none of it: #AC that
/// L1 does not ask for is L0's.
fn l0_warns_of_l2() -> Result<()> {
    let guests = guests();
    let nested = run(&guests, "split_lock_detect=warn")?;
    check_guests(&nested, &guests)?;
    let outcome = &nested.outcome;
    let [faulted, taken] = split_locks(outcome);
    check_eq(outcome, "split locks of L2 that took the bus", taken, all(&guests))?;
    check(outcome, faulted > 0, "L0 had detection on and no split lock of L2 faulted")?;
    let said = nested.console.matches("took a split_lock trap").count();
    if said == 0 {
        bail!(explain(outcome, anyhow!("L0 did not warn:\n{}", nested.console)));
    }
    Ok(())
}

/// L0 in mode `fatal` ends QEMU, and with it the hypervisor and all its guests, at the first split lock.
fn l0_stops_l1_for_l2() -> Result<()> {
    let guests = guests();
    let nested = run(&guests, "split_lock_detect=fatal")?;
    let outcome = &nested.outcome;
    check_eq(outcome, "QEMU's end", nested.end, End::Signal(SIGBUS))?;
    check_eq(outcome, "split locks of L2", split_locks(outcome), [1, 0])?;
    let started = |event: &Body| matches!(event, Body::VmStart { .. });
    let came_up = outcome.events.iter().any(|event| started(&event.body));
    check(outcome, came_up, "the hypervisor did not come up")
}

/// Where L0 is fatal, a hypervisor that traces and emulates lives: no split lock of L2 is ever executed.
fn l0_has_no_reason_to_stop_l1() -> Result<()> {
    let guests = traced_guests()?;
    let nested = run_by(Policy::Emulate, SldSource::Auto, &guests, "split_lock_detect=fatal")?;
    let Nested { outcome, end, .. } = &nested;
    check_eq(outcome, "QEMU's end", *end, End::Exit(0))?;
    check(outcome, is_traced(outcome), "nothing was traced")?;
    check_orderly(outcome)?;
    check_eq(outcome, "split locks of L2", split_locks(outcome), [0, 0])?;
    let emulated = |event: &&Event| matches!(&event.body, Body::Ac(ac) if ac.verdict == "emulate");
    let emulated = outcome.events.iter().filter(emulated).count();
    check_eq(outcome, "emulated", emulated, all(&guests))
}
