//! What an operator types on the serial port, and what comes of it.

use std::time::Duration;

use anyhow::{Context, Result};
use libtest_mimic::Trial;
use machine_tests::{check, check_eq, trial};
use xtask::config::{HvConfig, Policy, Vm};
use xtask::events::{Ac, Body, Outcome};
use xtask::guests::{self, SUCCESS};
use xtask::machine::{Input, MachineConfig, Reply, RunOutcome};
use xtask::topology::Topology;

use crate::vms;

/// What the hypervisor writes when it takes commands.
const READY: &str = "console: type help";
/// The end of an answer to `list`.
const LISTED: &str = "KiB of memory free";

pub fn trials() -> Vec<Trial> {
    vec![
        trial("console::lists_and_shows_while_guests_run", looks),
        trial("console::a_policy_changes_from_one_split_lock_to_the_next", policies),
        trial("console::no_update_is_lost_while_policies_change", contended),
        trial("console::a_new_limit_counts_at_once", limits),
        trial("console::sleeping_vcpus_take_a_policy", sleepers),
        trial("console::a_policy_that_cannot_be_kept_is_refused", refused),
        trial("console::a_vm_is_stopped_and_the_others_go_on", stop),
        trial("console::a_vm_is_started_again_and_nothing_is_lost", restart),
        trial("console::a_vm_can_be_started_again_and_again", soak),
        trial("console::a_vm_starts_where_another_one_made_room", room),
        trial("console::whatever_is_typed_does_no_harm", garbage),
        trial("console::there_is_none_unless_it_is_configured", absent),
    ]
}

/// A VM that splits a lock, again and again, with thousands of instructions in between. For `count`
/// times, then it ends itself.
fn storm(name: &str, count: u64) -> Vm {
    let guest = guests::find("split-storm").expect("it is registered");
    Vm {
        name: name.to_owned(),
        cmdline: format!("count={count} pause=20000"),
        ..Vm::of_guest(guest)
    }
}

/// One that does not end by itself.
fn endless(name: &str) -> Vm {
    storm(name, 1_000_000_000)
}

fn guest(name: &str) -> Vm {
    Vm::of_guest(guests::find(name).expect("it is registered"))
}

/// VMs that never end make a machine that always gets on: it is given up sooner.
fn machine() -> MachineConfig {
    MachineConfig { timeout: Duration::from_secs(15), ..MachineConfig::default() }
}

/// Runs these VMs. `script`: what to wait for, and the line to type then.
fn run(sld: Policy, vms: Vec<Vm>, cpus: Topology, script: &[(&str, &str)]) -> Result<RunOutcome> {
    let script = script.iter().map(|(after, line)| Reply::line(after, line));
    let config = HvConfig { console: true, verify: true, ..HvConfig::new(sld, vms) };
    let input = Input::Script(script.collect());
    vms::run(&config, MachineConfig { cpus, input, ..machine() })
}

/// How this VM's runs have ended, in order.
fn ends(outcome: &RunOutcome, name: &str) -> Vec<String> {
    let end = |body: &Body| match body {
        Body::VmEnd { vm, reason, status, .. } if vm == name => Some(match status {
            Some(status) => format!("{reason} {status}"),
            None => reason.clone(),
        }),
        _ => None,
    };
    outcome.events.iter().filter_map(|event| end(&event.body)).collect()
}

fn well() -> String {
    format!("exit {SUCCESS}")
}

/// Whether a line of the log begins with these words, whatever there is between them.
fn says(outcome: &RunOutcome, words: &str) -> Result<()> {
    let words: Vec<&str> = words.split_whitespace().collect();
    let mut lines = outcome.serial.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    check(outcome, lines.any(|line| line.starts_with(&words)), &format!("no line says {words:?}"))
}

fn looks() -> Result<()> {
    let script = [
        ("VM ended ended itself with status", "help"),
        ("ends all VMs and the run", "list"),
        (LISTED, "list"),
        (LISTED, "show storm"),
        ("exits:", "show ended"),
        ("exits:", "show nobody"),
        ("is named `nobody`", "quit"),
    ];
    let ended = Vm { name: "ended".to_owned(), ..guest("split-add-cpl0") };
    let vms = vec![endless("storm"), ended];
    let outcome = run(Policy::Emulate, vms, 1.into(), &script)?;
    says(&outcome, "policy VM POLICY what is done about its split locks:")?;
    says(&outcome, "storm runs emulate msr 1 1")?;
    says(&outcome, "ended ended: exit 33 - - 1 1 3")?;
    says(&outcome, "1 CPUs,")?;
    says(&outcome, "VM storm: runs, policy emulate, 8 MiB, weight 100")?;
    says(&outcome, "vCPU 0 on CPU 0: ticks")?;
    says(&outcome, "split locks: emulate")?;
    says(&outcome, "VM ended: ended: exit 33")?;
    says(&outcome, "split locks: emulate 3")?;
    check_eq(&outcome, "ends of the storm", ends(&outcome, "storm"), vec!["stopped".to_owned()])?;
    check_eq(&outcome, "ends of the other", ends(&outcome, "ended"), vec![well()])
}

/// The machine's own record has exactly what each policy promises, from the instruction on at which it
/// came into force; on another CPU, nothing changes.
fn policies() -> Result<()> {
    let script = [
        (READY, "list"),
        (LISTED, "policy storm emulate"),
        ("VM storm: policy emulate", "list"),
        (LISTED, "policy storm step"),
        ("VM storm: policy step", "list"),
        (LISTED, "policy storm fatal"),
    ];
    let on = |cpu, vm| Vm { cpus: Some(vec![cpu]), ..vm };
    let other = Vm { policy: Some(Policy::Emulate), ..storm("other", 500) };
    let vms = vec![on(0, endless("storm")), on(1, other)];
    let outcome = run(Policy::Warn, vms, 2.into(), &script)?;
    check_eq(&outcome, "ends", ends(&outcome, "storm"), vec!["split lock".to_owned()])?;
    check_eq(&outcome, "ends of the other", ends(&outcome, "other"), vec![well()])?;

    // What was done under each policy, in order.
    let mut phases: Vec<(&str, Vec<&str>)> = vec![("warn", Vec::new())];
    for event in &outcome.events {
        match &event.body {
            Body::Policy { vm, policy, .. } if vm == "storm" => phases.push((policy, Vec::new())),
            Body::Ac(Ac { vm, verdict, .. }) if vm == "storm" => {
                phases.last_mut().expect("never empty").1.push(verdict);
            }
            _ => {}
        }
    }
    let names: Vec<&str> = phases.iter().map(|(policy, _)| *policy).collect();
    check_eq(&outcome, "policies", names, vec!["warn", "emulate", "step", "fatal"])?;
    let mut expected = Vec::new();
    for ((policy, done), verdict) in phases.iter().zip(["warn", "emulate", "step", "kill"]) {
        let count = done.iter().filter(|done| **done == verdict).count();
        let wrong = done.iter().find(|done| **done != verdict && **done != "again");
        check_eq(&outcome, &format!("other than {verdict} under {policy}"), wrong, None)?;
        let once = matches!(*policy, "warn" | "fatal");
        let enough = if once { count == 1 } else { count > 5 };
        check(&outcome, enough, &format!("{count} times {verdict}"))?;
        if *policy != "warn" {
            for done in done {
                expected.push(Outcome::Faulted);
                if *done == "step" {
                    expected.push(Outcome::Taken);
                }
            }
        }
    }
    let truth = |cpu| {
        let truth = outcome.truth.iter().filter(move |truth| truth.vmx && truth.cpu == cpu);
        truth.map(|truth| truth.outcome).collect::<Vec<_>>()
    };
    let storm = truth(0);
    let warned = storm.len().checked_sub(expected.len()).context("too few split locks")?;
    check(&outcome, warned > 5, &format!("{warned} split locks under warn"))?;
    check_eq(&outcome, "the first one", storm[0], Outcome::Faulted)?;
    let taken = storm[1..warned].iter().all(|outcome| *outcome == Outcome::Taken);
    check(&outcome, taken, "a second one faulted under warn")?;
    check_eq(&outcome, "split locks after that", &storm[warned..], expected.as_slice())?;
    check_eq(&outcome, "the other's", truth(1), vec![Outcome::Faulted; 500])
}

/// Four vCPUs change one number that crosses cache lines, first stepped, then emulated, and so on.
fn contended() -> Result<()> {
    let mut script = vec![(READY, "policy smp emulate")];
    for _ in 0..4 {
        script.push(("VM smp: policy emulate", "policy smp step"));
        script.push(("VM smp: policy step", "policy smp emulate"));
    }
    let vm = Vm { cmdline: "contend count=600".to_owned(), ..guest("smp") };
    let outcome = run(Policy::Step, vec![vm], 4.into(), &script)?;
    check_eq(&outcome, "ends", ends(&outcome, "smp"), vec![well()])?;
    let is_it =
        |body: &Body, done: &str| matches!(body, Body::Ac(Ac { verdict, .. }) if verdict == done);
    for done in ["step", "emulate"] {
        let count = outcome.events.iter().filter(|event| is_it(&event.body, done)).count();
        check(&outcome, count > 50, &format!("{count} times {done}"))?;
    }
    let changes = outcome.events.iter().filter(|event| matches!(event.body, Body::Policy { .. }));
    check(&outcome, changes.count() >= 3 * 4, "few changes")
}

/// A vCPU that waits for its share of a second does not wait for it when it may have more.
fn limits() -> Result<()> {
    let slow = Vm { policy: Some("ratelimit=1".parse()?), ..storm("slow", 50) };
    let script = [
        (READY, "list"),
        (LISTED, "policy slow ratelimit=3"),
        ("VM slow: policy ratelimit=3", "list"),
        (LISTED, "policy slow step"),
    ];
    let outcome = run(Policy::Warn, vec![slow], 1.into(), &script)?;
    check_eq(&outcome, "ends", ends(&outcome, "slow"), vec![well()])?;
    let mut steps = vec![0];
    for event in &outcome.events {
        match &event.body {
            Body::Policy { .. } => steps.push(0),
            Body::Ac(Ac { verdict, .. }) if verdict == "step" => {
                *steps.last_mut().expect("never empty") += 1;
            }
            _ => {}
        }
    }
    check_eq(&outcome, "steps under each limit", steps, vec![1, 2, 47])
}

/// Also vCPUs that wait for a timer or for SIPI have a new policy at once, and sleep on.
fn sleepers() -> Result<()> {
    let sleeper = Vm {
        name: "sleeper".to_owned(),
        vcpus: 4,
        cmdline: "timer".to_owned(),
        limit_ticks: None,
        ..guest("hlt-forever")
    };
    let script = [
        (READY, "policy sleeper step"),
        ("VM sleeper: policy step", "policy sleeper off"),
        ("VM sleeper: policy off", "show sleeper"),
        ("vCPU 3 on CPU", "list"),
        (LISTED, "quit"),
    ];
    let outcome = run(Policy::Warn, vec![sleeper], 2.into(), &script)?;
    says(&outcome, "sleeper runs off msr 4 1 0")?;
    for wanted in ["step", "off"] {
        let is_it = |body: &Body| match body {
            Body::Policy { vcpu, policy, .. } if policy == wanted => Some(*vcpu),
            _ => None,
        };
        let mut told: Vec<u32> =
            outcome.events.iter().filter_map(|event| is_it(&event.body)).collect();
        told.sort_unstable();
        check_eq(&outcome, &format!("vCPUs with {wanted}"), told, vec![0, 1, 2, 3])?;
    }
    Ok(())
}

fn refused() -> Result<()> {
    let script = [
        (READY, "policy calm step"),
        ("policy step cannot be kept: the host is fatal", "policy calm sometimes"),
        ("unknown split-lock policy: use off, warn", "policy calm emulate"),
        ("VM calm: policy emulate", "list"),
        (LISTED, "quit"),
    ];
    let calm = Vm {
        name: "calm".to_owned(),
        cmdline: "timer".to_owned(),
        limit_ticks: None,
        ..guest("hlt-forever")
    };
    let outcome = run(Policy::Fatal, vec![calm], 1.into(), &script)?;
    says(&outcome, "calm runs emulate msr 1 1 0")?;
    let changes = outcome.events.iter().filter(|event| matches!(event.body, Body::Policy { .. }));
    check_eq(&outcome, "changes", changes.count(), 1)
}

/// The run stays open for a VM that was stopped, when all others have ended.
fn stop() -> Result<()> {
    let script = [
        (READY, "stop storm"),
        ("VM storm is stopped", "stop storm"),
        ("VM storm does not run", "policy storm off"),
        ("VM other ended itself with status", "list"),
        (LISTED, "start storm"),
        ("VM storm: 8 MiB", "start storm"),
        ("VM storm runs", "stop storm"),
        ("VM storm is stopped", "list"),
        (LISTED, "quit"),
    ];
    let vms = vec![endless("storm"), storm("other", 300)];
    let outcome = run(Policy::Step, vms, 2.into(), &script)?;
    let twice = vec!["stopped".to_owned(); 2];
    check_eq(&outcome, "ends", ends(&outcome, "storm"), twice)?;
    check_eq(&outcome, "ends of the other", ends(&outcome, "other"), vec![well()])?;
    says(&outcome, "storm stopped - - 1 1")?;
    says(&outcome, "storm stopped - - 1 2")
}

/// What a VM left behind is never the next one's: it gets its own results each time, and the memory is
/// what it was.
fn restart() -> Result<()> {
    let again = Vm { cmdline: "contend count=60".to_owned(), ..guest("smp") };
    let script = [
        ("VM smp ended itself with status", "list"),
        (LISTED, "start smp"),
        ("VM smp ended itself with status", "list"),
        (LISTED, "restart smp"),
        ("VM smp: ", "restart smp"),
        ("VM smp is stopped", "restart storm"),
        ("VM storm: ", "list"),
        (LISTED, "show smp"),
        ("VM smp ended itself with status", "list"),
        (LISTED, "quit"),
    ];
    let outcome = run(Policy::Step, vec![endless("storm"), again], 4.into(), &script)?;
    let stopped = "stopped".to_owned();
    check_eq(
        &outcome,
        "ends",
        ends(&outcome, "smp"),
        vec![well(), well(), stopped.clone(), well()],
    )?;
    check_eq(&outcome, "ends of the storm", ends(&outcome, "storm"), vec![stopped; 2])?;
    let free: Vec<&str> = outcome.serial.lines().filter(|line| line.contains(LISTED)).collect();
    check_eq(&outcome, "lists", free.len(), 4)?;
    // The third is of a time when it ran.
    check(&outcome, free[0] == free[1] && free[0] == free[3], &format!("free memory: {free:?}"))?;
    check(&outcome, free[0] != free[2], "the VM has no memory")
}

/// As often as one likes, also while its vCPUs have hardly begun: all that it had comes back.
fn soak() -> Result<()> {
    const TIMES: usize = 12;
    let mut again = "restart smp\r".repeat(TIMES).into_bytes();
    again.extend(b"stop smp\rlist\r");
    let reply = |after: &str, send: &[u8]| Reply { after: after.to_owned(), send: send.to_vec() };
    let script = vec![
        Reply::line(READY, "stop smp"),
        Reply::line("VM smp is stopped", "list"),
        reply(LISTED, &again),
        Reply::line(LISTED, "quit"),
    ];
    let vm = Vm { cmdline: "contend count=100000".to_owned(), limit_ticks: None, ..guest("smp") };
    let vms = vec![endless("storm"), vm];
    let config = HvConfig { console: true, verify: true, ..HvConfig::new(Policy::Step, vms) };
    let input = Input::Script(script);
    let outcome = vms::run(&config, MachineConfig { cpus: 4.into(), input, ..machine() })?;
    let stopped = vec!["stopped".to_owned(); TIMES + 1];
    check_eq(&outcome, "ends", ends(&outcome, "smp"), stopped)?;
    let free: Vec<&str> = outcome.serial.lines().filter(|line| line.contains(LISTED)).collect();
    check(&outcome, free.len() == 2 && free[0] == free[1], &format!("free memory: {free:?}"))
}

/// A VM for which there was no memory is started when there is; one whose image is missing is not.
fn room() -> Result<()> {
    let large = |name: &str| Vm { memory_mib: 140, ..endless(name) };
    let second = Vm { memory_mib: 140, ..storm("second", 20) };
    let script = [
        ("VM second cannot start", "start second"),
        ("VM second cannot start", "stop first"),
        ("VM first is stopped", "start second"),
        ("VM second ended itself with status", "start first"),
        ("VM first: 140 MiB", "list"),
        (LISTED, "quit"),
    ];
    let outcome = run(Policy::Step, vec![large("first"), second], 1.into(), &script)?;
    check_eq(&outcome, "ends", ends(&outcome, "first"), vec!["stopped".to_owned(); 2])?;
    check_eq(&outcome, "ends of the second", ends(&outcome, "second"), vec![well()])?;
    let refused = |body: &Body| matches!(body, Body::VmRefused { vm, .. } if vm == "second");
    let refusals = outcome.events.iter().filter(|event| refused(&event.body)).count();
    check_eq(&outcome, "refusals", refusals, 2)
}

fn garbage() -> Result<()> {
    let mut noise: Vec<u8> = (0..=b'Z').filter(|byte| !matches!(byte, b'\r' | b'\n')).collect();
    noise.extend(b"\x1b[A\x1b[1;5C");
    noise.extend(0x7f..=0xff);
    noise.push(b'\r');
    let long = [&[b'x'; 500][..], b"\r"].concat();
    let reply = |after: &str, send: &[u8]| Reply { after: after.to_owned(), send: send.to_vec() };
    let script = vec![
        reply(READY, &noise),
        reply("no command `", &long),
        reply("the line is too long", b"\r\r\n\n  \rlisp\x08t\r"),
        reply(LISTED, b"start\r"),
        reply("usage: start VM", b"start nobody\r"),
        reply("is named `nobody`", b"nonsense\x15help me\r"),
        reply("usage: help", b"show other\rlist\rlist\r"),
        reply(LISTED, b""),
        reply(LISTED, b"quit\r"),
    ];
    let config = HvConfig {
        console: true,
        verify: true,
        ..HvConfig::new(Policy::Step, vec![endless("storm"), storm("other", 100)])
    };
    let input = Input::Script(script);
    let outcome = vms::run(&config, MachineConfig { input, ..machine() })?;
    says(&outcome, "> list")?;
    check_eq(&outcome, "ends", ends(&outcome, "storm"), vec!["stopped".to_owned()])?;
    check(&outcome, !outcome.serial.contains("nonsense`"), "a line that was taken back was read")
}

/// Who configures no console has none.
fn absent() -> Result<()> {
    let script = vec![Reply::line("split locks", "quit"), Reply::line("", "list")];
    let config = HvConfig::new(Policy::Step, vec![storm("storm", 200)]);
    let input = Input::Script(script);
    let outcome = vms::run(&config, MachineConfig { input, ..machine() })?;
    check_eq(&outcome, "ends", ends(&outcome, "storm"), vec![well()])?;
    check(&outcome, !outcome.serial.contains('>'), "somebody answers")
}
