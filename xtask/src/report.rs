//! What a run amounts to: the closing table and the verdict on the run itself.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::events::{Body, Event, Totals};
use crate::machine::{Exit, RunOutcome};

/// Whether the hypervisor came up, ran its VMs to their ends and shut down in order, whatever those ends
/// were.
///
/// # Errors
/// Why not, in words.
pub fn judge(outcome: &RunOutcome) -> Result<(), String> {
    let events = || outcome.events.iter().map(|event| &event.body);
    for body in events() {
        match body {
            Body::Panic { message } => return Err(format!("the hypervisor panicked: {message}")),
            Body::Refused { why } => return Err(format!("the hypervisor refused to run: {why}")),
            Body::Violation { what } => return Err(format!("an invariant did not hold: {what}")),
            Body::Shutdown { counters: Totals { violations: number @ 1.., .. } } => {
                return Err(format!("{number} times an invariant did not hold"));
            }
            Body::VmEnd { vm, reason, .. }
                if reason == "invalid state" || reason.starts_with("entry failure") =>
            {
                return Err(format!("the VM entry of {vm} failed"));
            }
            _ => {}
        }
    }
    match &outcome.exit {
        Exit::PoweredOff | Exit::Stayed
            if events().any(|body| matches!(body, Body::Shutdown { .. })) =>
        {
            Ok(())
        }
        Exit::PoweredOff => Err("the machine went off, but not by an orderly shutdown".to_owned()),
        exit => Err(exit.to_string()),
    }
}

/// One row a VM: name, policy, number of split locks seen, verdicts, and how it ended. Where there are
/// several CPUs or vCPUs, also how many vCPUs, how often they were loaded, and how often on another CPU
/// than before.
pub fn table(events: &[Event]) -> String {
    let several = |event: &Event| match event.body {
        Body::Boot { cpus, .. } => cpus > 1,
        Body::VmStart { vcpus, .. } => vcpus > 1,
        _ => false,
    };
    if events.iter().any(several) {
        align(&[vec![HEADING.map(str::to_owned)], vms(events)].concat())
    } else {
        let heading = ["VM", "policy", "split locks seen", "verdict", "how it ended"];
        let vms = rows(events);
        let rows = vms.iter().map(Row::cells);
        align(&[vec![heading.map(str::to_owned)], rows.collect()].concat())
    }
}

/// What [`vms`] has.
pub const HEADING: [&str; 8] =
    ["VM", "policy", "vCPUs", "loads", "migrations", "split locks", "verdict", "how it ended"];

/// All that the table can have, a row for each VM.
pub fn vms(events: &[Event]) -> Vec<[String; HEADING.len()]> {
    let cells = |vm: &Row| {
        let [name, policy, seen, verdicts, end] = vm.cells();
        let [vcpus, loads, migrations] =
            [vm.vcpus, vm.loads, vm.migrations].map(|number| number.to_string());
        [name, policy, vcpus, loads, migrations, seen, verdicts, end]
    };
    rows(events).iter().map(cells).collect()
}

fn rows(events: &[Event]) -> Vec<Row<'_>> {
    let mut vms: Vec<Row> = Vec::new();
    for event in events {
        let Some(name) = event.vm() else { continue };
        // Whoever starts again has another row.
        let starts = matches!(event.body, Body::VmStart { .. });
        let index = vms.iter().rposition(|vm| vm.name == name);
        let index = index.filter(|index| !(starts && vms[*index].started)).unwrap_or_else(|| {
            vms.push(Row::new(name));
            vms.len() - 1
        });
        vms[index].add(&event.body);
    }
    vms
}

/// What was done about split locks, in words: each verdict, and how often if more than once.
pub fn verdicts<'a>(counts: impl IntoIterator<Item = (&'a str, u64)>) -> String {
    let counts = counts.into_iter().filter(|(_, count)| *count > 0);
    let words = counts.map(|(verdict, count)| match count {
        1 => verdict.to_owned(),
        _ => format!("{verdict} x{count}"),
    });
    words.collect::<Vec<_>>().join(", ")
}

/// Lays rows out in columns.
pub fn align<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let widths: Vec<usize> = (0..COLUMNS)
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut table = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        let _ = writeln!(table, "{}", line.trim_end());
    }
    table
}

/// A VM in the table.
struct Row<'a> {
    name: &'a str,
    started: bool,
    policy: &'a str,
    vcpus: u64,
    loads: u64,
    migrations: u64,
    /// Split locks seen.
    seen: u64,
    /// `#AC` by verdict.
    verdicts: BTreeMap<&'a str, u64>,
    end: String,
}

impl<'a> Row<'a> {
    fn new(name: &'a str) -> Self {
        Self {
            name,
            started: false,
            policy: "-",
            vcpus: 0,
            loads: 0,
            migrations: 0,
            seen: 0,
            verdicts: BTreeMap::new(),
            end: "did not end".to_owned(),
        }
    }

    /// Takes up an event of the VM.
    fn add(&mut self, body: &'a Body) {
        match body {
            Body::VmStart { policy, vcpus, .. } => {
                self.started = true;
                self.policy = policy;
                self.vcpus = (*vcpus).into();
            }
            Body::Ac(ac) => {
                self.seen += u64::from(ac.is_counted());
                *self.verdicts.entry(&ac.verdict).or_default() += 1;
            }
            Body::VmEnd { reason, status, counters, .. } => {
                self.end = match status {
                    Some(status) => format!("{reason} {status}"),
                    None => reason.clone(),
                };
                (self.loads, self.migrations) = (counters.loads, counters.migrations);
            }
            Body::Policy { policy, .. } => self.policy = policy,
            Body::VmRefused { why, .. } if !self.started => self.end = format!("refused: {why}"),
            _ => {}
        }
    }

    fn cells(&self) -> [String; 5] {
        let counts = self.verdicts.iter().map(|(verdict, count)| (*verdict, *count));
        let verdicts = verdicts(counts);
        let verdicts = if verdicts.is_empty() { "-".to_owned() } else { verdicts };
        let [name, policy] = [self.name, self.policy].map(str::to_owned);
        [name, policy, self.seen.to_string(), verdicts, self.end.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::parse_lines;

    const RUN: &str = r#"
        {"seq":0,"tsc":1,"cpu":0,"event":"boot","version":"0.1.0","cpus":1,"sld":"warn","sld_source":"msr","firmware":"bios"}
        {"seq":1,"tsc":1,"cpu":0,"event":"vm-refused","vm":"broken","why":"unknown format"}
        {"seq":2,"tsc":1,"cpu":0,"event":"vm-start","vm":"split","policy":"fatal","source":"msr","exposed":false,"vcpus":1,"memory_bytes":8388608}
        {"seq":3,"tsc":1,"cpu":0,"event":"vm-start","vm":"legacy-ac","policy":"warn","source":"msr","exposed":false,"vcpus":1,"memory_bytes":8388608}
        {"seq":4,"tsc":1,"cpu":0,"event":"ac","vm":"split","vcpu":0,"source":"msr","rip":"0x1","cpl":0,"am":false,"ac":false,"virtual_bit":false,"legacy":false,"verdict":"kill"}
        {"seq":5,"tsc":1,"cpu":0,"event":"vm-end","vm":"split","reason":"split lock"}
        {"seq":6,"tsc":1,"cpu":0,"event":"ac","vm":"legacy-ac","vcpu":0,"source":"msr","rip":"0x1","cpl":3,"am":true,"ac":true,"virtual_bit":false,"legacy":true,"verdict":"inject"}
        {"seq":7,"tsc":1,"cpu":0,"event":"ac","vm":"legacy-ac","vcpu":0,"source":"msr","rip":"0x1","cpl":3,"am":true,"ac":true,"virtual_bit":false,"legacy":true,"verdict":"inject"}
        {"seq":8,"tsc":1,"cpu":0,"event":"vm-end","vm":"legacy-ac","reason":"exit","status":33}
        {"seq":9,"tsc":1,"cpu":0,"event":"shutdown","counters":{}}
    "#;

    fn outcome(events: &str, exit: Exit) -> RunOutcome {
        RunOutcome {
            events: parse_lines(events).unwrap(),
            truth: Vec::new(),
            serial: String::new(),
            exit,
        }
    }

    #[test]
    fn a_vm_that_is_started_again_has_another_row() {
        let text = r#"
            {"seq":0,"tsc":1,"cpu":0,"event":"vm-start","vm":"a","policy":"warn","exposed":false,"vcpus":1,"memory_bytes":8388608}
            {"seq":1,"tsc":1,"cpu":0,"event":"policy","vm":"a","vcpu":0,"policy":"step"}
            {"seq":2,"tsc":1,"cpu":0,"event":"vm-end","vm":"a","reason":"stopped"}
            {"seq":3,"tsc":1,"cpu":0,"event":"vm-refused","vm":"a","why":"no memory"}
            {"seq":4,"tsc":1,"cpu":0,"event":"vm-start","vm":"a","policy":"warn","exposed":false,"vcpus":1,"memory_bytes":8388608}
            {"seq":5,"tsc":1,"cpu":0,"event":"vm-end","vm":"a","reason":"exit","status":33}
        "#;
        let table = table(&parse_lines(text).unwrap());
        let rows: Vec<&str> = table.lines().collect();
        assert_eq!(rows.len(), 3, "{table}");
        assert!(rows[1].contains("step") && rows[1].ends_with("stopped"), "{table}");
        assert!(rows[2].contains("warn") && rows[2].ends_with("exit 33"), "{table}");
    }

    #[test]
    fn the_table_has_a_row_for_every_vm() {
        let expected = "\
VM         policy  split locks seen  verdict    how it ended
broken     -       0                 -          refused: unknown format
split      fatal   1                 kill       split lock
legacy-ac  warn    0                 inject x2  exit 33
";
        assert_eq!(table(&parse_lines::<Event>(RUN).unwrap()), expected);
    }

    #[test]
    fn several_cpus_or_vcpus_have_columns_of_their_own() {
        let events = r#"
        {"seq":0,"tsc":1,"cpu":0,"event":"boot","version":"0.1.0","cpus":4,"sld":"warn","sld_source":"msr","firmware":"bios"}
        {"seq":1,"tsc":1,"cpu":0,"event":"vm-start","vm":"split-storm","policy":"warn","source":"msr","exposed":false,"vcpus":4,"weight":100,"memory_bytes":8388608}
        {"seq":2,"tsc":1,"cpu":0,"event":"vm-end","vm":"split-storm","reason":"exit","status":33,"counters":{"loads":12345,"migrations":1234,"ticks":5}}
        "#;
        let expected = "\
VM           policy  vCPUs  loads  migrations  split locks  verdict  how it ended
split-storm  warn    4      12345  1234        0            -        exit 33
";
        assert_eq!(table(&parse_lines::<Event>(events).unwrap()), expected);
        let one_cpu = events.replace(r#""cpus":4"#, r#""cpus":1"#);
        assert_eq!(table(&parse_lines::<Event>(&one_cpu).unwrap()), expected);
        let one_vcpu = one_cpu.replace(r#""vcpus":4"#, r#""vcpus":1"#);
        let short = table(&parse_lines::<Event>(&one_vcpu).unwrap());
        assert!(!short.contains("migrations"), "{short}");
    }

    #[test]
    fn an_orderly_run_is_good_whatever_its_vms_did() {
        assert_eq!(judge(&outcome(RUN, Exit::PoweredOff)), Ok(()));
        assert_eq!(judge(&outcome(RUN, Exit::Stayed)), Ok(()));
    }

    #[test]
    fn everything_else_is_not() {
        let with = |line: &str| outcome(&format!("{RUN}{line}\n"), Exit::PoweredOff);
        let panic = with(r#"{"seq":10,"tsc":1,"cpu":0,"event":"panic","message":"oh"}"#);
        assert!(judge(&panic).unwrap_err().contains("panicked: oh"));
        let refused = with(r#"{"seq":10,"tsc":1,"cpu":0,"event":"refused","why":"no VT-x"}"#);
        assert!(judge(&refused).unwrap_err().contains("no VT-x"));
        let entry = with(
            r#"{"seq":10,"tsc":1,"cpu":0,"event":"vm-end","vm":"x","reason":"entry failure"}"#,
        );
        assert!(judge(&entry).unwrap_err().contains("entry of x failed"));
        let violated = with(r#"{"seq":10,"tsc":1,"cpu":0,"event":"violation","what":"flag"}"#);
        assert!(judge(&violated).unwrap_err().contains("did not hold: flag"));
        let counted =
            with(r#"{"seq":10,"tsc":1,"cpu":0,"event":"shutdown","counters":{"violations":3}}"#);
        assert!(judge(&counted).unwrap_err().contains("3 times"));
        let silent = outcome("", Exit::PoweredOff);
        assert!(judge(&silent).unwrap_err().contains("orderly"));
        let unfinished = RUN.replace("shutdown", "other");
        assert!(judge(&outcome(&unfinished, Exit::Stayed)).unwrap_err().contains("stays on"));
        for exit in [
            Exit::TimedOut { seconds: 5 },
            Exit::CpuShutdown,
            Exit::Died { status: "1".to_owned(), output: "boom".to_owned() },
        ] {
            assert_eq!(judge(&outcome(RUN, exit.clone())), Err(exit.to_string()));
        }
    }
}
