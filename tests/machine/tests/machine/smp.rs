//! Several CPUs, and VMs of several vCPUs: that they come up, do what CPUs do, get their shares of the
//! time, and stay where they are told to stay.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, anyhow, ensure};
use libtest_mimic::Trial;
use machine_tests::hypervisor::{boot, check_orderly, find_guest, system};
use machine_tests::{check, check_eq, trial};
use xtask::config::{HvConfig, Policy, Vm};
use xtask::events::{Body, Counters, Event};
use xtask::guests::SUCCESS;
use xtask::machine::{Exit, MachineConfig, RunOutcome, SldScope};
use xtask::stress::{Plan, Stressed};
use xtask::topology::Topology;

use crate::operations;
use crate::vms::{self, on};

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("smp::fewer_cpus_than_there_are", few_cpus),
        trial("smp::threads_that_do_not_share_detection_are_left_out", odd_threads),
        trial("smp::sixteen_vcpus_on_four_cpus", sixteen),
        trial("smp::pinned_vcpus_stay", pinned),
        trial("smp::bad_placements_are_refused", refused),
        trial("smp::no_cpus_are_refused", no_cpus),
        trial("smp::memory_that_is_absent_beside_others", absent_memory),
        trial("smp::a_vm_that_halts_ends", halt),
    ];
    for cpus in ["1", "2", "4", "1:2:2", "1:1:4"] {
        trials.push(on_topology("cpus_come_up", cpus, come_up));
    }
    for cpus in ["1", "2", "4", "1:2:2"] {
        trials.push(on_topology("vcpus_in_long_turns", cpus, |cpus| vcpus(cpus, Turns::Long)));
        trials.push(on_topology("vcpus_that_move", cpus, |cpus| vcpus(cpus, Turns::Short)));
    }
    for cpus in ["1", "2"] {
        trials.push(on_topology("time_goes_by_weight", cpus, by_weight));
        trials.push(on_topology("storms_leave_others_their_time", cpus, storms));
    }
    for vcpus in [3, 5] {
        trials.push(trial(format!("smp::{vcpus}_vcpus_share_2_cpus"), move || equal(vcpus)));
    }
    for sld in [Policy::Off, Policy::Warn, Policy::Fatal] {
        for cpus in ["4", "1:2:2"] {
            let name = format!("stress_{sld:?}").to_lowercase();
            let twice = (sld, cpus) == (Policy::Warn, "1:2:2");
            trials.push(on_topology(&name, cpus, move |cpus| stress(cpus, sld, twice)));
        }
    }
    trials
}

fn on_topology(
    name: &str,
    cpus: &'static str,
    test: impl FnOnce(Topology) -> Result<()> + Send + 'static,
) -> Trial {
    let name = format!("smp::{name}_on_{}", cpus.replace(':', "_"));
    trial(name, move || test(cpus.parse()?))
}

/// Few instructions a second: what CPUs write takes little of their time.
const IPS: u32 = 1_000_000;
const SLICE_TICKS: u64 = 20_000;
const MIGRATE_EXITS: u64 = 100;

fn machine(cpus: Topology) -> MachineConfig {
    MachineConfig { cpus, ips: IPS, ..MachineConfig::default() }
}

/// Short turns, and every invariant checked.
fn config(vms: Vec<Vm>) -> HvConfig {
    HvConfig { slice_ticks: Some(SLICE_TICKS), verify: true, ..HvConfig::new(Policy::Warn, vms) }
}

/// A VM of a test guest, by the name of both.
fn vm(guest: &str, name: &str, cmdline: &str) -> Result<Vm> {
    let guest = find_guest(guest)?;
    let (name, cmdline) = (name.to_owned(), cmdline.to_owned());
    Ok(Vm { name, cmdline, ..Vm::of_guest(guest) })
}

fn smp(name: &str, vcpus: u32, words: &str) -> Result<Vm> {
    Ok(Vm { vcpus, ..vm("smp", name, words)? })
}

/// A VM that never leaves its guest by itself.
fn spinning(name: &str, vcpus: u32) -> Result<Vm> {
    Ok(Vm { expose_sld: false, ..smp(name, vcpus, "spin")? })
}

// ---- What a run shows. -------------------------------------------------------------------------

/// How a VM ended: reason, status, counters.
fn end_of<'a>(outcome: &'a RunOutcome, name: &str) -> Result<(&'a str, Option<u32>, &'a Counters)> {
    let end = |event: &'a Event| match &event.body {
        Body::VmEnd { vm, reason, status, counters } if vm == name => {
            Some((reason.as_str(), *status, counters))
        }
        _ => None,
    };
    outcome.events.iter().find_map(end).with_context(|| format!("{name} has no end"))
}

fn check_end(outcome: &RunOutcome, name: &str, reason: &str) -> Result<()> {
    let (found, status, _) = end_of(outcome, name)?;
    let expected = (reason, (reason == "exit").then_some(u32::from(SUCCESS)));
    check_eq(outcome, &format!("end of {name}"), (found, status), expected)
}

/// The counters of a VM's vCPUs, and the CPUs where these ended.
fn vcpus_of<'a>(outcome: &'a RunOutcome, name: &str) -> BTreeMap<u32, (u32, &'a Counters)> {
    let of_vcpu = |event: &'a Event| match &event.body {
        Body::VcpuEnd { vm, vcpu, counters } if vm == name => Some((*vcpu, (event.cpu, counters))),
        _ => None,
    };
    outcome.events.iter().filter_map(of_vcpu).collect()
}

fn ticks_of(outcome: &RunOutcome, name: &str) -> Vec<u64> {
    vcpus_of(outcome, name).values().map(|(_, counters)| counters.ticks).collect()
}

/// CPU, APIC ID and core of each `cpu-online`.
fn online(outcome: &RunOutcome) -> BTreeSet<[u32; 3]> {
    let of = |event: &Event| match event.body {
        Body::CpuOnline { apic_id, core } => Some([event.cpu, apic_id, core]),
        _ => None,
    };
    outcome.events.iter().filter_map(of).collect()
}

fn check_online(outcome: &RunOutcome, expected: &[[u32; 3]]) -> Result<()> {
    let told = outcome.events.iter().filter(|event| matches!(event.body, Body::CpuOnline { .. }));
    check_eq(outcome, "CPUs that are told of", told.count(), expected.len())?;
    check_eq(outcome, "CPU, APIC ID, core", online(outcome), expected.iter().copied().collect())?;
    let cpus = outcome.events.iter().find_map(|event| match event.body {
        Body::Boot { cpus, .. } => Some(cpus),
        _ => None,
    });
    check_eq(outcome, "CPUs at boot", cpus, Some(expected.len() as u32))
}

/// Whether the real bits were written as they must be, and are in the end as before boot. `threads` of
/// each core share one.
fn check_real_bits(outcome: &RunOutcome, threads: u32) -> Result<()> {
    if threads == 1 {
        let replayed = operations::replay(&outcome.events).map_err(|why| anyhow!(why));
        return replayed.map(drop).map_err(|why| on("one thread a core", outcome, why));
    }
    let cores: BTreeMap<u32, u32> =
        online(outcome).into_iter().map(|[cpu, _, core]| (cpu, core)).collect();
    let mut bits: BTreeMap<u32, i64> = BTreeMap::new();
    for event in &outcome.events {
        if let Body::RealBit { on, why, .. } = &event.body {
            // Each write but the first changes it. One that a thread is about to report may come
            // after a sibling's.
            let change = match (on, why.as_str()) {
                (true, _) => 1,
                (false, "boot") => 0,
                (false, _) => -1,
            };
            let bit = bits.entry(cores[&event.cpu]).or_default();
            *bit += change;
            let late = i64::from(threads) - 1;
            let right = (-late..=1 + late).contains(bit);
            check(outcome, right, &format!("a real bit has its value already: {event:?}"))?;
        }
    }
    check(outcome, bits.values().all(|bit| *bit == 0), &format!("real bits at the end: {bits:?}"))?;
    check_eq(outcome, "cores", bits.len(), cores.values().collect::<BTreeSet<_>>().len())
}

/// Ticks of all CPUs from the start of the last VM to the end of the last.
fn ticks_of_all_cpus(outcome: &RunOutcome) -> Result<u64> {
    let last = |found: fn(&Body) -> bool| {
        let event = outcome.events.iter().rfind(|event| found(&event.body));
        event.map(|event| event.tsc).context("no VM has run")
    };
    let start = last(|body| matches!(body, Body::VmStart { .. }))?;
    let end = last(|body| matches!(body, Body::VmEnd { .. }))?;
    Ok((end - start) * online(outcome).len() as u64)
}

// ---- CPUs. -------------------------------------------------------------------------------------

/// Every CPU comes up and runs what is to run there.
fn come_up(cpus: Topology) -> Result<()> {
    let all = 0..cpus.cpus() as u32;
    let mut vms = vec![smp("smp", 4, "start ipi count=20")?];
    for cpu in all.clone() {
        let split = vm("split-add-cpl0", &format!("on{cpu}"), "")?;
        vms.push(Vm { cpus: Some(vec![cpu]), ..split });
    }
    let outcome = vms::run(&config(vms), machine(cpus))?;
    let expected: Vec<_> = all.clone().map(|cpu| [cpu, cpu, cpu / cpus.threads]).collect();
    check_online(&outcome, &expected)?;
    let refused = outcome.events.iter().find(|event| matches!(event.body, Body::CpuRefused { .. }));
    check(&outcome, refused.is_none(), &format!("a CPU is refused: {refused:?}"))?;

    check_end(&outcome, "smp", "exit")?;
    for cpu in all.clone() {
        let name = format!("on{cpu}");
        check_end(&outcome, &name, "exit")?;
        let at = vcpus_of(&outcome, &name)[&0].0;
        check_eq(&outcome, &format!("where {name} ran"), at, cpu)?;
    }
    // What the hypervisor calls CPU n is the machine's CPU n.
    let split: BTreeSet<u32> = outcome.truth.iter().map(|truth| truth.cpu).collect();
    check_eq(&outcome, "CPUs where locks were split", split, all.collect())?;
    check_real_bits(&outcome, cpus.threads)
}

fn few_cpus() -> Result<()> {
    let vms = vec![smp("smp", 4, "start ipi count=20")?, vm("split-add-cpl0", "split", "")?];
    let limited = HvConfig { cpus: Some(2), ..config(vms) };
    let outcome = vms::run(&limited, machine(4.into()))?;
    check_online(&outcome, &[[0, 0, 0], [1, 1, 1]])?;
    check(&outcome, outcome.serial.contains("2 of 4 CPUs are used"), "the limit is not told")?;
    check(&outcome, outcome.events.iter().all(|event| event.cpu < 2), "another CPU has run")?;
    check(&outcome, outcome.truth.iter().all(|truth| truth.cpu < 2), "another CPU has run")?;
    ["smp", "split"].iter().try_for_each(|name| check_end(&outcome, name, "exit"))
}

/// Threads of one core that have an MSR 0x33 each: not what the manual says, and not what can be managed
/// as one.
fn odd_threads() -> Result<()> {
    let vms = vec![smp("smp", 4, "start ipi count=20")?];
    let odd = MachineConfig { scope: SldScope::Thread, ..machine("1:2:2".parse()?) };
    let outcome = vms::run(&config(vms), odd)?;
    check_online(&outcome, &[[0, 0, 0], [1, 2, 1]])?;
    let mut refused = Vec::new();
    for event in &outcome.events {
        if let Body::CpuRefused { apic_id, why } = &event.body {
            refused.push(*apic_id);
            let says = why.contains("not what a sibling thread wrote");
            check(&outcome, says, &format!("it is refused since {why}"))?;
            let line = format!("the CPU with APIC ID {apic_id} is not used: {why}");
            check(&outcome, outcome.serial.contains(&line), "the first serial port does not say")?;
        }
    }
    check_eq(&outcome, "APIC IDs of those that are left out", refused, vec![1, 3])?;
    check_end(&outcome, "smp", "exit")
}

// ---- What vCPUs do. ----------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turns {
    /// As long as by default.
    Long,
    /// Short ones, and vCPUs move on all the time.
    Short,
}

/// All that the guest `smp` tries.
const WORDS: &str = "start ipi nmi halt timer init stop shootdown end";
/// vCPUs that move: how often, at least, all together.
const MIGRATIONS: u64 = 20;

fn vcpus(cpus: Topology, turns: Turns) -> Result<()> {
    let words = format!("{WORDS} count=20");
    let knowing = smp("knowing", 4, &words)?;
    let vms = vec![Vm { expose_sld: false, ..smp("plain", 4, &words)? }, knowing];
    let config = match turns {
        Turns::Long => HvConfig { slice_ticks: None, ..config(vms) },
        Turns::Short => HvConfig { migrate_exits: Some(MIGRATE_EXITS), ..config(vms) },
    };
    let outcome = vms::run(&config, machine(cpus))?;
    let mut migrations = 0;
    for name in ["plain", "knowing"] {
        check_end(&outcome, name, "exit")?;
        migrations += end_of(&outcome, name)?.2.migrations;
        let ran =
            vcpus_of(&outcome, name).values().filter(|(_, counted)| counted.ticks > 0).count();
        check_eq(&outcome, &format!("vCPUs of {name} that ran"), ran, 4)?;
    }
    let least = if cpus.cpus() > 1 && turns == Turns::Short { MIGRATIONS } else { 0 };
    let enough = migrations >= least && (cpus.cpus() > 1 || migrations == 0);
    check(&outcome, enough, &format!("{migrations} migrations, {least} at least are due"))?;
    println!("{turns:?} turns on {cpus}: {migrations} migrations");
    Ok(())
}

/// As many vCPUs as a VM can have.
fn sixteen() -> Result<()> {
    let vms = vec![smp("many", 16, "start ipi nmi halt end count=2")?];
    let outcome = vms::run(&config(vms), machine(4.into()))?;
    check_eq(&outcome, "vCPUs", vcpus_of(&outcome, "many").len(), 16)?;
    check_end(&outcome, "many", "exit")
}

/// All vCPUs of a VM are held out of the guest for an instruction of one of them, thousands of times,
/// while the vCPUs of others come and go.
fn absent_memory() -> Result<()> {
    const ROUNDS: u64 = 200;
    let vms = vec![
        smp("stops", 4, &format!("stop count={ROUNDS}"))?,
        smp("talks", 2, "ipi halt count=20")?,
        Vm { vcpus: 2, ..vm("stress", "works", "role=unaware vcpus=2 rounds=40")? },
    ];
    let moving = HvConfig { migrate_exits: Some(MIGRATE_EXITS), ..config(vms) };
    let outcome = vms::run(&moving, machine(4.into()))?;
    ["stops", "talks", "works"].iter().try_for_each(|name| check_end(&outcome, name, "exit"))?;
    let exits = end_of(&outcome, "stops")?.2.exits.get("ept-violation").copied().unwrap_or(0);
    check(&outcome, exits >= 4 * ROUNDS, &format!("only {exits} accesses"))
}

fn halt() -> Result<()> {
    let vms = vec![
        // One halts, the other one waits for its start.
        Vm { vcpus: 2, ..vm("hlt-forever", "halts", "")? },
        // Of four that spin, exit and halt one ends all.
        smp("ends", 4, "end")?,
        vm("controls", "good", "")?,
    ];
    let outcome = vms::run(&config(vms), machine(2.into()))?;
    check_end(&outcome, "halts", "halt")?;
    check_end(&outcome, "ends", "exit")?;
    check_end(&outcome, "good", "exit")
}

// ---- Where they run, and for how long. ---------------------------------------------------------

/// vCPUs stay on the CPUs that they are told to stay on, whatever would be fair; others move.
fn pinned() -> Result<()> {
    // They know of detection and leave it off: each load has an event.
    let pin = |name, cpus| -> Result<Vm> {
        let vm = smp(name, 2, "ipi halt count=50")?;
        Ok(Vm { cpus: Some(cpus), expose_sld: true, ..vm })
    };
    let vms = vec![
        pin("on1", vec![1])?,
        pin("on0and3", vec![0, 3])?,
        smp("free", 4, "ipi halt count=50")?,
    ];
    let moving = HvConfig { migrate_exits: Some(20), ..config(vms) };
    let outcome = vms::run(&moving, machine(4.into()))?;
    for (name, cpus) in [("on1", vec![1]), ("on0and3", vec![0, 3])] {
        check_end(&outcome, name, "exit")?;
        let of_vm = |event: &&Event| {
            let on_cpu = matches!(event.body, Body::RealBit { .. } | Body::VcpuEnd { .. });
            on_cpu && event.vm() == Some(name)
        };
        let seen: BTreeSet<u32> =
            outcome.events.iter().filter(of_vm).map(|event| event.cpu).collect();
        check_eq(&outcome, &format!("CPUs of {name}"), seen, cpus.into_iter().collect())?;
    }
    check_end(&outcome, "free", "exit")?;
    for (name, right) in [("on1", 0..=0), ("on0and3", 5..=u64::MAX), ("free", 5..=u64::MAX)] {
        let migrations = end_of(&outcome, name)?.2.migrations;
        let moved = format!("{name} has migrated {migrations} times");
        check(&outcome, right.contains(&migrations), &moved)?;
    }
    Ok(())
}

/// How far a share may be from what is due, of it.
const TOLERANCE: f64 = 0.02;
/// Of the time of all CPUs, what vCPUs have had of it at least that never sleep.
const LEAST_USED: f64 = 0.95;

/// Runs these VMs, which count, for a while. Each vCPU must get its share by weight, and no CPU may stand
/// still: there are more vCPUs than CPUs.
fn count(vms: Vec<Vm>, cpus: Topology) -> Result<()> {
    let limited = HvConfig { stop_after_loads: Some(1500), ..config(vms) };
    let outcome = vms::run(&limited, machine(cpus))?;
    let mut shares = Vec::new();
    for vm in &limited.vms {
        check_end(&outcome, &vm.name, "load limit")?;
        let weighted = |ticks: u64| ticks as f64 / f64::from(vm.weight);
        let ticks = ticks_of(&outcome, &vm.name);
        println!("{} on {cpus}, weight {}: {ticks:?} ticks", vm.name, vm.weight);
        check_eq(&outcome, &format!("vCPUs of {}", vm.name), ticks.len(), vm.vcpus as usize)?;
        shares.extend(ticks.into_iter().map(weighted));
    }
    let mean = shares.iter().sum::<f64>() / shares.len() as f64;
    let fair = shares.iter().all(|share| (share / mean - 1.0).abs() < TOLERANCE);
    check(&outcome, fair, &format!("ticks by weight: {shares:?}, their mean is {mean}"))?;

    let ticks = limited.vms.iter().flat_map(|vm| ticks_of(&outcome, &vm.name)).sum::<u64>();
    let used = ticks as f64 / ticks_of_all_cpus(&outcome)? as f64;
    println!("{:.1} % of the time of all CPUs", 100.0 * used);
    check(&outcome, used >= LEAST_USED, &format!("only {used:.3} of the time was used"))
}

/// Two VMs with a vCPU for each CPU, one of which has three times the weight of the other.
fn by_weight(cpus: Topology) -> Result<()> {
    let vcpus = cpus.cpus() as u32;
    let heavy = Vm { weight: 300, ..spinning("heavy", vcpus)? };
    count(vec![spinning("light", vcpus)?, heavy], cpus)
}

/// Equal vCPUs that are no multiple of the CPUs: fair only if they move.
fn equal(vcpus: u32) -> Result<()> {
    count(vec![spinning("equal", vcpus)?], 2.into())
}

/// A VM that counts gets its half of the CPUs, whatever another one with as many vCPUs does.
fn storms(cpus: Topology) -> Result<()> {
    /// Of its half, in per cent.
    const LEAST: f64 = 80.0;
    const LOADS: u64 = 3000;
    let vcpus = cpus.cpus() as u32;
    for words in ["ipi", "nmi", "halt", "init", "stop"] {
        // More rounds than there is time for.
        let storm = smp("storm", vcpus.max(2), &format!("{words} count=1000000"))?;
        let vms = vec![storm, spinning("counts", vcpus.max(2))?];
        let limited = HvConfig { stop_after_loads: Some(LOADS), ..config(vms) };
        let outcome = vms::run(&limited, machine(cpus))?;
        ["storm", "counts"].iter().try_for_each(|name| check_end(&outcome, name, "load limit"))?;
        let half = ticks_of_all_cpus(&outcome)? as f64 / 2.0;
        let ticks = ticks_of(&outcome, "counts").iter().sum::<u64>() as f64;
        let percent = 100.0 * ticks / half;
        println!("beside {words} on {cpus}: {percent:.1} % of its share of {half} ticks");
        check(&outcome, percent >= LEAST, &format!("beside {words}: {percent:.1} % of its share"))?;
    }
    Ok(())
}

// ---- Mistakes. ---------------------------------------------------------------------------------

fn why_refused<'a>(outcome: &'a RunOutcome, name: &str) -> Option<&'a str> {
    outcome.events.iter().find_map(|event| match &event.body {
        Body::VmRefused { vm, why } if vm == name => Some(why.as_str()),
        _ => None,
    })
}

fn refused() -> Result<()> {
    let controls = |name: &str| vm("controls", name, "");
    let cases = [
        ("vcpus = 0", "vcpus = 0: a VM has 1 to 16"),
        ("vcpus = 17", "vcpus = 17: a VM has 1 to 16"),
        ("vcpus = -1", "vcpus = -1: a VM has 1 to 16"),
        ("weight = 0", "weight = 0: use 1 to 1000"),
        ("weight = 1001", "weight = 1001: use 1 to 1000"),
        ("cpus = [9]", "cpus = [9]: there is no CPU 9, this machine runs with CPUs 0 to 3"),
        ("cpus = [0, -1]", "cpus = [0, -1]: there is no CPU -1"),
        ("cpus = []", "cpus = []: name at least one CPU"),
    ];
    let mut vms: Vec<Vm> = Vec::new();
    // Twelve times sixteen vCPUs are as many as there can be.
    for number in 0..12 {
        vms.push(Vm { vcpus: 16, memory_mib: 4, ..controls(&format!("full{number}"))? });
    }
    vms.push(controls("above")?);
    let mut text = config(vms.clone()).to_text()?;
    for (number, (line, _)) in cases.iter().enumerate() {
        text += &format!(
            "[[vm]]\nname = \"bad{number}\"\nimage = \"guests/controls\"\nmemory_mib = 4\n{line}\n"
        );
    }
    let outcome = boot(&vms::setup(text, &vms)?, machine(4.into()))?;
    check_orderly(&outcome)?;
    let mut expected: Vec<_> =
        (0..).zip(cases).map(|(number, (_, says))| (format!("bad{number}"), says)).collect();
    expected.push(("above".to_owned(), "all VMs together have 192 vCPUs at most; run fewer"));
    for (name, says) in expected {
        let why = why_refused(&outcome, &name).unwrap_or_default();
        check(&outcome, why.starts_with(says), &format!("{name} says {why:?}, not {says:?}"))?;
        let line = format!("VM {name} cannot start: {why}");
        check(&outcome, outcome.serial.contains(&line), "the first serial port does not say why")?;
    }
    (0..12).try_for_each(|number| check_end(&outcome, &format!("full{number}"), "exit"))
}

fn no_cpus() -> Result<()> {
    let none = HvConfig { cpus: Some(0), ..config(vec![vm("controls", "good", "")?]) };
    let outcome = boot(&vms::setup(none.to_text()?, &none.vms)?, machine(2.into()))?;
    let why = outcome.events.iter().find_map(|event| match &event.body {
        Body::Refused { why } => Some(why.as_str()),
        _ => None,
    });
    let why = why.unwrap_or_default();
    let named = why.contains("cpus = 0: use at least 1") && outcome.serial.contains(why);
    check(&outcome, named, &format!("it says {why:?}"))?;
    check_eq(&outcome, "end", &outcome.exit, &Exit::PoweredOff)
}

// ---- Everything at once. -----------------------------------------------------------------------

/// What `cargo xtask stress` does, for a short while. Twice: the same seed gives the same run.
fn stress(cpus: Topology, sld: Policy, twice: bool) -> Result<()> {
    let plan = Plan { cpus, sld, loads: 1500, ..Plan::default() };
    let Stressed { report, outcome } = plan.run(system()?)?;
    println!("{sld:?} on {cpus}\n{report}");
    check(&outcome, report.wrong.is_empty(), &format!("{sld:?} on {cpus}\n{report}"))?;
    let found = [report.violations, report.missed, report.invented, report.outside];
    check_eq(&outcome, "violations, missed, invented, outside", found, [0; 4])?;
    check_real_bits(&outcome, cpus.threads)?;
    if twice {
        let again = plan.run(system()?)?.outcome;
        let events = outcome.events.iter().zip(&again.events);
        for (index, (first, second)) in events.enumerate() {
            ensure!(first == second, "event {index}: {first:?}, then {second:?}");
        }
        check_eq(&outcome, "events", outcome.events.len(), again.events.len())?;
        check_eq(&outcome, "split locks", &outcome.truth, &again.truth)?;
        check_eq(&outcome, "console", &outcome.serial, &again.serial)?;
    }
    Ok(())
}
