//! The verdict table, `sld/tests/verdicts.csv`, row by row on the machine: guests split a lock in the
//! situation of each row, and the verdict must be the row's.
//!
//! A row can be visited where something raises #AC. Legacy alignment checking does on every machine;
//! split-lock detection does where the real bit is on. For rows about a hypervisor that keeps it
//! off, or knows of none, it takes machines on which it is on all the same:
//!
//! | row, not legacy | machine |
//! |---|---|
//! | host without SLD | [`Quirk::Undeclared`]: the bit is on, and nothing says that it exists |
//! | mode `off` | [`Quirk::StuckOn`]: the bit cannot be switched off |
//! | `warn`, exposed, virtual bit off | two threads a core: the bit stays on for the other one, and what is `warn` in the table is carried out as `step` |

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};
use std::fs;

use anyhow::{Context, Result, anyhow, bail, ensure};
use libtest_mimic::Trial;
use machine_tests::hypervisor::traced_as_real;
use machine_tests::{check_eq, trial};
use xtask::bare::root;
use xtask::config::{HvConfig, Policy, SldSource, Vm};
use xtask::events::{Body, Outcome};
use xtask::guests::{self, SUCCESS};
use xtask::machine::{MachineConfig, Quirk, RunOutcome};
use xtask::topology::Topology;

use crate::operations;
use crate::vms::{self, on};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("verdicts::every_row", every_row),
        trial("trace::verdicts_are_those_of_the_table", traced_rows),
    ]
}

/// The inputs of a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    host_sld: bool,
    mode: &'static str,
    exposed: bool,
    virtual_bit: bool,
    cpl: u8,
    am: bool,
    ac: bool,
}

impl Row {
    fn legacy(&self) -> bool {
        self.cpl == 3 && self.am && self.ac
    }
}

/// Verdicts, as events name them.
type Table = BTreeMap<Row, String>;

const MODES: [(Policy, &str); 3] =
    [(Policy::Off, "off"), (Policy::Warn, "warn"), (Policy::Fatal, "fatal")];

fn table() -> Result<Table> {
    let file = root().join("sld/tests/verdicts.csv");
    let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
    let mut lines = text.lines();
    let header = "host_sld,mode,exposed,virtual_bit,cpl,cr0_am,eflags_ac,verdict";
    ensure!(lines.next() == Some(header), "the columns are not {header}");
    lines.map(|line| parse(line).with_context(|| format!("row {line}"))).collect()
}

fn parse(line: &str) -> Result<(Row, String)> {
    let fields: Vec<&str> = line.split(',').collect();
    let [host_sld, mode, exposed, virtual_bit, cpl, am, ac, verdict] = fields[..] else {
        bail!("{} columns", fields.len());
    };
    let flag = |field: &str| match field {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(anyhow!("{field:?} is neither 0 nor 1")),
    };
    let mode = MODES.iter().find(|known| known.1 == mode).context("unknown mode")?.1;
    let row = Row {
        host_sld: flag(host_sld)?,
        mode,
        exposed: flag(exposed)?,
        virtual_bit: flag(virtual_bit)?,
        cpl: cpl.parse()?,
        am: flag(am)?,
        ac: flag(ac)?,
    };
    Ok((row, verdict.to_owned()))
}

/// A split lock of the guest `verdict-rows`.
#[derive(Clone, Copy)]
struct Attempt {
    /// The guest's word for where.
    from: &'static str,
    cpl: u8,
    am: bool,
    ac: bool,
}

/// All of them, in the guest's order.
fn attempts() -> impl Iterator<Item = Attempt> {
    let from = [("cpl0", 0), ("cpl1", 1), ("cpl2", 2), ("cpl3", 3), ("real", 0), ("vm86", 3)];
    let flags = [(false, false), (false, true), (true, false), (true, true)];
    let all = move |(from, cpl)| flags.map(|(am, ac)| Attempt { from, cpl, am, ac });
    from.into_iter().flat_map(all)
}

/// Split locks of an attempt where they happen: three with different operands.
const HAPPENS: usize = 3;

/// The 16-bit code stands below this address, the 64-bit code above.
const SIXTEEN_BIT_END: u64 = 0x1_0000;

/// A VM with that guest.
#[derive(Clone, Copy)]
struct Splitter {
    expose: bool,
    /// The guest turns detection on.
    bit: bool,
    policy: Option<Policy>,
    /// `None`: all of them.
    attempt: Option<Attempt>,
}

/// A machine.
struct Case {
    about: &'static str,
    /// Its CPU model, if not the usual one.
    model: Option<&'static str>,
    /// It has split-lock detection.
    sld: bool,
    /// It has none, and its VMs are traced.
    traced: bool,
    quirk: Option<Quirk>,
    /// Threads of its only core. All but the first are idle.
    threads: u32,
    mode: Policy,
    vms: Vec<Splitter>,
}

fn cases() -> Vec<Case> {
    let all = |expose, bit| Splitter { expose, bit, policy: None, attempt: None };
    let each =
        |expose| attempts().map(move |one| Splitter { attempt: Some(one), ..all(expose, false) });
    let case = |about, mode, vms| Case {
        about,
        model: None,
        sld: true,
        traced: false,
        quirk: None,
        threads: 1,
        mode,
        vms,
    };

    // A VM for each attempt where the first split lock ends it, or is the last that is seen.
    let fatal: Vec<Splitter> = each(false).chain(each(true)).chain([all(true, true)]).collect();
    let policy = Some(Policy::Fatal);
    let fatal_by_policy = fatal.iter().map(|vm| Splitter { policy, ..*vm }).collect();
    let warn = each(false).chain([all(true, false), all(true, true)]).collect();
    let mut cases = vec![
        case("off", Policy::Off, vec![all(false, false), all(true, false)]),
        case("warn", Policy::Warn, warn),
        case("fatal", Policy::Fatal, fatal),
        case("warn, VMs fatal", Policy::Warn, fatal_by_policy),
        Case {
            // On the list although it enumerates nothing. Without CET: VM entry insists there that an
            // exception comes with an error code in protected mode, and in real mode without.
            model: Some("corei7_icelake_u"),
            ..case("warn, Ice Lake", Policy::Warn, vec![all(true, true)])
        },
        // Few events each: a turn that ends to write them may make an instruction be stepped twice.
        Case { threads: 2, ..case("warn, two threads", Policy::Warn, each(true).collect()) },
        Case {
            quirk: Some(Quirk::StuckOn),
            ..case("off, bit stuck on", Policy::Off, each(false).collect())
        },
    ];
    for (mode, _) in MODES {
        let vms = vec![all(false, false), all(true, false)];
        cases.push(Case { sld: false, ..case("no SLD", mode, vms.clone()) });
        let quirk = Some(Quirk::Undeclared);
        cases.push(Case { quirk, ..case("no SLD declared, bit on", mode, vms) });
    }
    cases
}

/// What the events must say of an #AC, in their order: VM, 16-bit code, virtual bit, CPL, AM, AC,
/// verdict.
type Seen = (String, bool, bool, u8, bool, bool, String);

/// What must come of a case.
#[derive(Default)]
struct Expected {
    acs: Vec<Seen>,
    /// VM, reason, status.
    ends: Vec<(String, String, Option<u32>)>,
    /// 16-bit code, CPL, outcome.
    truth: Vec<(bool, u8, Outcome)>,
}

impl Case {
    /// Whether the hypervisor is to believe that there is detection.
    fn host_sld(&self) -> bool {
        self.traced || self.sld && self.quirk != Some(Quirk::Undeclared)
    }

    fn exposed(&self, vm: &Splitter) -> bool {
        vm.expose && self.host_sld() && self.mode != Policy::Off
    }

    fn row(&self, vm: &Splitter, attempt: &Attempt) -> Row {
        let policy = vm.policy.unwrap_or(self.mode);
        let mode = MODES.iter().find(|known| known.0 == policy).expect("all modes are known").1;
        let &Attempt { cpl, am, ac, .. } = attempt;
        let (exposed, virtual_bit) = (self.exposed(vm), vm.bit);
        Row { host_sld: self.host_sld(), mode, exposed, virtual_bit, cpl, am, ac }
    }

    /// Whether the real bit is on when a VM starts to run.
    fn real_bit(&self, row: &Row) -> bool {
        let by_hypervisor = match row.mode {
            "off" => false,
            "warn" => !row.exposed || row.virtual_bit || self.threads > 1,
            _ => true,
        };
        self.quirk.is_some() || self.host_sld() && by_hypervisor
    }

    fn expected(&self, table: &Table) -> Result<Expected> {
        let mut expected = Expected::default();
        for (name, vm) in self.named() {
            let mut end = (name.clone(), "exit".to_owned(), Some(u32::from(SUCCESS)));
            for attempt in attempts_of(vm) {
                let row = self.row(vm, &attempt);
                let Attempt { from, cpl, am, ac } = attempt;
                let sixteen_bit = matches!(from, "real" | "vm86");
                let mut split_locks = |outcome, count| {
                    expected.truth.extend(vec![(sixteen_bit, cpl, outcome); count]);
                };
                if !row.legacy() && !self.real_bit(&row) {
                    split_locks(Outcome::Taken, HAPPENS);
                    continue;
                }
                let verdict = table.get(&row).with_context(|| format!("no row for {row:?}"))?;
                let seen =
                    (name.clone(), sixteen_bit, vm.bit, cpl, am, ac, self.carried_out(verdict));
                if self.carried_out(verdict) == "step" {
                    for _ in 0..HAPPENS {
                        split_locks(Outcome::Faulted, 1);
                        split_locks(Outcome::Taken, 1);
                    }
                    expected.acs.extend(vec![seen; HAPPENS]);
                    continue;
                }
                // An alignment check comes before the access, the look before the instruction.
                split_locks(Outcome::Faulted, usize::from(!row.legacy() && !self.traced));
                match verdict.as_str() {
                    "inject" => {}
                    "warn" => split_locks(Outcome::Taken, HAPPENS),
                    "kill" => end = (name.clone(), "split lock".to_owned(), None),
                    "kill-bogus" => end = (name.clone(), "bogus #AC".to_owned(), None),
                    other => bail!("{row:?}: unknown verdict {other:?}"),
                }
                expected.acs.push(seen);
            }
            expected.ends.push(end);
        }
        Ok(expected)
    }

    /// A verdict of the table as events name it. While detection stays on for a sibling thread it is
    /// off for one instruction at a time, and each one is seen.
    fn carried_out(&self, verdict: &str) -> String {
        let verdict = if verdict == "warn" && self.threads > 1 { "step" } else { verdict };
        verdict.to_owned()
    }

    fn named(&self) -> impl Iterator<Item = (String, &Splitter)> {
        self.vms.iter().enumerate().map(|(index, vm)| (format!("vm{index}"), vm))
    }

    fn configured(&self) -> Vec<Vm> {
        let configure = |(name, vm): (String, &Splitter)| {
            let mut words = Vec::new();
            if let Some(Attempt { from, am, ac, .. }) = vm.attempt {
                words.push(format!("{from} am={} ac={}", u8::from(am), u8::from(ac)));
            }
            if vm.bit {
                words.push("bit=1".to_owned());
            }
            if self.quirk == Some(Quirk::Undeclared) {
                words.push("faults".to_owned());
            }
            Vm {
                name,
                memory_mib: 4,
                expose_sld: vm.expose,
                policy: vm.policy,
                cpus: Some(vec![0]),
                cmdline: words.join(" "),
                ..Vm::of_guest(guest())
            }
        };
        self.named().map(configure).collect()
    }

    fn run(&self) -> Result<RunOutcome> {
        // So long a slice that each VM does all in its first: the order is known.
        let source = match (self.traced, self.sld) {
            (true, _) => SldSource::Trace,
            (false, true) if self.quirk.is_none() => SldSource::Msr,
            _ => SldSource::None,
        };
        let config = HvConfig {
            source: Some(source),
            slice_ticks: Some(1 << 40),
            ..HvConfig::new(self.mode, self.configured())
        };
        let usual = MachineConfig::default();
        let machine = MachineConfig {
            model: self.model.map_or(usual.model, str::to_owned),
            sld: self.sld && !self.traced,
            quirk: self.quirk,
            cpus: Topology { packages: 1, cores: 1, threads: self.threads },
            memory_mib: 512,
            ..usual
        };
        vms::run(&config, machine)
    }

    /// Runs it, compares all there is to compare, and returns the rows that were visited.
    fn visit(&self, table: &Table) -> Result<Vec<Row>> {
        let outcome = self.run()?;
        self.judge(table, &outcome)
            .map_err(|why| on(&format!("{}, {:?}", self.about, self.mode), &outcome, why))
    }

    fn judge(&self, table: &Table, outcome: &RunOutcome) -> Result<Vec<Row>> {
        let expected = self.expected(table)?;
        let sixteen_bit = |rip: u64| rip < SIXTEEN_BIT_END;

        let mut policies = BTreeMap::new();
        let (mut acs, mut ends, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        let mut real_bit_writes = 0;
        for event in &outcome.events {
            match &event.body {
                Body::VmStart { vm, policy, exposed, .. } => {
                    policies.insert(vm.clone(), (policy.clone(), *exposed));
                }
                Body::Ac(ac) => {
                    let (policy, exposed) = &policies[&ac.vm];
                    let mode = MODES.iter().find(|known| known.1 == policy);
                    let row = Row {
                        host_sld: self.host_sld(),
                        mode: mode.context("unknown policy")?.1,
                        exposed: *exposed,
                        virtual_bit: ac.virtual_bit,
                        cpl: ac.cpl,
                        am: ac.am,
                        ac: ac.ac,
                    };
                    let due = table.get(&row).map(|verdict| self.carried_out(verdict));
                    ensure!(due.as_ref() == Some(&ac.verdict), "not by the table: {ac:?}");
                    ensure!(ac.legacy == row.legacy(), "not legacy, or is: {ac:?}");
                    rows.push(row);
                    acs.push((
                        ac.vm.clone(),
                        sixteen_bit(ac.rip.0),
                        ac.virtual_bit,
                        ac.cpl,
                        ac.am,
                        ac.ac,
                        ac.verdict.clone(),
                    ));
                }
                Body::VmEnd { vm, reason, status, .. } => {
                    ends.push((vm.clone(), reason.clone(), *status));
                }
                Body::RealBit { .. } => real_bit_writes += 1,
                _ => {}
            }
        }
        let truth: Vec<_> = outcome
            .truth
            .iter()
            .map(|truth| (sixteen_bit(truth.rip.0), truth.cpl, truth.outcome))
            .collect();
        // Whose turn it is to end is not known.
        ends.sort_by_key(|(name, ..)| expected.ends.iter().position(|(known, ..)| known == name));
        ensure!(ends == expected.ends, "ends: {ends:?}\nexpected: {:?}", expected.ends);
        ensure!(acs == expected.acs, "#AC: {acs:?}\nexpected: {:?}", expected.acs);
        ensure!(truth == expected.truth, "split locks: {truth:?}\nexpected: {:?}", expected.truth);
        if self.traced {
            operations::replay(&traced_as_real(&outcome.events)).map_err(|why| anyhow!(why))?;
        }
        if self.sld && !self.traced && self.quirk.is_none() {
            if self.threads == 1 {
                operations::replay(&outcome.events).map_err(|why| anyhow!(why))?;
            }
        } else {
            check_eq(outcome, "writes of a bit that is not the hypervisor's", real_bit_writes, 0)?;
        }
        Ok(rows)
    }
}

fn guest() -> &'static guests::Guest {
    guests::find("verdict-rows").expect("it is registered")
}

fn attempts_of(vm: &Splitter) -> Vec<Attempt> {
    vm.attempt.map_or_else(|| attempts().collect(), |attempt| vec![attempt])
}

fn every_row() -> Result<()> {
    let table = table()?;
    ensure!(table.len() == 160, "{} rows", table.len());
    let mut visits: BTreeMap<Row, usize> = BTreeMap::new();
    for case in cases() {
        for row in case.visit(&table)? {
            *visits.entry(row).or_default() += 1;
        }
    }
    println!("{}", list(&table, &visits)?);
    let missed: Vec<_> = table.keys().filter(|row| !visits.contains_key(row)).collect();
    ensure!(missed.is_empty(), "not visited: {missed:#?}");
    Ok(())
}

/// All rows that a machine with one thread, nothing odd and the bit on visits.
fn traced_rows() -> Result<()> {
    let table = table()?;
    let mut visited = BTreeSet::new();
    // Of those whose rows others have, too, one is enough: each guest takes its time.
    let plain = |case: &Case| ["off", "warn", "fatal"].contains(&case.about);
    for case in cases().into_iter().filter(plain) {
        visited.extend(Case { traced: true, ..case }.visit(&table)?);
    }
    let unseen =
        |row: &Row| row.mode == "off" || row.mode == "warn" && row.exposed && !row.virtual_bit;
    let due = table.keys().filter(|row| row.host_sld && (row.legacy() || !unseen(row)));
    // A guest that is told nothing has no bit to set, and with the mode off none is told.
    let possible = |row: &&Row| !row.virtual_bit || row.exposed && row.mode != "off";
    let due = due.filter(possible).filter(|row| !row.exposed || row.mode != "off");
    let missed: Vec<_> = due.filter(|row| !visited.contains(row)).collect();
    ensure!(missed.is_empty(), "not visited: {missed:#?}");
    Ok(())
}

/// The rows as a person can read them: those that differ only in CPL, AM and AC in a line.
fn list(table: &Table, visits: &BTreeMap<Row, usize>) -> Result<String, fmt::Error> {
    let mut lines: BTreeMap<[String; 5], Vec<String>> = BTreeMap::new();
    for (row, verdict) in table {
        let bit = |flag: bool| u8::from(flag).to_string();
        let group =
            [bit(row.host_sld), row.mode.to_owned(), bit(row.exposed), bit(row.virtual_bit)];
        let [host_sld, mode, exposed, virtual_bit] = group;
        let entry = lines.entry([host_sld, mode, exposed, virtual_bit, verdict.to_owned()]);
        let visits = visits.get(row).copied().unwrap_or(0);
        let inputs = format!("{}{}{}", row.cpl, u8::from(row.am), u8::from(row.ac));
        entry.or_default().push(match visits {
            0 | 1 => inputs,
            _ => format!("{inputs}x{visits}"),
        });
    }
    let mut text = format!(
        "verdict table: {} rows, {} visited\n\
         SLD mode  exposed bit verdict          CPL AM AC, and how often if not once\n",
        table.len(),
        visits.len()
    );
    for ([host_sld, mode, exposed, bit, verdict], rows) in lines {
        let rows = rows.join(" ");
        writeln!(text, "{host_sld:3} {mode:5} {exposed:7} {bit:3} {verdict:16} {rows}")?;
    }
    Ok(text)
}
