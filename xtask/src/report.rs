//! What a run amounts to: the closing table and the verdict on the run itself.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::events::{Ac, Body, Event};
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
            Body::VmEnd { vm, reason, .. }
                if reason == "invalid state" || reason.starts_with("entry failure") =>
            {
                return Err(format!("the VM entry of {vm} failed"));
            }
            _ => {}
        }
    }
    match &outcome.exit {
        Exit::PoweredOff if events().any(|body| matches!(body, Body::Shutdown { .. })) => Ok(()),
        Exit::PoweredOff => Err("the machine went off, but not by an orderly shutdown".to_owned()),
        exit => Err(exit.to_string()),
    }
}

/// One row a VM: name, policy, number of split locks seen, verdicts, and how it ended.
pub fn table(events: &[Event]) -> String {
    let mut rows =
        vec![["VM", "policy", "split locks seen", "verdict", "how it ended"].map(str::to_owned)];
    let mut names: Vec<&str> = Vec::new();
    for name in events.iter().filter_map(Event::vm) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    rows.extend(names.into_iter().map(|vm| row(vm, events)));
    align(&rows)
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

fn row(name: &str, events: &[Event]) -> [String; 5] {
    let mut policy = "-".to_owned();
    let mut seen = 0_u64;
    let mut verdicts: BTreeMap<&str, u64> = BTreeMap::new();
    let mut end = "did not end".to_owned();
    for event in events.iter().filter(|event| event.vm() == Some(name)) {
        match &event.body {
            Body::VmStart { policy: of_vm, .. } => policy.clone_from(of_vm),
            Body::Ac(Ac { legacy, verdict, .. }) => {
                seen += u64::from(!legacy);
                *verdicts.entry(verdict).or_default() += 1;
            }
            Body::VmEnd { reason, status: Some(status), .. } => end = format!("{reason} {status}"),
            Body::VmEnd { reason, .. } => end.clone_from(reason),
            Body::VmRefused { why, .. } => end = format!("refused: {why}"),
            _ => {}
        }
    }
    let verdicts = verdicts.iter().map(|(verdict, count)| match count {
        1 => (*verdict).to_owned(),
        _ => format!("{verdict} x{count}"),
    });
    let verdicts = verdicts.collect::<Vec<_>>().join(", ");
    let verdicts = if verdicts.is_empty() { "-".to_owned() } else { verdicts };
    [name.to_owned(), policy, seen.to_string(), verdicts, end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::parse_lines;

    const RUN: &str = r#"
        {"seq":0,"tsc":1,"cpu":0,"event":"boot","version":"0.1.0","cpus":1,"sld":"warn","sld_source":"msr","firmware":"bios"}
        {"seq":1,"tsc":1,"cpu":0,"event":"vm-refused","vm":"broken","why":"unknown format"}
        {"seq":2,"tsc":1,"cpu":0,"event":"vm-start","vm":"split","policy":"fatal","exposed":false,"vcpus":1,"memory_bytes":8388608}
        {"seq":3,"tsc":1,"cpu":0,"event":"vm-start","vm":"legacy-ac","policy":"warn","exposed":false,"vcpus":1,"memory_bytes":8388608}
        {"seq":4,"tsc":1,"cpu":0,"event":"ac","vm":"split","vcpu":0,"rip":"0x1","cpl":0,"am":false,"ac":false,"virtual_bit":false,"legacy":false,"verdict":"kill"}
        {"seq":5,"tsc":1,"cpu":0,"event":"vm-end","vm":"split","reason":"split lock"}
        {"seq":6,"tsc":1,"cpu":0,"event":"ac","vm":"legacy-ac","vcpu":0,"rip":"0x1","cpl":3,"am":true,"ac":true,"virtual_bit":false,"legacy":true,"verdict":"inject"}
        {"seq":7,"tsc":1,"cpu":0,"event":"ac","vm":"legacy-ac","vcpu":0,"rip":"0x1","cpl":3,"am":true,"ac":true,"virtual_bit":false,"legacy":true,"verdict":"inject"}
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
    fn an_orderly_run_is_good_whatever_its_vms_did() {
        assert_eq!(judge(&outcome(RUN, Exit::PoweredOff)), Ok(()));
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
        let silent = outcome("", Exit::PoweredOff);
        assert!(judge(&silent).unwrap_err().contains("orderly"));
        for exit in [
            Exit::TimedOut { seconds: 5 },
            Exit::CpuShutdown,
            Exit::Died { status: "1".to_owned(), output: "boom".to_owned() },
        ] {
            assert_eq!(judge(&outcome(RUN, exit.clone())), Err(exit.to_string()));
        }
    }
}
