//! VMs that take all they can of the CPUs, beside VMs that compute: these get their shares all the
//! same, and are not kept waiting for long.

use anyhow::{Context, Result, anyhow, ensure};
use libtest_mimic::Trial;
use machine_tests::trial;
use xtask::config::{HvConfig, Policy, Vm};
use xtask::events::{Body, Counters};
use xtask::guests::{self, End, SUCCESS};
use xtask::machine::{MachineConfig, RunOutcome};

use crate::vms::{self, on};

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("hostile::sleeper_on_one_cpu", || sleep(1)),
        trial("hostile::sleeper_comes_from_another_cpu", || sleep(2)),
        trial("hostile::a_long_log_stops_nothing", long_log),
    ];
    for (word, exit, least) in TAKERS {
        let name = format!("hostile::{}", word.replace('-', "_"));
        trials.push(trial(name, move || take(word, exit, least)));
    }
    trials
}

/// Words of the guest `hostile` that go on for ever, and VM exits of them: how often there are at least
/// so many of one reason, or of all together.
const TAKERS: [(&str, Option<&str>, u64); 6] = [
    ("hole", Some("ept-violation"), 20),
    ("storm-ipi", None, 1000),
    ("storm-nmi", None, 1000),
    ("storm-init", None, 1000),
    ("storm-absent", Some("ept-violation"), 1000),
    ("storm-console", None, 1000),
];

fn vm(name: &str, vcpus: u32, cpus: Option<u32>, cmdline: String) -> Vm {
    let guest = guests::find("hostile").expect("it is registered");
    Vm {
        name: name.to_owned(),
        vcpus,
        cpus: cpus.map(|cpu| vec![cpu]),
        cmdline,
        ..Vm::of_guest(guest)
    }
}

fn run(vms: Vec<Vm>, cpus: u32, slice_ticks: u64) -> Result<RunOutcome> {
    let config = HvConfig { slice_ticks: Some(slice_ticks), ..HvConfig::new(Policy::Warn, vms) };
    vms::run(&config, MachineConfig { cpus: cpus.into(), ..MachineConfig::default() })
}

/// One VM with a vCPU for each of two CPUs that takes what it can, and on each CPU a victim.
fn take(word: &str, exit: Option<&str>, least: u64) -> Result<()> {
    /// Ticks for which the victims compute, and that the taker may have at most: more than its share
    /// of that time, as it starts first.
    const TICKS: u64 = 6_000_000;
    const LIMIT: u64 = 6_000_000;
    /// Ticks of a turn.
    const SLICE_TICKS: u64 = 100_000;
    const VICTIMS: [&str; 2] = ["victim-0", "victim-1"];
    let taker = Vm {
        limit_ticks: Some(LIMIT),
        expose_sld: true,
        ..vm("taker", VICTIMS.len() as u32, None, word.to_owned())
    };
    let victims = VICTIMS.into_iter().zip(0..);
    let victims =
        victims.map(|(name, cpu)| vm(name, 1, Some(cpu), format!("victim ticks={TICKS}")));
    let outcome =
        run([taker].into_iter().chain(victims).collect(), VICTIMS.len() as u32, SLICE_TICKS)?;
    judge_taker(&outcome, word, exit, least, &VICTIMS).map_err(|why| on(word, &outcome, why))
}

fn judge_taker(
    outcome: &RunOutcome,
    word: &str,
    exit: Option<&str>,
    least: u64,
    victims: &[&str],
) -> Result<()> {
    /// The part of the fair share that a victim gets at least, both in per cent.
    const LEAST: u64 = 40;
    const FAIR: u64 = 50;
    let counters = ended(outcome, "taker", End::TimeLimit)?;
    let is_counted = |reason: &str| exit.is_none_or(|wanted| reason == wanted);
    let exits = counters.exits.iter().filter(|(reason, _)| is_counted(reason));
    let exits: u64 = exits.map(|(_, number)| number).sum();
    ensure!(exits >= least, "{word}: {exits} VM exits ({exit:?}), of at least {least}");
    let mut shares = Vec::new();
    for name in victims {
        let counters = ended(outcome, name, End::Exit(SUCCESS))?;
        let report = Report::of(outcome, name)?;
        // By the hypervisor's account, and by the guest's own.
        let share = [counters.ticks, report.ran].map(|ticks| ticks * 100 / report.ticks);
        ensure!(
            share.into_iter().all(|share| share * 100 >= FAIR * LEAST),
            "{name} had {share:?} % of the time of a CPU, its fair share is {FAIR} %: {report:?}"
        );
        shares.push((share, report.longest, report.at));
    }
    println!("{word}: {exits} exits; victims' shares in %, longest pauses, when: {shares:?}");
    Ok(())
}

/// A VM that prints a thousand lines comes to its end: what the machine draws of them is read.
fn long_log() -> Result<()> {
    const LINES: usize = 1000;
    let talker =
        Vm { limit_ticks: Some(25_000_000), ..vm("talker", 1, None, "storm-console".into()) };
    let outcome = run(vec![talker], 1, 100_000)?;
    ended(&outcome, "talker", End::TimeLimit)?;
    let lines = outcome.serial.lines().count();
    ensure!(lines > LINES, "only {lines} lines");
    Ok(())
}

/// A victim on the first CPU, and a VM that sleeps and then computes beside it. If there are two CPUs
/// it sleeps on the second, where another one that wakes up at the same time makes it leave.
fn sleep(cpus: u32) -> Result<()> {
    /// Ticks for which the others sleep, and for which each computes.
    const SLEEP: u64 = 4_000_000;
    const THEN: u64 = 4_000_000;
    const VICTIM: u64 = 14_000_000;
    /// Ticks of a turn: far more than the end of a VM and its events cost.
    const SLICE_TICKS: u64 = 300_000;
    /// Turns for which the victim may wait.
    const TURNS: u64 = 5;
    let sleeper = |name, cpu| vm(name, 1, cpu, format!("sleeper sleep={SLEEP} ticks={THEN}"));
    let mut vms =
        vec![vm("victim", 1, Some(0), format!("victim ticks={VICTIM}")), sleeper("sleeper", None)];
    if cpus > 1 {
        vms.push(sleeper("neighbour", Some(1)));
    }
    let names: Vec<String> = vms.iter().map(|vm| vm.name.clone()).collect();
    let outcome = run(vms, cpus, SLICE_TICKS)?;
    let judge = || {
        for name in &names {
            ended(&outcome, name, End::Exit(SUCCESS))?;
        }
        let migrations = ended(&outcome, "sleeper", End::Exit(SUCCESS))?.migrations;
        ensure!(cpus == 1 || migrations > 0, "the sleeper did not change its CPU");
        let victim = Report::of(&outcome, "victim")?;
        ensure!(victim.ran < victim.ticks - THEN / 10, "the victim had its CPU alone: {victim:?}");
        ensure!(victim.longest < TURNS * SLICE_TICKS, "the victim waited too long: {victim:?}");
        println!("{cpus} CPUs: {victim:?}, {migrations} migrations of the sleeper");
        Ok(())
    };
    judge().map_err(|why| on(&format!("{cpus} CPUs"), &outcome, why))
}

/// How a VM ended must be this; its counters.
fn ended<'a>(outcome: &'a RunOutcome, name: &str, end: End) -> Result<&'a Counters> {
    let found = outcome.events.iter().find_map(|event| match &event.body {
        Body::VmEnd { vm, reason, status, counters } if vm == name => {
            Some((reason.as_str(), *status, counters))
        }
        _ => None,
    });
    let (reason, status, counters) = found.with_context(|| format!("{name} has no end"))?;
    let expected = (end.reason(), end.status().map(u32::from));
    ensure!((reason, status) == expected, "{name} ended: {reason}, {status:?}");
    Ok(counters)
}

/// What a guest that computed says of it, in ticks.
#[derive(Clone, Copy, Debug)]
struct Report {
    longest: u64,
    at: u64,
    ran: u64,
    ticks: u64,
}

impl Report {
    fn of(outcome: &RunOutcome, name: &str) -> Result<Self> {
        let prefix = format!("[{name}] longest pause ");
        let line = outcome.serial.lines().find_map(|line| line.strip_prefix(&prefix));
        let line = line.with_context(|| format!("{name} has not reported"))?;
        let numbers = line.split(|c: char| !c.is_ascii_digit()).filter(|word| !word.is_empty());
        let numbers: Vec<u64> = numbers.map(str::parse).collect::<Result<_, _>>()?;
        let [longest, at, ran, ticks] = numbers[..] else {
            return Err(anyhow!("{name}: {line}"));
        };
        ensure!(ticks > 0, "{name}: {line}");
        Ok(Self { longest, at, ran, ticks })
    }
}
