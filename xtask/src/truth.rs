//! Compares what the hypervisor reported with what the machine did.

use std::collections::BTreeMap;

use crate::events::{Ac, Body, Event, Outcome, Truth};

/// Where report and truth disagree; each in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Split locks of the hypervisor itself, of which there must be none.
    pub outside: Vec<String>,
    /// Split locks that faulted in a guest and were not reported.
    pub missed: Vec<String>,
    /// Reports of what did not happen.
    pub invented: Vec<String>,
}

/// Checks that there are no [`differences`].
///
/// # Errors
/// Every difference, in words.
pub fn check_truth(events: &[Event], truth: &[Truth]) -> Result<(), Vec<String>> {
    let Differences { outside, missed, invented } = differences(events, truth);
    let wrong = [outside, invented, missed].concat();
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

/// Compares: every split lock that faulted in a guest must have led to exactly one `ac` event, with the
/// same RIP and CPL, in the same order on each CPU, and no other `ac` event may exist.
///
/// What was found by tracing does not fault: such an `ac` event stands for itself, and if it says `step`,
/// the instruction must have taken the bus.
///
/// An `ac` event marked `legacy` may stand without a split lock: an ordinary alignment check is one
/// too.
///
/// The events of each CPU must be in order; in what order CPUs follow each other does not matter.
pub fn differences(events: &[Event], truth: &[Truth]) -> Differences {
    let outside = truth.iter().filter(|truth| !truth.vmx);
    let mut found = Differences {
        outside: outside
            .map(|truth| format!("a split lock outside a guest: {}", describe(truth)))
            .collect(),
        ..Differences::default()
    };
    let mut per_cpu: BTreeMap<u32, OfCpu> = BTreeMap::new();
    for truth in truth.iter().filter(|truth| truth.vmx) {
        let of_cpu = per_cpu.entry(truth.cpu).or_default();
        match truth.outcome {
            Outcome::Faulted => of_cpu.faulted.push(truth),
            Outcome::Taken => of_cpu.taken.push(truth),
        }
    }
    for event in events {
        if let Body::Ac(ac) = &event.body {
            per_cpu.entry(event.cpu).or_default().acs.push(ac);
        }
    }
    for (cpu, of_cpu) in per_cpu {
        compare(cpu, &of_cpu, &mut found);
    }
    found
}

/// What happened on a CPU, each in order.
#[derive(Default)]
struct OfCpu<'a> {
    faulted: Vec<&'a Truth>,
    taken: Vec<&'a Truth>,
    acs: Vec<&'a Ac>,
}

/// One CPU's faults, and what was taken, against its `ac` events.
fn compare(cpu: u32, of_cpu: &OfCpu<'_>, found: &mut Differences) {
    let mut faults = of_cpu.faulted.iter().peekable();
    let mut taken = of_cpu.taken.iter();
    for ac in &of_cpu.acs {
        let same = |truth: &&&Truth| truth.rip == ac.rip && truth.cpl == ac.cpl;
        let is_true = if ac.source == "trace" {
            ac.verdict != "step" || taken.any(|truth| same(&truth))
        } else {
            faults.next_if(same).is_some() || ac.legacy
        };
        if is_true {
            continue;
        }
        let next = faults.peek().map_or("none".to_owned(), |truth| describe(truth));
        found.invented.push(format!(
            "CPU {cpu}: reported but did not happen: #AC of {} at {} with CPL {} ({}); next split lock: {next}",
            ac.vm, ac.rip, ac.cpl, ac.verdict
        ));
    }
    let missed = |truth| format!("happened but was not reported: {}", describe(truth));
    found.missed.extend(faults.map(|truth| missed(truth)));
}

fn describe(truth: &Truth) -> String {
    let Truth { cpu, rip, cpl, outcome, .. } = truth;
    format!("CPU {cpu}, RIP {rip}, CPL {cpl}, {outcome:?}").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Address, Bytes, in_order};

    fn ac(cpu: u32, rip: u64, cpl: u8, legacy: bool) -> Event {
        Event {
            seq: 0,
            tsc: 0,
            cpu,
            body: Body::Ac(Ac {
                vm: "vm".to_owned(),
                vcpu: 0,
                source: "msr".to_owned(),
                rip: Address(rip),
                cr3: Address(0),
                bits: 64,
                cpl,
                am: legacy,
                ac: legacy,
                virtual_bit: false,
                legacy,
                verdict: "inject".to_owned(),
                bytes: Bytes::default(),
            }),
        }
    }

    fn fault(cpu: u32, rip: u64, cpl: u8) -> Truth {
        Truth { cpu, rip: Address(rip), cpl, vmx: true, outcome: Outcome::Faulted }
    }

    #[test]
    fn agreement() {
        let events = [ac(0, 1, 0, false), ac(1, 7, 3, false), ac(0, 2, 3, false)];
        let truth = [
            fault(0, 1, 0),
            Truth { outcome: Outcome::Taken, ..fault(0, 9, 0) },
            fault(0, 2, 3),
            fault(1, 7, 3),
        ];
        assert_eq!(check_truth(&events, &truth), Ok(()));
        assert_eq!(check_truth(&[], &[]), Ok(()));
    }

    #[test]
    fn a_split_lock_that_was_not_reported() {
        let wrong = check_truth(&[ac(0, 1, 0, false)], &[fault(0, 1, 0), fault(0, 1, 0)]);
        assert!(wrong.unwrap_err()[0].contains("not reported"));
    }

    #[test]
    fn an_event_without_a_split_lock() {
        let wrong = check_truth(&[ac(0, 1, 0, false)], &[]).unwrap_err();
        assert!(wrong[0].contains("did not happen"), "{wrong:?}");
    }

    #[test]
    fn another_place_another_level_another_cpu_another_order() {
        assert!(check_truth(&[ac(0, 1, 0, false)], &[fault(0, 2, 0)]).is_err());
        assert!(check_truth(&[ac(0, 1, 0, false)], &[fault(0, 1, 3)]).is_err());
        assert!(check_truth(&[ac(0, 1, 0, false)], &[fault(1, 1, 0)]).is_err());
        let swapped = [ac(0, 2, 0, false), ac(0, 1, 0, false)];
        assert!(check_truth(&swapped, &[fault(0, 1, 0), fault(0, 2, 0)]).is_err());
    }

    #[test]
    fn differences_are_told_apart() {
        let outside = Truth { vmx: false, ..fault(1, 9, 0) };
        let found = differences(&[ac(0, 1, 0, false)], &[fault(0, 2, 0), outside]);
        let Differences { outside, missed, invented } = found;
        assert_eq!((outside.len(), missed.len(), invented.len()), (1, 1, 1));
        assert!(missed[0].contains("rip 0x2"), "{missed:?}");
        assert!(invented[0].contains("0x1"), "{invented:?}");
    }

    #[test]
    fn cpus_may_come_in_any_order() {
        let events = in_order(vec![ac(1, 7, 3, false), ac(0, 1, 0, false), ac(1, 8, 3, false)]);
        let truth = [fault(1, 7, 3), fault(1, 8, 3), fault(0, 1, 0)];
        assert_eq!(check_truth(&events, &truth), Ok(()));
    }

    #[test]
    fn a_legacy_event_may_stand_alone() {
        let events = [ac(0, 5, 3, true), ac(0, 1, 0, false), ac(0, 6, 3, true)];
        assert_eq!(check_truth(&events, &[fault(0, 1, 0)]), Ok(()));
        assert_eq!(check_truth(&events, &[fault(0, 1, 0), fault(0, 6, 3)]), Ok(()));
    }

    #[test]
    fn what_is_traced_does_not_fault_and_what_is_stepped_is_taken() {
        let found = |source: &str, verdict: &str, rip| {
            let mut event = ac(0, rip, 0, false);
            if let Body::Ac(ac) = &mut event.body {
                (ac.source, ac.verdict) = (source.to_owned(), verdict.to_owned());
            }
            event
        };
        let taken = |rip| Truth { outcome: Outcome::Taken, ..fault(0, rip, 0) };
        let events = |source| {
            [found(source, "inject", 1), found(source, "step", 2), found(source, "step", 3)]
        };
        assert_eq!(check_truth(&events("trace"), &[taken(9), taken(2), taken(3)]), Ok(()));
        assert!(check_truth(&events("trace"), &[taken(3), taken(2)]).is_err());
        assert!(check_truth(&events("trace"), &[taken(2)]).is_err());
        assert!(check_truth(&events("msr"), &[taken(2), taken(3)]).is_err());
        // A fault is the CPU's, whoever else is at the same place.
        let faulted = [fault(0, 1, 0), taken(2), taken(3)];
        assert!(check_truth(&events("trace"), &faulted).is_err());
    }

    #[test]
    fn a_split_lock_of_the_hypervisor() {
        let outside = Truth { vmx: false, outcome: Outcome::Taken, ..fault(0, 1, 0) };
        assert!(check_truth(&[], &[outside]).unwrap_err()[0].contains("outside a guest"));
    }
}
