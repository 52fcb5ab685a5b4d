//! What a VM's policy does about its split locks, against the machine's ground truth.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use machine_tests::hypervisor::{
    boot_guests_by, check_orderly, check_success, count_verdicts, machine_for, split_locks, system,
};
use machine_tests::{check, check_eq, trial};
use xtask::config::{HvConfig, Policy, SldSource, Vm};
use xtask::events::Body;
use xtask::guests::{self, Guest};
use xtask::machine::{MachineConfig, RunOutcome};
use xtask::stress::{Plan, Stressed};
use xtask::topology::Topology;

use crate::vms;

/// Guests that do not know of the feature, and how many split locks each makes.
const UNAWARE: [(&str, usize); 4] =
    [("split-add-cpl0", 3), ("split-xchg-cpl3", 3), ("split-page", 12), ("split-storm", 1000)];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("policies::guests_are_told", told),
        trial("policies::guests_are_told_in_a_fatal_host", told_in_fatal),
        trial("policies::guests_that_are_traced_are_told", told_traced),
        trial("policies::without_detection_nothing_is_told_and_nothing_limited", undetected),
        trial("policies::who_waits_for_a_limit_takes_no_time", waiting),
        trial("policies::who_waits_for_a_limit_ends_in_time", waits_too_long),
    ];
    for source in [SldSource::Msr, SldSource::Trace] {
        let part = if source == SldSource::Msr { "policies" } else { "trace::policies" };
        let name = |test: &str| format!("{part}::{test}");
        trials.extend([
            trial(name("each_vm_has_its_own"), move || each_vm(source)),
            trial(name("a_limit_makes_a_vm_wait_and_no_other"), move || limited(source)),
        ]);
        for (policy, done) in [(Policy::Step, "step"), (Policy::Emulate, "emulate")] {
            trials.push(trial(name(done), move || every_lock(policy, done, source)));
            let machines = if source == SldSource::Msr { &[1, 2, 4][..] } else { &[2] };
            for &cpus in machines {
                let name = name(&format!("{done}_loses_no_update_on_{cpus}"));
                trials.push(trial(name, move || contended(policy, done, cpus.into(), source)));
            }
        }
    }
    for (policy, done) in [(Policy::Step, "step"), (Policy::Emulate, "emulate")] {
        for cpus in ["4", "1:2:2"] {
            let name = format!("policies::stress_{done}_on_{}", cpus.replace(':', "_"));
            trials.push(trial(name, move || stress(policy, cpus.parse()?, SldSource::Msr)));
        }
    }
    trials.push(trial("trace::stress_warn_on_1_2_2", || {
        stress(Policy::Warn, "1:2:2".parse()?, SldSource::Trace)
    }));
    trials
}

/// How many split locks of guests locked the bus.
fn taken(outcome: &RunOutcome) -> usize {
    let [_, taken] = split_locks(outcome);
    taken
}

/// Every split lock is seen and dealt with, one by one, and all guests get their results.
fn every_lock(policy: Policy, done: &str, source: SldSource) -> Result<()> {
    let aware = guests::find("sld-aware");
    let unaware = UNAWARE.iter().filter_map(|(name, _)| guests::find(name));
    let all: Vec<&Guest> = unaware.chain(aware).collect();
    ensure!(all.len() == UNAWARE.len() + 1, "a guest is not registered");
    let outcome = boot_guests_by(policy, source, &all, machine_for(source))?;
    check_orderly(&outcome)?;
    for (name, locks) in UNAWARE {
        check_success(&outcome, name)?;
        check_eq(
            &outcome,
            &format!("{done} of {name}"),
            count_verdicts(&outcome, name, done),
            locks,
        )?;
    }
    check_success(&outcome, "sld-aware")?;
    check_eq(&outcome, "own #ACs", count_verdicts(&outcome, "sld-aware", "inject"), 4)?;
    let locks = UNAWARE.iter().map(|(_, locks)| locks).sum::<usize>();
    check_eq(&outcome, "bus locks", taken(&outcome), if policy == Policy::Step { locks } else { 0 })
}

/// Runs the guest `split-storm` once for each of these policies, in a host that warns.
fn storms(policies: &[(&str, Policy)], source: SldSource) -> Result<RunOutcome> {
    let storm = guests::find("split-storm").expect("it is registered");
    let vm = |(name, policy): &(&str, Policy)| Vm {
        name: (*name).to_owned(),
        policy: Some(*policy),
        ..Vm::of_guest(storm)
    };
    let vms = policies.iter().map(vm).collect();
    let config = HvConfig { source: Some(source), ..HvConfig::new(Policy::Warn, vms) };
    vms::run(&config, machine_for(source))
}

/// VMs with all policies beside each other: nobody's changes what happens to another.
fn each_vm(source: SldSource) -> Result<()> {
    let policies = [
        ("off", Policy::Off),
        ("warn", Policy::Warn),
        ("step", Policy::Step),
        ("emulate", Policy::Emulate),
        ("fatal", Policy::Fatal),
    ];
    let outcome = storms(&policies, source)?;
    for (name, verdicts) in [
        ("off", [0, 0, 0, 0]),
        ("warn", [1, 0, 0, 0]),
        ("step", [0, 1000, 0, 0]),
        ("emulate", [0, 0, 1000, 0]),
        ("fatal", [0, 0, 0, 1]),
    ] {
        let found =
            ["warn", "step", "emulate", "kill"].map(|done| count_verdicts(&outcome, name, done));
        check_eq(&outcome, &format!("verdicts of {name}"), found, verdicts)?;
        if name != "fatal" {
            check_success(&outcome, name)?;
        }
    }
    check_eq(&outcome, "bus locks", taken(&outcome), 3000)
}

/// A VM for each of these policies, exposed and not, which reads CPUID leaf 0x4000_0001: EAX of the one
/// that is not exposed, and EBX.
fn hints(
    host: Policy,
    source: SldSource,
    expected: &[(&str, u32, u32)],
    machine: MachineConfig,
) -> Result<RunOutcome> {
    let guest = guests::find("sld-hint").expect("it is registered");
    let mut vms = Vec::new();
    for (policy, ..) in expected {
        for (expose_sld, suffix) in [(false, "hidden"), (true, "exposed")] {
            let name = format!("{}-{suffix}", policy.replace('=', "-"));
            let policy = Some(policy.parse()?);
            vms.push(Vm { name, expose_sld, policy, ..Vm::of_guest(guest) });
        }
    }
    let detects = source != SldSource::None;
    let config = HvConfig { source: Some(source), ..HvConfig::new(host, vms.clone()) };
    let outcome = vms::run(&config, machine)?;
    for (vm, (_, eax, ebx)) in vms.iter().zip(expected.iter().flat_map(|row| [row, row])) {
        check_success(&outcome, &vm.name)?;
        let eax = eax | u32::from(vm.expose_sld && detects);
        let line = format!("[{}] hint {eax:#x} {ebx:#x}", vm.name);
        check(&outcome, outcome.serial.contains(&line), &format!("{line:?} is missing"))?;
    }
    Ok(outcome)
}

fn told() -> Result<()> {
    let expected = [
        ("off", 0x010, 0),
        ("warn", 0x110, 0),
        ("step", 0x210, 0),
        ("emulate", 0x310, 0),
        ("ratelimit=10", 0x410, 10),
        ("fatal", 0x512, 0),
    ];
    hints(Policy::Warn, SldSource::Msr, &expected, MachineConfig::default()).map(drop)
}

fn told_in_fatal() -> Result<()> {
    let expected = [("emulate", 0x310, 0), ("fatal", 0x512, 0)];
    hints(Policy::Fatal, SldSource::Msr, &expected, MachineConfig::default()).map(drop)
}

fn told_traced() -> Result<()> {
    let machine = MachineConfig { sld: false, ..MachineConfig::default() };
    let expected = [("off", 0x020, 0), ("emulate", 0x320, 0), ("ratelimit=7", 0x420, 7)];
    hints(Policy::Warn, SldSource::Trace, &expected, machine).map(drop)
}

fn undetected() -> Result<()> {
    let machine = MachineConfig { sld: false, ..MachineConfig::default() };
    let expected =
        [("off", 0, 0), ("warn", 0, 0), ("step", 0, 0), ("emulate", 0, 0), ("fatal", 0, 0)];
    hints(Policy::Warn, SldSource::None, &expected, machine.clone())?;
    let guest = guests::find("split-storm").expect("it is registered");
    let limited = Vm {
        name: "limited".to_owned(),
        policy: Some("ratelimit=10".parse()?),
        ..Vm::of_guest(guest)
    };
    let other = Vm { name: "other".to_owned(), ..Vm::of_guest(guest) };
    let config = HvConfig {
        source: Some(SldSource::None),
        ..HvConfig::new(Policy::Warn, vec![limited, other])
    };
    let outcome = vms::run(&config, machine)?;
    check_success(&outcome, "other")?;
    let why = outcome.events.iter().find_map(|event| match &event.body {
        Body::VmRefused { vm, why } if vm == "limited" => Some(why.as_str()),
        _ => None,
    });
    let says = why
        .is_some_and(|why| why.starts_with("a ratelimit with source none needs a CPU that exits"));
    check(&outcome, says, &format!("it is refused: {why:?}"))
}

/// A VM that may lock the bus 900 times a second, and does so a thousand times, waits; one beside it that
/// splits as many, with detection off, does not.
fn limited(source: SldSource) -> Result<()> {
    let limit = "ratelimit=900".parse()?;
    let outcome = storms(&[("limited", limit), ("free", Policy::Off)], source)?;
    for name in ["limited", "free"] {
        check_success(&outcome, name)?;
    }
    check_eq(&outcome, "steps", count_verdicts(&outcome, "limited", "step"), 1000)?;
    let steps = outcome.events.iter().filter_map(|event| match &event.body {
        Body::Ac(ac) if ac.vm == "limited" && ac.verdict == "step" => Some(event.tsc),
        _ => None,
    });
    check_limit(&outcome, &steps.collect::<Vec<_>>(), 900, MachineConfig::default().ips.into())?;
    let waited = count_verdicts(&outcome, "limited", "throttle");
    check(&outcome, waited > 0, "the VM never had to wait")?;
    let end = |name: &str| {
        outcome
            .events
            .iter()
            .position(|event| matches!(&event.body, Body::VmEnd { vm, .. } if vm == name))
    };
    check(&outcome, end("free") < end("limited"), "the other VM had to wait as well")
}

/// In no second, wherever it begins, there are more than so many. An event stands behind its step, so
/// that two of them may be a little closer than the steps' beginnings.
fn check_limit(outcome: &RunOutcome, steps: &[u64], limit: usize, second: u64) -> Result<()> {
    const JITTER: u64 = 50;
    check(outcome, steps.len() > limit, "there is no second in which there might be more")?;
    let shortest = steps.windows(limit + 1).map(|steps| steps[limit] - steps[0]).min();
    let enough = shortest.is_some_and(|ticks| ticks >= second - second / JITTER);
    check(outcome, enough, &format!("{} in {shortest:?} ticks of {second}", limit + 1))
}

/// While a VM waits, another one on its CPU has nearly all of the time.
fn waiting() -> Result<()> {
    const IPS: u32 = 10_000_000;
    const SECOND: u64 = IPS as u64;
    const SPIN: u64 = 3 * SECOND;
    let limit: Policy = "ratelimit=5".parse()?;
    let (storm, bench) = (guests::find("split-storm"), guests::find("bench"));
    let (storm, bench) = storm.zip(bench).expect("they are registered");
    let limited = Vm {
        name: "limited".to_owned(),
        policy: Some(limit),
        cmdline: "count=14".to_owned(),
        ..Vm::of_guest(storm)
    };
    let busy = Vm { cmdline: format!("spin={SPIN}"), ..Vm::of_guest(bench) };
    let machine = MachineConfig { ips: IPS, ..MachineConfig::default() };
    let outcome = vms::run(&HvConfig::new(Policy::Warn, vec![limited, busy]), machine)?;
    let mut steps = Vec::new();
    let (mut ticks, mut ended) = (0, 0);
    for event in &outcome.events {
        match &event.body {
            Body::Ac(ac) if ac.verdict == "step" => steps.push(event.tsc),
            Body::VcpuEnd { vm, counters, .. } if vm == "bench" => ticks = counters.ticks,
            Body::VmEnd { vm, .. } if vm == "limited" => ended = event.tsc,
            _ => {}
        }
    }
    check_success(&outcome, "limited")?;
    check_eq(&outcome, "steps", steps.len(), 14)?;
    check_limit(&outcome, &steps, 5, SECOND)?;
    let waited = ended.saturating_sub(steps[0]);
    check(&outcome, waited > 2 * SECOND * 9 / 10, &format!("the VM waited {waited} ticks only"))?;
    println!("{ticks} of {SPIN} ticks beside a VM that waits");
    // Starting the two is not its own time either.
    check(&outcome, ticks > SPIN / 100 * 90, &format!("{ticks} of {SPIN} ticks were the other's"))
}

/// What a VM waits for its limit is of the time that it may take.
fn waits_too_long() -> Result<()> {
    const LIMIT: u64 = 50_000_000;
    let storm = guests::find("split-storm").expect("it is registered");
    let limited = Vm {
        policy: Some("ratelimit=1".parse()?),
        limit_ticks: Some(LIMIT),
        ..Vm::of_guest(storm)
    };
    let outcome = vms::run(&HvConfig::new(Policy::Warn, vec![limited]), MachineConfig::default())?;
    let end = outcome.events.iter().find_map(|event| match &event.body {
        Body::VmEnd { reason, .. } => Some((reason.as_str(), event.tsc)),
        _ => None,
    });
    let start = outcome.events.iter().find(|event| matches!(event.body, Body::VmStart { .. }));
    let taken = end.zip(start).map(|((reason, end), start)| (reason, end - start.tsc));
    let in_time = taken.is_some_and(|(reason, ticks)| {
        reason == "time limit" && (LIMIT..LIMIT * 5 / 4).contains(&ticks)
    });
    check(&outcome, in_time, &format!("it ended like this, after so many ticks: {taken:?}"))?;
    check_eq(&outcome, "steps", count_verdicts(&outcome, "split-storm", "step"), 1)
}

/// Four vCPUs change one number that crosses cache lines, and others beside it: nothing is lost.
fn contended(policy: Policy, done: &str, cpus: Topology, source: SldSource) -> Result<()> {
    const ROUNDS: usize = 60;
    let guest = guests::find("smp").expect("it is registered");
    let vm = Vm { cmdline: format!("contend count={ROUNDS}"), ..Vm::of_guest(guest) };
    let config = HvConfig {
        source: Some(source),
        slice_ticks: Some(20_000),
        ..HvConfig::new(policy, vec![vm])
    };
    let machine = MachineConfig { cpus, ips: 1_000_000, ..machine_for(source) };
    let outcome = vms::run(&config, machine)?;
    check_success(&outcome, "smp")?;
    let locks = count_verdicts(&outcome, "smp", done);
    check(&outcome, locks >= 4 * ROUNDS, &format!("only {locks} split locks"))?;
    check_eq(&outcome, "bus locks", taken(&outcome), if policy == Policy::Step { locks } else { 0 })
}

/// VMs that split locks, flip bits and move about, all with this policy.
fn stress(policy: Policy, cpus: Topology, source: SldSource) -> Result<()> {
    // Traced, they get less done in a turn.
    let loads = if source == SldSource::Trace { 2000 } else { 1000 };
    let plan = Plan { cpus, sld: policy, source: Some(source), loads, ..Plan::default() };
    let Stressed { report, outcome } = plan.run(system()?)?;
    check(&outcome, report.wrong.is_empty(), &format!("{policy} on {cpus}\n{report}"))?;
    let found = [report.violations, report.missed, report.invented, report.outside];
    check_eq(&outcome, "violations, missed, invented, outside", found, [0; 4])
}
