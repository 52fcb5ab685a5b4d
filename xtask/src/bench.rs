//! `cargo xtask bench`: what VM exits cost, counted in instructions on the reference machine.
//!
//! The guest `bench` times its own exits by RDTSC. The shim's profile of the same run says which
//! functions of the hypervisor the instructions belong to; it also gives the rows that no guest can
//! measure from inside, the switches between vCPUs, and what the same exits take on several CPUs, whose
//! common time-stamp counter counts no single CPU's instructions.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::bare::root;
use crate::config::{HvConfig, Policy, Setup, SldSource, Source, Vm};
use crate::console::Step;
use crate::events::{Body, Event, parse_lines};
use crate::guests;
use crate::machine::{self, MachineConfig};
use crate::peer;
use crate::profile::{Functions, Visit};
use crate::report::{align, judge};
use crate::system::System;

/// Arguments of `bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Store the rows here, as `[{"name":…,"min":…,"median":…},…]`.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Show for each row which functions of the hypervisor its instructions belong to.
    #[arg(long)]
    profile: bool,
    /// Put the figures into docs/performance.md.
    #[arg(long)]
    update: bool,
    /// Measure another hypervisor's exits and its dealings with split locks on the same machine, and show
    /// them beside the figures in docs/performance.md.
    #[arg(long, value_enum, conflicts_with_all = ["json", "profile"])]
    peer: Option<Peer>,
}

/// `--peer`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// KVM of Linux 6.1, with QEMU.
    Kvm,
}

/// The guest.
pub(crate) const GUEST: &str = "bench";
/// Its memory, most of which it touches page by page.
const MEMORY_MIB: u32 = 64;
/// Where the committed figures stand, relative to the root.
const DOCUMENT: &str = "docs/performance.md";
/// Rows of runs of their own, of guests that do nothing on one CPU: so many vCPUs take turns.
const SWITCHES: [(&str, u64); 3] =
    [("vcpu_switch", 2), ("vcpu_switch_8", 8), ("vcpu_switch_64", 64)];
/// Policies whose split locks are measured in VMs of their own, each with its rows and how many exits an
/// execution has.
const POLICIES: [(Policy, &[(&str, usize)]); 3] = [
    (Policy::Step, &[("ac_step", 2)]),
    (Policy::Emulate, &[("ac_emulate", 1), ("ac_emulate_page", 1), ("ac_emulate_8b", 1)]),
    (Policy::Warn, &[("ac_warn", 1)]),
];
/// A vCPU's turn in that run, in ticks: no VM has to wait for another.
const WHOLE_RUN: u64 = 1_000_000_000;
/// Exit reason "VMX-preemption timer expired".
const PREEMPTION_TIMER: u16 = 52;
/// The row of a guest that is traced, and exit reason "Monitor trap flag".
const TRACED: &str = "trace";
const MONITOR_TRAP_FLAG: u16 = 37;
/// Ticks for which that guest works.
const TRACED_TICKS: u64 = 1_000_000;
/// A vCPU's turn in these runs, in ticks.
const SLICE: u64 = 20_000;
/// How many turns there are at least, in total and of each vCPU.
const TURNS: u64 = 100;
const OWN_TURNS: u64 = 3;
/// Memory of a guest that does nothing.
const SPINNING_MIB: u32 = 4;
/// CPUs of the larger machine, and executions of each row there.
const CPUS: u32 = 4;
const EXECUTIONS: u32 = 20;
/// Memory of the machine: that of 64 guests that do nothing, and as much again.
const MACHINE_MIB: u32 = 512;

/// Functions with fewer instructions have no line in the document.
const PROFILE_LEAST: u64 = 5;

/// A row of the table.
struct Row {
    /// As the guest prints it.
    name: &'static str,
    what: &'static str,
    /// The most that it should take.
    aim: Option<u64>,
    /// What KVM takes: Linux 6.1, mitigations off, on the same machine.
    kvm: &'static str,
}

const fn row(name: &'static str, what: &'static str, aim: Option<u64>, kvm: &'static str) -> Row {
    Row { name, what, aim, kvm }
}

const ROWS: &[Row] = &[
    row("exception", "UD2 and a handler in the guest: no exit, for comparison", None, ""),
    row("cpuid", "CPUID", Some(150), "1430"),
    row("rdmsr", "RDMSR of IA32_MISC_ENABLE", Some(180), "1540"),
    row("wrmsr", "WRMSR of IA32_MISC_ENABLE", Some(180), "1570 to 1950"),
    row("rdmsr_0x33", "RDMSR of 0x33", Some(180), ""),
    row("wrmsr_0x33_same", "WRMSR of 0x33, nothing changes", Some(250), "1980 (#GP)"),
    row("wrmsr_0x33_other", "WRMSR of 0x33 that changes the real bit", None, "1980 (#GP)"),
    row("rdmsr_gp", "RDMSR of no MSR: #GP", None, ""),
    row("wrmsr_gp", "WRMSR of no MSR: #GP", None, ""),
    row("uart_scratch", "OUT to the UART's scratch register", None, "3500"),
    row("uart_data", "OUT of a character", None, "3500"),
    row("out_nobody", "OUT to a port that nobody owns", Some(200), "3500"),
    row("in_nobody", "IN from a port that nobody owns", Some(200), "3500"),
    row("ept_fill_4k", "first touch of a 4 KiB page", Some(450), "3260"),
    row("ept_fill_2m", "first touch of a 2 MiB page", Some(450), "3260"),
    row("ac_legacy", "#AC by legacy alignment checking", Some(250), "1740"),
    row("ac_split_lock", "#AC by the guest's own split-lock detection", Some(250), ""),
    row("ac_step", "LOCK ADD across two lines, policy `step`", Some(600), ""),
    row("ac_emulate", "the same, policy `emulate`", Some(2000), ""),
    row("ac_emulate_page", "the same across two pages", Some(2000), ""),
    row("ac_emulate_8b", "LOCK CMPXCHG8B across two lines, policy `emulate`", Some(2000), ""),
    row("ac_warn", "LOCK ADD across two lines, policy `warn`: a task's first", None, "7150"),
    row("hlt_pending", "STI and HLT with an interrupt pending, and its handler", None, ""),
    row(TRACED, "each instruction of a guest that is traced", None, ""),
    row("vcpu_switch", "from one vCPU's exit to another's entry, 2 on a CPU", Some(700), ""),
    row("vcpu_switch_8", "the same with 8", Some(700), ""),
    row("vcpu_switch_64", "the same with 64", Some(700), ""),
];

/// Least and median ticks, or why there are none.
pub(crate) type Figures = Result<(u64, u64), String>;

/// A row and what was measured of it.
pub struct Measured {
    row: &'static Row,
    figures: Figures,
    /// The hypervisor's instructions in the most frequent course of the row's exit or exits, by function.
    functions: Vec<(String, u64)>,
    /// The hypervisor's instructions, the median: on one CPU, on one of four, on all of four.
    in_hypervisor_on: [Option<u64>; 3],
}

impl Measured {
    /// The row's name.
    pub fn name(&self) -> &'static str {
        self.row.name
    }

    /// The median of what the guest measured: its own instructions and the hypervisor's.
    pub fn median(&self) -> Option<u64> {
        self.figures.as_ref().ok().map(|(_, median)| *median)
    }

    /// The median of the hypervisor's instructions, where the row has an exit that was measured so: on a
    /// machine of one CPU, on one CPU of four while the others idle, and on all four.
    pub fn on_cpus(&self) -> Option<[u64; 3]> {
        let [one, one_of_four, four] = self.in_hypervisor_on;
        Some([one?, one_of_four?, four?])
    }

    /// The hypervisor's instructions in the most frequent course of the row's exit, as the machine
    /// counted them; 0 where there is no exit.
    pub fn in_hypervisor(&self) -> u64 {
        self.functions.iter().map(|(_, times)| times).sum()
    }

    /// The functions that these belong to.
    pub fn functions(&self) -> impl Iterator<Item = &str> {
        self.functions.iter().map(|(name, _)| name.as_str())
    }
}

/// A row of the JSON file.
#[derive(Serialize)]
struct JsonRow {
    name: &'static str,
    min: u64,
    median: u64,
}

/// Measures and shows.
///
/// # Errors
/// If the machine cannot be run, a guest fails, or a row is missing.
pub fn run(args: &BenchArgs) -> Result<()> {
    let document = root().join(DOCUMENT);
    let text = fs::read_to_string(&document).with_context(|| format!("cannot read {DOCUMENT}"))?;
    let previous = medians(&text);
    if let Some(Peer::Kvm) = args.peer {
        return compare(args, &document, &text);
    }
    let measured = measure(&System::build()?)?;

    if args.profile {
        println!("{}", profile_text(&measured, 1));
    }
    print!("{}\n{}", table(&measured, &previous), cpus_table(&measured));
    if let Some(path) = &args.json {
        let json = serde_json::to_string_pretty(&json(&measured))? + "\n";
        fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.update {
        let text = replace(&text, "figures", &markdown(&measured))?;
        let profile = format!("```text\n{}```\n", profile_text(&measured, PROFILE_LEAST));
        let text = replace(&text, "profile", &profile)?;
        let text = replace(&text, "cpus", &cpus_markdown(&measured))?;
        fs::write(&document, text).with_context(|| format!("cannot write {DOCUMENT}"))?;
    }
    Ok(())
}

/// Measures KVM and shows it beside the document's figures.
fn compare(args: &BenchArgs, document: &Path, text: &str) -> Result<()> {
    let system = System::build()?;
    let exits = peer::exits(&system)?;
    let split_locks = peer::split_locks(&system)?;
    let medians = medians(text);
    let ours = || ROWS.iter().filter_map(|row| Some((row.name, *medians.get(row.name)?)));
    print!("{}\n{}", exits.table(ours()), split_locks.table());
    if args.update {
        let text = replace(text, "peer", &exits.markdown(ours()))?;
        let text = replace(&text, "peer split locks", &split_locks.markdown())?;
        fs::write(document, text).with_context(|| format!("cannot write {DOCUMENT}"))?;
    }
    Ok(())
}

// ---- Measuring ---------------------------------------------------------------------------------

/// Measures all rows.
///
/// # Errors
/// If the machine cannot be run, a guest fails, or a row is missing.
pub fn measure(system: &System) -> Result<Vec<Measured>> {
    let step = Step::start("Measuring");
    let registered = guests::find(GUEST).context("the guest is not registered")?;
    let vm = Vm { memory_mib: MEMORY_MIB, ..Vm::of_guest(registered) };
    // On the machine's CPU 0, while others are busy, an interrupt may come between STI and HLT: the emulator
    // counts VM exits of other CPUs as instructions of that one. It has nothing to do.
    let pinned = |cpu: u32| Vm {
        name: format!("{GUEST}-{cpu}"),
        cpus: Some(vec![cpu + 1]),
        cmdline: format!("n={EXECUTIONS}"),
        ..vm.clone()
    };
    let all = (0..CPUS).map(pinned).collect();
    let exits = [
        run_machine(system, &setup(None, vec![vm.clone()])?, 1)?,
        run_machine(system, &setup(None, vec![pinned(0)])?, CPUS + 1)?,
        run_machine(system, &setup(None, all)?, CPUS + 1)?,
    ];
    let mut switches = BTreeMap::new();
    for (name, vcpus) in SWITCHES {
        switches.insert(name, switches_of(system, &vm, vcpus)?);
    }
    let policies = run_machine(system, &policies_of(&vm)?, 1)?;
    let exits_of = |name| {
        let rows = POLICIES.iter().flat_map(|(_, rows)| rows.iter());
        rows.clone().find(|(row, _)| *row == name).map(|(_, exits)| *exits)
    };
    let spinning = Vm {
        source: Some(SldSource::Trace),
        expose_sld: false,
        cmdline: format!("spin={TRACED_TICKS}"),
        ..vm.clone()
    };
    let traced = run_machine(system, &setup(None, vec![spinning])?, 1)?;
    step.done();

    let read = |file: &Path| fs::read(file).with_context(|| format!("{}", file.display()));
    let (guest, kernel) = (read(system.guest(GUEST)?)?, read(system.kernel())?);
    let (guest, kernel) = (Functions::of(&guest)?, Functions::of(&kernel)?);

    let mut printed = rows_printed(&exits[0].serial)?;
    printed.append(&mut rows_printed(&policies.serial)?);
    let mut measured = Vec::new();
    for row in ROWS {
        let (figures, visits, in_hypervisor_on) = if let Some(run) = switches.get(row.name) {
            let visits = run.visits(|visit| visit.switched && visit.reason == PREEMPTION_TIMER);
            (figures(&visits), visits, [None; 3])
        } else if row.name == TRACED {
            let visits = traced.visits(|visit| visit.reason == MONITOR_TRAP_FLAG);
            (figures(&visits), visits, [None; 3])
        } else {
            let code = format!("{GUEST}::{}::timed", row.name);
            let of_row = |visit: &Visit| guest.symbol(visit.guest) == Some(&code);
            let median = |run: &Run| figures(&run.visits(of_row)).ok().map(|(_, median)| median);
            let figures =
                printed.remove(row.name).with_context(|| format!("no row {}", row.name))?;
            match exits_of(row.name) {
                Some(_) => (figures, policies.visits(of_row), [None; 3]),
                None => (figures, exits[0].visits(of_row), exits.each_ref().map(median)),
            }
        };
        let functions = usual(&visits, exits_of(row.name).unwrap_or(1), &kernel)?;
        measured.push(Measured { row, figures, functions, in_hypervisor_on });
    }
    if let Some(name) = printed.keys().next() {
        bail!("the guest measured {name:?}, of which nothing is known here");
    }
    Ok(measured)
}

/// A run of a VM for each of [`POLICIES`], whose guest does not know of detection.
fn policies_of(vm: &Vm) -> Result<Setup> {
    let splitting = |(policy, _): &(Policy, _)| Vm {
        name: format!("{GUEST}-{policy}"),
        expose_sld: false,
        policy: Some(*policy),
        cmdline: format!("policy={policy}"),
        ..vm.clone()
    };
    setup(Some(WHOLE_RUN), POLICIES.iter().map(splitting).collect())
}

/// The hypervisor's instructions by function, the greatest first, in the most frequent courses of an
/// instruction that exits so many times.
fn usual(visits: &[&Visit], exits: usize, kernel: &Functions<'_>) -> Result<Vec<(String, u64)>> {
    let mut visits = visits.to_vec();
    visits.sort_by_key(|visit| Reverse(visit.count));
    let mut sums: BTreeMap<String, u64> = BTreeMap::new();
    for visit in visits.into_iter().take(exits) {
        for (function, times) in visit.by_function(kernel)? {
            *sums.entry(function).or_default() += times;
        }
    }
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(_, times)| Reverse(*times));
    Ok(sums)
}

/// A run of so many vCPUs that take turns on one CPU and do nothing else. Their settings are the same,
/// so that no switch may write MSR 0x33.
fn switches_of(system: &System, vm: &Vm, vcpus: u64) -> Result<Run> {
    let spin = SLICE * TURNS.max(OWN_TURNS * vcpus);
    let spinning = |number| Vm {
        name: format!("{GUEST}-{number}"),
        memory_mib: SPINNING_MIB,
        expose_sld: false,
        cmdline: format!("spin={spin}"),
        ..vm.clone()
    };
    let run = run_machine(system, &setup(Some(SLICE), (1..=vcpus).map(spinning).collect())?, 1)?;
    let written = run.events.iter().find(|event| match &event.body {
        Body::RealBit { why, .. } => !matches!(&**why, "boot" | "offline"),
        _ => false,
    });
    match written {
        Some(event) => bail!("MSR 0x33 was written though all vCPUs want the same: {event:?}"),
        None => Ok(run),
    }
}

/// A configuration of these VMs with one image.
fn setup(slice_ticks: Option<u64>, vms: Vec<Vm>) -> Result<Setup> {
    let images = vec![(vms[0].image.clone(), Source::Registered(GUEST))];
    let config = HvConfig { slice_ticks, ..HvConfig::new(Policy::Warn, vms) }.to_text()?;
    Ok(Setup { config, images })
}

/// What a run left.
struct Run {
    serial: String,
    events: Vec<Event>,
    visits: Vec<Visit>,
}

impl Run {
    fn visits(&self, wanted: impl Fn(&Visit) -> bool) -> Vec<&Visit> {
        self.visits.iter().filter(|visit| wanted(visit)).collect()
    }
}

fn run_machine(system: &System, setup: &Setup, cpus: u32) -> Result<Run> {
    let disk = system.temporary_disk(setup)?;
    let config = MachineConfig {
        image: disk.path().to_owned(),
        cpus: cpus.into(),
        memory_mib: MACHINE_MIB,
        // Output is none of the figures, but most of the run.
        ips: 1_000_000,
        profile: true,
        ..MachineConfig::default()
    };
    let recording = machine::record(&config, &mut |_| {})?;
    let visits = parse_lines(&recording.profile).context("profile")?;
    let outcome = recording.parse()?;
    if let Err(why) = judge(&outcome) {
        bail!("{why}\n{}", outcome.serial);
    }
    for event in &outcome.events {
        if let Body::VmEnd { vm, reason, status, .. } = &event.body {
            let right = *status == Some(guests::SUCCESS.into());
            ensure!(right, "VM {vm} ended with {reason} {status:?}\n{}", outcome.serial);
        }
    }
    Ok(Run { serial: outcome.serial, events: outcome.events, visits })
}

/// The rows among the lines of a log, by name.
fn rows_printed(log: &str) -> Result<BTreeMap<String, Figures>> {
    let prefix = format!("[{GUEST}");
    parse_rows(log.lines().filter_map(|line| {
        let (_, row) = line.trim_end().strip_prefix(&prefix)?.split_once("] bench ")?;
        Some(row)
    }))
}

/// The rows among the lines of a log that begin so.
pub(crate) fn printed_by(log: &str, prefix: &str) -> Result<BTreeMap<String, Figures>> {
    let prefix = format!("{prefix}bench ");
    parse_rows(log.lines().filter_map(|line| line.trim_end().strip_prefix(&prefix)))
}

fn parse_rows<'a>(lines: impl Iterator<Item = &'a str>) -> Result<BTreeMap<String, Figures>> {
    lines.map(|line| printed_row(line).with_context(|| format!("not a row: {line}"))).collect()
}

/// Reads `NAME min TICKS median TICKS n EXECUTIONS` or `NAME none (WHY)`.
fn printed_row(line: &str) -> Option<(String, Figures)> {
    let (name, rest) = line.split_once(' ')?;
    let figures = match rest.strip_prefix("none (") {
        Some(why) => Err(why.strip_suffix(')')?.to_owned()),
        None => {
            let words: Vec<&str> = rest.split(' ').collect();
            let ["min", min, "median", median, "n", _] = words[..] else { return None };
            Ok((min.parse().ok()?, median.parse().ok()?))
        }
    };
    Some((name.to_owned(), figures))
}

/// Least and median of the visits' lengths.
fn figures(visits: &[&Visit]) -> Figures {
    let mut lengths: Vec<(u64, u64)> =
        visits.iter().map(|visit| (visit.total(), visit.count)).collect();
    lengths.sort_unstable();
    let half = lengths.iter().map(|(_, count)| count).sum::<u64>() / 2;
    let mut before = 0;
    let median = lengths.iter().find(|(_, count)| {
        before += count;
        before > half
    });
    match (lengths.first(), median) {
        (Some((min, _)), Some((median, _))) => Ok((*min, *median)),
        _ => Err("it did not happen".to_owned()),
    }
}

// ---- Showing -----------------------------------------------------------------------------------

fn json(measured: &[Measured]) -> Vec<JsonRow> {
    let row = |measured: &Measured| {
        let (min, median) = *measured.figures.as_ref().ok()?;
        Some(JsonRow { name: measured.row.name, min, median })
    };
    measured.iter().filter_map(row).collect()
}

fn table(measured: &[Measured], previous: &BTreeMap<String, u64>) -> String {
    let mut rows = vec![["row", "min", "median", "previous", "aim", ""].map(str::to_owned)];
    for Measured { row, figures, .. } in measured {
        let optional = |number: Option<u64>| number.map_or_else(String::new, |n| n.to_string());
        let (min, median) = match figures {
            Ok((min, median)) => (min.to_string(), median.to_string()),
            Err(_) => ("-".to_owned(), "-".to_owned()),
        };
        let note = match (figures, row.aim) {
            (Err(why), _) => why.clone(),
            (Ok((_, median)), Some(aim)) if *median > aim => format!("{} too many", median - aim),
            _ => String::new(),
        };
        let before = optional(previous.get(row.name).copied());
        rows.push([row.name.to_owned(), min, median, before, optional(row.aim), note]);
    }
    align(&rows)
}

/// What the hypervisor takes for an exit on one CPU and on several.
fn cpus_table(measured: &[Measured]) -> String {
    let mut rows = vec![["in the hypervisor", "1 CPU", "1 of 4", "4 of 4"].map(str::to_owned)];
    for (name, counts) in on_cpus(measured) {
        let [one, one_of_four, four] = counts.map(|count| count.to_string());
        rows.push([name.to_owned(), one, one_of_four, four]);
    }
    align(&rows)
}

fn on_cpus(measured: &[Measured]) -> impl Iterator<Item = (&str, [u64; 3])> {
    measured.iter().filter_map(|row| Some((row.name(), row.on_cpus()?)))
}

/// For each row its instructions by function. Functions with fewer than `least` are summed up.
fn profile_text(measured: &[Measured], least: u64) -> String {
    let mut text = String::new();
    let mut before: &[(String, u64)] = &[];
    for row in measured.iter().filter(|row| row.in_hypervisor() > 0) {
        let _ = write!(text, "{}: {} in the hypervisor", row.name(), row.in_hypervisor());
        if row.functions == before {
            text.push_str(", as the row before\n");
            continue;
        }
        before = &row.functions;
        text.push('\n');
        let (shown, others): (Vec<_>, Vec<_>) =
            row.functions.iter().partition(|(_, times)| *times >= least);
        for (function, times) in shown {
            let _ = writeln!(text, "  {times:5}  {function}");
        }
        if !others.is_empty() {
            let rest: u64 = others.iter().map(|(_, times)| times).sum();
            let _ = writeln!(text, "  {rest:5}  {} others", others.len());
        }
    }
    text
}

// ---- The document ------------------------------------------------------------------------------

/// The table for the document.
fn markdown(measured: &[Measured]) -> String {
    let mut text = "| row | what happens | min | median | aim | KVM |\n".to_owned();
    text.push_str("|---|---|---:|---:|---:|---:|\n");
    for Measured { row: Row { name, what, aim, kvm }, figures, .. } in measured {
        let ticks = match figures {
            Ok((min, median)) => format!("{min} | {median}"),
            Err(why) => format!("- | {why}"),
        };
        let aim = aim.map_or_else(String::new, |aim| aim.to_string());
        let _ = writeln!(text, "| `{name}` | {what} | {ticks} | {aim} | {kvm} |");
    }
    text
}

/// The table of several CPUs for the document.
fn cpus_markdown(measured: &[Measured]) -> String {
    let mut text = "| row | 1 CPU | 1 of 4 | 4 of 4 |\n|---|---:|---:|---:|\n".to_owned();
    for (name, [one, one_of_four, four]) in on_cpus(measured) {
        let _ = writeln!(text, "| {name} | {one} | {one_of_four} | {four} |");
    }
    text
}

/// The medians in the document's table, by row.
fn medians(document: &str) -> BTreeMap<String, u64> {
    let rows = document.lines().filter_map(|line| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let ["", name, _, _, median, ..] = cells[..] else { return None };
        let name = name.strip_prefix('`')?.strip_suffix('`')?;
        Some((name.to_owned(), median.parse().ok()?))
    });
    rows.collect()
}

/// Puts `content` between the document's two marks of this name.
fn replace(document: &str, name: &str, content: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->\n"));
    let parts = document.split_once(&begin).and_then(|(before, rest)| {
        let (_, after) = rest.split_once(&end)?;
        Some(format!("{before}{begin}{content}{end}{after}"))
    });
    parts.with_context(|| format!("{DOCUMENT} lacks {begin:?} and {end:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Address;

    #[test]
    fn rows_are_read_from_among_other_lines() {
        let log = "VM bench: 64 MiB\r\n[bench] bench cpuid min 123 median 125 n 100\r\n\
                   [bench-step] bench ept_fill_4k none (no exit by 9 first touches)\r\n[bench] ok\r\n";
        let rows = rows_printed(log).unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(rows["cpuid"], Ok((123, 125)));
        assert_eq!(rows["ept_fill_4k"], Err("no exit by 9 first touches".to_owned()));
        assert!(rows_printed("[bench] bench cpuid min 123 median\n").is_err());
    }

    #[test]
    fn the_median_counts_every_visit() {
        let visit = |total: u64, count| Visit {
            guest: Address(0),
            reason: PREEMPTION_TIMER,
            switched: true,
            count,
            instructions: vec![(Address(1), total - 1), (Address(2), 1)],
        };
        let visits = [visit(700, 3), visit(650, 1), visit(9000, 2)];
        assert_eq!(figures(&visits.iter().collect::<Vec<_>>()), Ok((650, 700)));
        assert_eq!(figures(&[&visits[0], &visits[2]]), Ok((700, 700)));
        assert!(figures(&[]).is_err());
    }

    fn measured() -> Vec<Measured> {
        let figures = |name| match name {
            "cpuid" => Ok((140, 151)),
            _ => Err("not offered".to_owned()),
        };
        let measured = |row: &'static Row| Measured {
            row,
            figures: figures(row.name),
            functions: vec![("enter".to_owned(), 60)],
            in_hypervisor_on: if row.name == "cpuid" {
                [150, 151, 152].map(Some)
            } else {
                [None; 3]
            },
        };
        ROWS.iter().map(measured).collect()
    }

    #[test]
    fn the_document_gives_back_what_was_put_into_it() {
        let document = "# P\n<!-- figures -->\nold\n<!-- end of figures -->\nmore\n";
        let updated = replace(document, "figures", &markdown(&measured())).unwrap();
        assert!(updated.starts_with("# P\n<!-- figures -->\n| row |"), "{updated}");
        assert!(updated.ends_with("|\n<!-- end of figures -->\nmore\n"), "{updated}");
        assert_eq!(medians(&updated), BTreeMap::from([("cpuid".to_owned(), 151)]));
        assert_eq!(replace(&updated, "figures", "old\n").unwrap(), document);
        assert!(replace(document, "profile", "").is_err());
        let several = cpus_markdown(&measured());
        assert!(several.ends_with("---:|\n| cpuid | 150 | 151 | 152 |\n"), "{several}");
        assert!(medians(&several).is_empty());
    }

    #[test]
    fn the_table_compares_with_aim_and_previous() {
        let table = table(&measured(), &BTreeMap::from([("cpuid".to_owned(), 185)]));
        let line = table.lines().find(|line| line.starts_with("cpuid")).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words, ["cpuid", "140", "151", "185", "150", "1", "too", "many"]);
        assert_eq!(json(&measured()).len(), 1);
        let several = cpus_table(&measured());
        assert!(several.ends_with("\ncpuid              150    151     152\n"), "{several}");
    }

    #[test]
    fn equal_profiles_are_shown_once() {
        let mut rows = measured();
        rows.truncate(3);
        rows[2].functions.push(("run".to_owned(), 4));
        let names: Vec<&str> = rows.iter().map(Measured::name).collect();
        let expected = format!(
            "{}: 60 in the hypervisor\n     60  enter\n{}: 60 in the hypervisor, as the row before\n\
             {}: 64 in the hypervisor\n     60  enter\n      4  1 others\n",
            names[0], names[1], names[2]
        );
        assert_eq!(profile_text(&rows, 5), expected);
    }

    #[test]
    fn every_row_is_one_of_the_guest() {
        let guest = root().join("tests/guests/src/bin/bench.rs");
        let guest = fs::read_to_string(guest).unwrap();
        let rows = guest.lines().filter_map(|line| line.strip_prefix("row!(")?.split_once(','));
        let others = SWITCHES.map(|(name, _)| name).into_iter().chain([TRACED]);
        let mut names: Vec<&str> = rows.map(|(name, _)| name).chain(others).collect();
        let mut known: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        names.sort_unstable();
        known.sort_unstable();
        assert_eq!(names, known);
    }
}
