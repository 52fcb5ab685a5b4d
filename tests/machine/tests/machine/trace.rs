//! VMs that are traced: everything that they and the events show is what the CPU's own detection would
//! have made of it, on machines that have none and beside VMs that use it.

use anyhow::Result;
use libtest_mimic::Trial;
use machine_tests::hypervisor::{
    boot, boot_guests_by, check_guest, check_orderly, check_split_locks, check_success,
    count_verdicts, find_guest, is_traced, machine_for, make, split_locks,
};
use machine_tests::{check, check_eq, trial};
use xtask::config::{HvConfig, Policy, SldSource, Vm};
use xtask::events::Body;
use xtask::guests::{GUESTS, Guest, Situation};
use xtask::machine::{MachineConfig, RunOutcome};
use xtask::topology::Topology;

use crate::vms;

/// A model that never had detection.
const OLD_MODEL: &str = "corei7_skylake_x";

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("trace::beside_vms_that_the_cpu_detects", mixture),
        trial("trace::threads_that_share_a_core", threads),
        trial("trace::ends_with_the_first_warning", ends),
        trial("trace::is_chosen_where_the_cpu_does_not_detect", chosen),
        trial("trace::who_insists_on_the_cpu_is_refused", refused),
    ];
    for situation in [Situation::Warn, Situation::Fatal] {
        let name = |guest: &str| format!("trace::guest::{guest}::{situation:?}").to_lowercase();
        for guest in GUESTS.iter().filter(|guest| !TOO_LONG.contains(&guest.name)) {
            trials.push(trial(name(guest.name), move || run(guest, situation)));
        }
    }
    trials
}

/// It works for minutes where each instruction takes hundreds. Several vCPUs are traced in the tests of
/// policies.
const TOO_LONG: [&str; 1] = ["smp"];

/// So much more time has a guest that only its time limit ends.
const SLOWDOWN: u64 = 5;

/// Memory of the machine, in MiB, besides that of its VMs.
const MACHINE_MIB: u32 = 256;

/// As the tests of every guest in every situation, with as many split locks taken and none that faults.
fn run(guest: &Guest, situation: Situation) -> Result<()> {
    let (sld, config) = make(situation);
    let model = if situation == Situation::Fatal { OLD_MODEL.to_owned() } else { config.model };
    let memory_mib = MACHINE_MIB + guest.memory_mib;
    let config = MachineConfig { memory_mib, model, sld: false, ..config };
    let limit_ticks = guest.limit_ticks().map(|ticks| ticks * SLOWDOWN);
    let vm = Vm { limit_ticks, ..Vm::of_guest(guest) };
    let hv = HvConfig { source: Some(SldSource::Trace), ..HvConfig::new(sld, vec![vm]) };
    let outcome = vms::run(&hv, config)?;
    check(&outcome, is_traced(&outcome), "nothing was traced")?;
    check_guest(&outcome, guest, situation)?;
    check_split_locks(&outcome, &[guest], situation)
}

/// A VM of the guest that splits a thousand locks.
fn storm(name: &str, source: SldSource, policy: Policy) -> Result<Vm> {
    let (source, policy) = (Some(source), Some(policy));
    Ok(Vm { name: name.to_owned(), source, policy, ..Vm::of_guest(find_guest("split-storm")?) })
}

/// VM exits of a VM for this reason.
fn exits(outcome: &RunOutcome, name: &str, reason: &str) -> u64 {
    let of_vm = outcome.events.iter().find_map(|event| match &event.body {
        Body::VmEnd { vm, counters, .. } if vm == name => Some(counters),
        _ => None,
    });
    of_vm.and_then(|counters| counters.exits.get(reason)).copied().unwrap_or(0)
}

/// VMs with both sources, and without any, beside each other where the CPU detects: each is dealt with by
/// its own, and the CPU finds nothing in those that are not its affair.
fn mixture() -> Result<()> {
    use SldSource::{Msr, None as Nothing, Trace};
    let vms = vec![
        storm("cpu-step", Msr, Policy::Step)?,
        storm("cpu-warn", Msr, Policy::Warn)?,
        storm("traced-step", Trace, Policy::Step)?,
        storm("traced-warn", Trace, Policy::Warn)?,
        storm("traced-emulate", Trace, Policy::Emulate)?,
        storm("traced-fatal", Trace, Policy::Fatal)?,
        storm("nobody", Nothing, Policy::Off)?,
        Vm {
            name: "own".to_owned(),
            source: Some(Trace),
            ..Vm::of_guest(find_guest("sld-aware")?)
        },
    ];
    let config =
        HvConfig { slice_ticks: Some(50_000), verify: true, ..HvConfig::new(Policy::Warn, vms) };
    let outcome = vms::run(&config, MachineConfig::default())?;
    for (name, verdicts) in [
        ("cpu-step", [0, 1000, 0, 0, 0]),
        ("cpu-warn", [1, 0, 0, 0, 0]),
        ("traced-step", [0, 1000, 0, 0, 0]),
        ("traced-warn", [1, 0, 0, 0, 0]),
        ("traced-emulate", [0, 0, 1000, 0, 0]),
        ("traced-fatal", [0, 0, 0, 1, 0]),
        ("nobody", [0; 5]),
        ("own", [0, 0, 0, 0, 4]),
    ] {
        let found = ["warn", "step", "emulate", "kill", "inject"]
            .map(|done| count_verdicts(&outcome, name, done));
        check_eq(&outcome, &format!("verdicts of {name}"), found, verdicts)?;
        if name != "traced-fatal" {
            check_success(&outcome, name)?;
        }
    }
    // Only the CPU's own fault.
    let faulted = 1001 + count_verdicts(&outcome, "cpu-step", "again");
    check_eq(&outcome, "faulted and taken", split_locks(&outcome), [faulted, 5000])
}

/// A VM that was warned runs on while its sibling thread has detection on: what the CPU raises then is
/// stepped.
fn threads() -> Result<()> {
    let traced = Vm { cpus: Some(vec![0]), ..storm("traced", SldSource::Trace, Policy::Warn)? };
    let by_cpu = Vm { cpus: Some(vec![1]), ..storm("cpu", SldSource::Msr, Policy::Step)? };
    let config = HvConfig { verify: true, ..HvConfig::new(Policy::Warn, vec![traced, by_cpu]) };
    let cpus = Topology { packages: 1, cores: 1, threads: 2 };
    let outcome = vms::run(&config, MachineConfig { cpus, ..MachineConfig::default() })?;
    for name in ["traced", "cpu"] {
        check_success(&outcome, name)?;
    }
    check_eq(&outcome, "steps by the CPU", count_verdicts(&outcome, "cpu", "step"), 1000)?;
    check_eq(&outcome, "warnings", count_verdicts(&outcome, "traced", "warn"), 1)?;
    let stepped = count_verdicts(&outcome, "traced", "step");
    check(&outcome, stepped > 0, "the threads never met")?;
    let by_cpu = |body: &Body| matches!(body, Body::Ac(ac) if ac.source == "msr");
    let faulted = outcome.events.iter().filter(|event| by_cpu(&event.body)).count();
    let expected = [faulted, 2000];
    check_eq(&outcome, "faulted and taken", split_locks(&outcome), expected)
}

/// A guest that is let pass is not stepped any more: a thousand split locks cost no more exits than three.
fn ends() -> Result<()> {
    let source = SldSource::Trace;
    let stepped = |name: &str| -> Result<u64> {
        let guest = find_guest(name)?;
        let outcome = boot_guests_by(Policy::Warn, source, &[guest], machine_for(source))?;
        check_orderly(&outcome)?;
        check_guest(&outcome, guest, Situation::Warn)?;
        Ok(exits(&outcome, name, "monitor-trap-flag"))
    };
    let (few, many) = (stepped("split-add-cpl0")?, stepped("split-storm")?);
    anyhow::ensure!(few > 1000 && many.abs_diff(few) < 1000, "{few} and {many} were stepped");
    Ok(())
}

/// Who says nothing gets the CPU's detection where it works, and is traced where it does not.
fn chosen() -> Result<()> {
    for (sld, source) in [(true, "msr"), (false, "trace")] {
        let config = HvConfig::new(Policy::Step, vec![Vm::of_guest(find_guest("split-add-cpl0")?)]);
        let outcome = vms::run(&config, MachineConfig { sld, ..MachineConfig::default() })?;
        let found = outcome.events.iter().find_map(|event| match &event.body {
            Body::Boot { sld_source, .. } => Some(sld_source.as_str()),
            _ => None,
        });
        check_eq(&outcome, "source", found, Some(source))?;
        check_eq(&outcome, "steps", count_verdicts(&outcome, "split-add-cpl0", "step"), 3)?;
        let is_trace_bit = |body: &Body| matches!(body, Body::TraceBit { .. });
        let trace_bits = outcome.events.iter().any(|event| is_trace_bit(&event.body));
        check_eq(&outcome, "bits of the software", trace_bits, !sld)?;
    }
    Ok(())
}

/// A VM that is to have the CPU's detection and cannot is refused; the others run.
fn refused() -> Result<()> {
    let vms = vec![
        storm("insists", SldSource::Msr, Policy::Warn)?,
        storm("traced", SldSource::Trace, Policy::Step)?,
    ];
    let config = HvConfig::new(Policy::Warn, vms);
    let machine = MachineConfig { sld: false, ..MachineConfig::default() };
    let outcome = boot(&vms::setup(config.to_text()?, &config.vms)?, machine)?;
    let why = outcome.events.iter().find_map(|event| match &event.body {
        Body::VmRefused { vm, why } if vm == "insists" => Some(why.as_str()),
        _ => None,
    });
    let expected =
        "source msr: this machine's CPUs have no split-lock detection; use source auto or trace";
    check_eq(&outcome, "refusal", why, Some(expected))?;
    check_success(&outcome, "traced")?;
    check_eq(&outcome, "steps", count_verdicts(&outcome, "traced", "step"), 1000)
}
