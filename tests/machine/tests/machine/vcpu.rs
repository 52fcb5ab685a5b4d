//! What a vCPU is to its guest: registers that nothing changes, events that arrive, and time for the
//! others whatever it does.

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};
use libtest_mimic::Trial;
use machine_tests::hypervisor::{boot, boot_guests, check_guest, check_orderly, find_guest, make};
use machine_tests::{check_eq, trial};
use xtask::config::{HvConfig, Policy, Setup, Vm};
use xtask::events::Body;
use xtask::guests::{SUCCESS, Situation};
use xtask::machine::{MachineConfig, RunOutcome};

use crate::vms::{self, on};

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("vcpu::a_far_timer_is_waited_for_until_the_limit", far_timer),
        trial("vcpu::an_endless_ac_leaves_the_others_their_time", endless),
        trial("vcpu::local_apics_while_others_run", local_apics),
    ];
    for (name, model) in [("avx", "arrow_lake"), ("avx512", "sapphire_rapids")] {
        let machine = || MachineConfig { model: model.to_owned(), ..MachineConfig::default() };
        let (alone, shared) = (machine(), machine());
        trials.extend([
            trial(format!("vcpu::registers_alone_{name}"), move || registers(&[1], alone)),
            trial(format!("vcpu::registers_of_three_{name}"), move || {
                registers(&[2, 3, 4], shared)
            }),
        ]);
    }
    trials
}

/// Rounds of the guest `registers`: in each it works for several slices.
const ROUNDS: u64 = 30;
const SLICE_TICKS: u64 = 20_000;
/// Switches of each of several VMs, at least.
const SWITCHES: u64 = 200;
/// Every way to leave the guest that it goes. With PAUSE the VM gives its time away.
const EXITS: [&str; 15] = [
    "exception",
    "cpuid",
    "rdmsr",
    "wrmsr",
    "rdpmc",
    "vmcall",
    "io",
    "ept-violation",
    "monitor-trap-flag",
    "cr-access",
    "wbinvd",
    "invd",
    "xsetbv",
    "preemption-timer",
    "pause",
];

fn registers(seeds: &[u64], config: MachineConfig) -> Result<()> {
    let guest = find_guest("registers")?;
    let name = |seed: u64| format!("{}-{seed}", guest.name);
    let vms = seeds.iter().map(|&seed| Vm {
        name: name(seed),
        cmdline: format!("seed={seed} rounds={ROUNDS}"),
        ..Vm::of_guest(guest)
    });
    let machine = format!("{}, seeds {seeds:?}", config.model);
    let outcome = vms::run(&in_short_turns(vms.collect()), config)?;
    let judge = || {
        for &seed in seeds {
            let (reason, status, exits) = end_of(&outcome, &name(seed))?;
            ensure!((reason, status) == ("exit", Some(SUCCESS.into())), "{reason}, {status:?}");
            let missing: Vec<_> = EXITS.iter().filter(|exit| !exits.contains_key(**exit)).collect();
            ensure!(missing.is_empty(), "no exits: {missing:?}");
            let switches = exits["preemption-timer"];
            ensure!(seeds.len() == 1 || switches > SWITCHES, "interrupted only {switches} times");
        }
        Ok(())
    };
    judge().map_err(|why| on(&machine, &outcome, why))
}

/// A guest that waits for a timer in the far future ends when its time is up.
fn far_timer() -> Result<()> {
    let guest = find_guest("hlt-forever")?;
    let vm =
        Vm { cmdline: "timer".to_owned(), limit_ticks: Some(3_000_000), ..Vm::of_guest(guest) };
    let outcome = vms::run(&in_short_turns(vec![vm]), MachineConfig::default())?;
    let (reason, ..) = end_of(&outcome, guest.name)?;
    check_eq(&outcome, "reason", reason, "time limit")
}

/// CVE-2015-5307.
fn endless() -> Result<()> {
    let guests = [find_guest("ac-loop")?, find_guest("controls")?, find_guest("ac-delivery")?];
    let (sld, config) = make(Situation::Warn);
    let outcome = boot_guests(sld, &guests, config)?;
    check_orderly(&outcome)?;
    for guest in guests {
        check_guest(&outcome, guest, Situation::Warn)?;
    }
    Ok(())
}

/// Timers that become due while others run, in two VMs beside one whose guest wants nothing of its local APIC.
fn local_apics() -> Result<()> {
    const COUNT: usize = 2;
    let guest = find_guest("apic")?;
    let names = [[guest.name; COUNT].as_slice(), &["controls"]].concat();
    let names: Vec<String> = names.into_iter().map(str::to_owned).collect();
    let (sld, config) = make(Situation::Warn);
    let setup = Setup::of_guests(sld, &names, false)?;
    let config_text = format!("slice_ticks = {SLICE_TICKS}\n{}", setup.config);
    let outcome = boot(&Setup { config: config_text, ..setup }, config)?;
    check_orderly(&outcome)?;
    let ends = outcome.events.iter().filter_map(|event| match &event.body {
        Body::VmEnd { status, .. } => Some(*status),
        _ => None,
    });
    let expected = vec![Some(SUCCESS.into()); names.len()];
    check_eq(&outcome, "statuses", ends.collect::<Vec<_>>(), expected)?;
    // Its own, of legacy alignment checking.
    let due = guest.expected(Situation::Warn).inject as usize * COUNT;
    let verdicts = outcome.events.iter().filter_map(|event| match &event.body {
        Body::Ac(ac) => Some(ac.verdict.as_str()),
        _ => None,
    });
    check_eq(&outcome, "verdicts", verdicts.collect::<Vec<_>>(), vec!["inject"; due])
}

fn in_short_turns(vms: Vec<Vm>) -> HvConfig {
    HvConfig { slice_ticks: Some(SLICE_TICKS), ..HvConfig::new(Policy::Warn, vms) }
}

/// Reason, status and exits of a VM.
fn end_of<'a>(
    outcome: &'a RunOutcome,
    name: &str,
) -> Result<(&'a str, Option<u32>, &'a BTreeMap<String, u64>)> {
    for event in &outcome.events {
        if let Body::VmEnd { vm, reason, status, counters } = &event.body
            && vm == name
        {
            return Ok((reason, *status, &counters.exits));
        }
    }
    bail!("{name} has no end")
}
