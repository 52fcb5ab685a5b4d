//! Which instructions split locks, who ran where, and what people are shown of it, against the machine's
//! ground truth.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use libtest_mimic::Trial;
use machine_tests::hypervisor::system;
use machine_tests::{check, check_eq, trial};
use serde_json::Value;
use xtask::config::{HvConfig, Policy, Vm};
use xtask::events::{Ac, Address, Body, Event, Offender, Outcome, in_order, parse_lines};
use xtask::guests;
use xtask::machine::{MachineConfig, RunOutcome};
use xtask::run::RunArgs;
use xtask::{offenders, run, symbols, target_directory};

use crate::vms;

/// Places that the hypervisor keeps of a vCPU.
const KEPT: usize = 16;

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("offenders::a_flood_of_places_leaves_the_frequent_one", flood),
        trial("offenders::code_is_read_as_it_is_executed", code_sizes),
        trial("offenders::the_command_writes_report_and_trace", files),
    ];
    for (policy, done) in [(Policy::Step, "step"), (Policy::Emulate, "emulate")] {
        let name = format!("offenders::are_the_places_that_split_{done}");
        trials.push(trial(name, move || places(policy, done)));
    }
    for cpus in [1, 3] {
        let name = format!("offenders::turns_explain_the_real_bit_on_{cpus}");
        trials.push(trial(name, move || turns(cpus)));
    }
    trials
}

/// A VM of the test guest `guest`.
fn vm(guest: &str, name: &str, cmdline: &str) -> Vm {
    let vm = Vm::of_guest(guests::find(guest).expect("it is registered"));
    Vm { name: name.to_owned(), cmdline: cmdline.to_owned(), ..vm }
}

/// What each vCPU of `name` has said of itself.
fn said<'a>(outcome: &'a RunOutcome, name: &str) -> Vec<&'a Offender> {
    let of_it = |event: &'a Event| match &event.body {
        Body::Offender(offender) if offender.vm == name => Some(offender),
        _ => None,
    };
    outcome.events.iter().filter_map(of_it).collect()
}

/// The split locks of guests that detection has stopped, by RIP.
fn truth(outcome: &RunOutcome) -> BTreeMap<Address, u64> {
    let mut counts = BTreeMap::new();
    for truth in outcome.truth.iter().filter(|truth| truth.vmx) {
        if truth.outcome == Outcome::Faulted {
            *counts.entry(truth.rip).or_default() += 1;
        }
    }
    counts
}

/// Every place, how often, when, what stands there and what it is called.
fn places(policy: Policy, done: &str) -> Result<()> {
    let config = HvConfig::new(policy, vec![vm("split-sites", "sites", "add=7 xchg=40 dec=2")]);
    let outcome = vms::run(&config, MachineConfig::default())?;
    let said = said(&outcome, "sites");
    let counts: BTreeMap<Address, u64> =
        said.iter().map(|offender| (offender.rip, offender.count)).collect();
    check_eq(&outcome, "offenders by RIP", &counts, &truth(&outcome))?;

    let symbols = symbols::of_setup(&vms::setup(config.to_text()?, &config.vms)?, system()?);
    let mut shown: Vec<_> = said
        .iter()
        .map(|offender| {
            let symbol = offender.symbol(&symbols).unwrap_or_default();
            (symbol, offender.instruction(), offender.times(), offender.done())
        })
        .collect();
    shown.sort();
    let expected = [
        ("split_sites::site_add+0x0", "lock add dword ptr [rdi], 1", 7),
        ("split_sites::site_dec+0x0", "lock dec dword ptr [rdi]", 2),
        ("split_sites::site_xchg+0x0", "xchg [rdi], esi", 40),
    ];
    let expected = expected.map(|(symbol, text, count)| {
        (symbol.to_owned(), text.to_owned(), count.to_string(), format!("{done} x{count}"))
    });
    check_eq(&outcome, "offenders as they are shown", shown, expected)?;

    for offender in said {
        let times: Vec<(u64, Address)> = acs(&outcome, "sites")
            .filter(|(_, ac)| ac.rip == offender.rip)
            .map(|(tsc, ac)| (tsc, ac.cr3))
            .collect();
        let found = [offender.first, offender.last];
        let ends = [times[0], times[times.len() - 1]];
        check_eq(&outcome, "first and last time", found, ends.map(|(tsc, _)| tsc))?;
        check_eq(&outcome, "CR3", [offender.cr3; 2], ends.map(|(_, cr3)| cr3))?;
        check(&outcome, offender.cr3 != Address(0), "paging is on in this guest")?;
        check_eq(&outcome, "code size, CPL", (offender.bits, offender.cpl), (64, 0))?;
    }
    Ok(())
}

/// The #ACs of a VM and their times.
fn acs<'a>(outcome: &'a RunOutcome, name: &str) -> impl Iterator<Item = (u64, &'a Ac)> {
    outcome.events.iter().filter_map(move |event| match &event.body {
        Body::Ac(ac) if ac.vm == name => Some((event.tsc, ac)),
        _ => None,
    })
}

/// A guest that splits locks in more places than are kept does not make the hypervisor forget the one that
/// does it most, and what is said of the others is true.
fn flood() -> Result<()> {
    const ROUNDS: u64 = 3;
    let cmdline = format!("flood={ROUNDS}");
    let config = HvConfig::new(Policy::Step, vec![vm("split-sites", "flood", &cmdline)]);
    let outcome = vms::run(&config, MachineConfig::default())?;
    let truth = truth(&outcome);
    check_eq(&outcome, "places", truth.len(), 3 + 200 + 1)?;
    let said = said(&outcome, "flood");
    check_eq(&outcome, "places that are kept", said.len(), KEPT)?;
    let most = said.iter().max_by_key(|offender| offender.count).expect("there are some");
    check_eq(&outcome, "the most frequent one", (most.count, most.missed), (ROUNDS * 200, 0))?;
    for offender in said {
        let times = truth.get(&offender.rip).copied().unwrap_or_default();
        let range = offender.count..=offender.count + offender.missed;
        let wrong = || format!("{times} times, but {offender:x?} was said");
        check(&outcome, range.contains(&times), &wrong())?;
    }
    Ok(())
}

/// The bytes of an #AC make the instruction that raised it, in every mode.
fn code_sizes() -> Result<()> {
    let expected = [("split-real", 16), ("split-vm86", 16), ("split-page", 64), ("legacy-ac", 64)];
    let vms = expected.map(|(guest, _)| vm(guest, guest, ""));
    let outcome =
        vms::run(&HvConfig::new(Policy::Emulate, vms.to_vec()), MachineConfig::default())?;
    for (guest, bits) in expected {
        let said = said(&outcome, guest);
        // An alignment check is no split lock.
        check_eq(&outcome, &format!("{guest} splits"), !said.is_empty(), guest != "legacy-ac")?;
        for offender in said {
            let text = offender.instruction();
            let locks = text.starts_with("lock ") || text.starts_with("xchg ");
            check(&outcome, locks, &format!("{guest}: {text} at {}", offender.rip))?;
            check_eq(&outcome, &format!("{guest}: code size"), offender.bits, bits)?;
        }
    }
    Ok(())
}

/// VMs that do all that changes flag and bit, in short turns.
fn turns(cpus: u32) -> Result<()> {
    let mut vms = vec![
        vm("split-storm", "storm", "count=20"),
        vm("sld-toggle", "toggle", ""),
        vm("sld-aware", "aware", ""),
        vm("controls", "controls", ""),
    ];
    vms.push(Vm { policy: Some(Policy::Off), ..vm("split-storm", "off", "count=20") });
    vms.push(Vm { policy: Some(Policy::Step), ..vm("split-storm", "step", "count=20") });
    vms.push(Vm { vcpus: 3, ..vm("smp", "smp", "") });
    let config = HvConfig {
        slice_ticks: Some(20_000),
        schedule_events: true,
        ..HvConfig::new(Policy::Warn, vms)
    };
    let machine = MachineConfig { cpus: cpus.into(), ips: 1_000_000, ..MachineConfig::default() };
    let outcome = vms::run(&config, machine)?;
    let mut cpus: BTreeMap<u32, Replay> = BTreeMap::new();
    let mut loads: BTreeMap<(&str, u32), u64> = BTreeMap::new();
    for event in &outcome.events {
        if let Body::Load { vm, vcpu, .. } = &event.body {
            *loads.entry((vm, *vcpu)).or_default() += 1;
        }
        if let Body::VcpuEnd { vm, vcpu, counters } = &event.body {
            let turns = loads.remove(&(&**vm, *vcpu)).unwrap_or_default();
            check_eq(&outcome, &format!("loads of {vm}/{vcpu}"), turns, counters.loads)?;
        }
        let wrong = cpus.entry(event.cpu).or_default().take(&event.body).err();
        let wrong = wrong.map(|why| format!("CPU {}, event {}: {why:#}", event.cpu, event.seq));
        check(&outcome, wrong.is_none(), &wrong.unwrap_or_default())?;
    }
    let sum = |count: fn(&Replay) -> u64| cpus.values().map(count).sum::<u64>();
    let [turns, changes, acs] = [sum(|cpu| cpu.turns), sum(|cpu| cpu.changes), sum(|cpu| cpu.acs)];
    check(&outcome, turns > 50 && changes > 50, &format!("{turns} turns, {changes} changes"))?;
    check(&outcome, acs > 20, &format!("{acs} #ACs"))
}

/// A CPU as its events tell it, alone on its core.
#[derive(Default)]
struct Replay<'a> {
    /// VM, vCPU and flag of whoever is loaded.
    loaded: Option<(&'a str, u32, bool)>,
    /// The real bit, once it was written.
    bit: Option<bool>,
    turns: u64,
    changes: u64,
    acs: u64,
}

impl<'a> Replay<'a> {
    /// Takes the next event.
    fn take(&mut self, body: &'a Body) -> Result<()> {
        match body {
            Body::Load { vm, vcpu, disabled } => {
                ensure!(self.loaded.is_none(), "{vm}/{vcpu} is loaded over {:?}", self.loaded);
                ensure!(self.bit == Some(!disabled), "flag {disabled}, real bit {:?}", self.bit);
                self.loaded = Some((vm, *vcpu, *disabled));
                self.turns += 1;
            }
            Body::Put { vm, vcpu, disabled } => {
                let loaded = self.loaded.take();
                ensure!(loaded == Some((vm, *vcpu, *disabled)), "{vm}/{vcpu} put: {loaded:?}");
                ensure!(self.bit == Some(!disabled), "flag {disabled}, real bit {:?}", self.bit);
            }
            Body::RealBit { vm, vcpu, on, why } => {
                ensure!(self.bit != Some(*on), "the bit is {on} already");
                self.bit = Some(*on);
                self.changes += 1;
                match why.as_str() {
                    // While the guest has its turn.
                    "warn" | "guest-write" | "policy" | "step" => {
                        let Some((name, index, disabled)) = &mut self.loaded else {
                            bail!("{why}, and nobody is loaded");
                        };
                        let subject = (vm.as_deref(), *vcpu);
                        ensure!(
                            subject == (Some(*name), Some(*index)),
                            "{subject:?} is not loaded"
                        );
                        if why != "step" {
                            *disabled = !on;
                        }
                    }
                    _ => ensure!(self.loaded.is_none(), "{why} while {:?} runs", self.loaded),
                }
            }
            Body::Ac(Ac { vm, vcpu, .. }) => {
                self.is_loaded(vm, *vcpu)?;
                self.acs += 1;
            }
            Body::TestCtrlWrite { vm, vcpu, .. } => self.is_loaded(vm, *vcpu)?,
            _ => {}
        }
        Ok(())
    }

    fn is_loaded(&self, vm: &str, vcpu: u32) -> Result<()> {
        let loaded = self.loaded.map(|(vm, vcpu, _)| (vm, vcpu));
        ensure!(loaded == Some((vm, vcpu)), "{vm}/{vcpu} is not loaded, but {loaded:?}");
        Ok(())
    }
}

/// `cargo xtask run` on a command line.
#[derive(Parser)]
struct Line {
    #[command(flatten)]
    run: RunArgs,
}

/// What a run has left: its output, events, report and trace.
struct Files {
    output: String,
    events: Vec<Event>,
    page: String,
    trace: Value,
}

/// Runs it with these arguments.
fn command(arguments: &[&str], directory: &Path) -> Result<Files> {
    let files = ["events", "report.html", "trace.json"].map(|name| directory.join(name));
    let named = ["--events", "--report", "--trace"].into_iter().zip(&files);
    let named = named.flat_map(|(option, file)| [option.into(), file.as_os_str().to_owned()]);
    let all = ["run"].iter().chain(arguments).map(Into::into).chain(named);
    let mut output = Vec::new();
    run::run_to(&Line::try_parse_from(all)?.run, &mut output)?;
    let read = |index: usize| {
        let file: &Path = &files[index];
        fs::read_to_string(file).with_context(|| file.display().to_string())
    };
    Ok(Files {
        output: String::from_utf8_lossy(&output).into_owned(),
        events: in_order(parse_lines(&read(0)?)?),
        page: read(1)?,
        trace: serde_json::from_str(&read(2)?)?,
    })
}

fn files() -> Result<()> {
    let directory = target_directory().join(format!("machines/report-{}", std::process::id()));
    fs::create_dir_all(&directory)?;
    let wrong = check_files(&directory);
    fs::remove_dir_all(&directory)?;
    wrong
}

fn check_files(directory: &Path) -> Result<()> {
    let guests = ["--machine", "bochs", "--guest", "split-sites", "--guest", "sld-aware"];
    let Files { output, events, page, trace } =
        command(&[&guests[..], &["--sld", "step"]].concat(), directory)?;
    let offenders = offenders::all(&events);
    ensure!(offenders.len() > 3, "{offenders:?}");
    for offender in &offenders {
        for part in [offender.rip.to_string(), offender.instruction(), offender.done()] {
            ensure!(page.contains(&part), "{part} is not on the page");
            ensure!(output.contains(&part), "{part} is not in\n{output}");
        }
    }
    ensure!(page.contains("split_sites::site_xchg+0x0"), "the page lacks a function");
    ensure!(page.contains("CPU 0 runs"), "the page does not show who ran");

    let shown = trace["traceEvents"].as_array().context("no trace events")?;
    let count = |phase: &str, name: &dyn Fn(&str) -> bool| {
        let is_it =
            |event: &&Value| event["ph"] == phase && event["name"].as_str().is_some_and(name);
        shown.iter().filter(is_it).count()
    };
    let happened =
        |is_it: fn(&Body) -> bool| events.iter().filter(|event| is_it(&event.body)).count();
    for (what, in_trace, in_events) in [
        (
            "turns",
            count("X", &|name| name.ends_with("/0")),
            happened(|body| matches!(body, Body::Load { .. })),
        ),
        (
            "#ACs",
            count("i", &|name| name.starts_with("#AC")),
            happened(|body| matches!(body, Body::Ac(_))),
        ),
        (
            "writes to 0x33",
            count("i", &|name| name.starts_with("0x33")),
            happened(|body| matches!(body, Body::TestCtrlWrite { .. })),
        ),
        (
            "real bits",
            count("C", &|name| name == "real bit, core 0"),
            happened(|body| matches!(body, Body::RealBit { .. })),
        ),
    ] {
        ensure!(in_trace == in_events && in_events > 0, "{what}: {in_trace} of {in_events}");
    }

    // A configuration without the key: the page says so.
    let config = directory.join("hv.toml");
    let text = "sld = \"warn\"\nat_end = \"power-off\"\n[[vm]]\nname = \"a\"\nimage = \"guests/controls\"\nmemory_mib = 8\n";
    fs::write(&config, text)?;
    let config = config.to_str().context("the target directory's name")?;
    let Files { output, page, .. } =
        command(&["--machine", "bochs", "--config", config], directory)?;
    ensure!(page.contains("hv.toml lacks"), "nothing says that turns are missing");
    ensure!(!page.contains("CPU 0 runs"), "turns out of nowhere");
    ensure!(output.contains("needs: schedule_events = true"), "nor is it said:\n{output}");
    Ok(())
}
