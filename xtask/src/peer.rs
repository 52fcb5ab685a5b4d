//! `cargo xtask bench --peer kvm`: KVM's VM exits and KVM's dealings with split locks beside those of this
//! project, on the same machine with the same guests.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result, bail, ensure};

use crate::bench::{self, Figures};
use crate::config::{Policy, Setup};
use crate::console::Step;
use crate::events::{Body, Outcome, Truth};
use crate::guests::{self, Guest};
use crate::linux::End;
use crate::machine::{self, MachineConfig};
use crate::nested::{self, MITIGATIONS_OFF};
use crate::report::{align, judge};
use crate::system::System;

/// What KVM takes for the rows of `bench`: with speculation mitigations off, and with Linux' defaults.
pub struct Exits {
    off: BTreeMap<String, Figures>,
    defaults: BTreeMap<String, Figures>,
}

/// Measures KVM's exits.
///
/// # Errors
/// If Linux cannot be run, or the guest fails.
pub fn exits(system: &System) -> Result<Exits> {
    let measure = |options| {
        let step = Step::start("Measuring KVM");
        let left = nested::run_guests(system, &[bench::GUEST], options, &step)?;
        step.done();
        let [serial, _] = &left.outlets;
        ensure!(left.ends == [End::Exit(guests::SUCCESS)], "{:?}\n{serial}", left.ends);
        bench::printed_by(serial, "")
    };
    Ok(Exits { off: measure(MITIGATIONS_OFF)?, defaults: measure("")? })
}

impl Exits {
    /// A row for each of ours, beside it: name, ours, KVM's with mitigations off, KVM's with defaults.
    fn rows<'a>(&self, ours: impl IntoIterator<Item = (&'a str, u64)>) -> Vec<[String; 4]> {
        let median = |of: &BTreeMap<String, Figures>, name: &str| match of.get(name) {
            Some(Ok((_, median))) => Some(median.to_string()),
            Some(Err(why)) => Some(why.clone()),
            None => None,
        };
        let row = |(name, ours): (&str, u64)| {
            let kvm = [median(&self.off, name)?, median(&self.defaults, name)?];
            let [off, defaults] = kvm;
            Some([name.to_owned(), ours.to_string(), off, defaults])
        };
        ours.into_iter().filter_map(row).collect()
    }

    /// A table for a terminal. `ours` has the medians of this hypervisor, by row.
    pub fn table<'a>(&self, ours: impl IntoIterator<Item = (&'a str, u64)>) -> String {
        let heading = EXIT_HEADING.map(str::to_owned);
        align(&[vec![heading], self.rows(ours)].concat())
    }

    /// The same for the document.
    pub fn markdown<'a>(&self, ours: impl IntoIterator<Item = (&'a str, u64)>) -> String {
        markdown(EXIT_HEADING, &self.rows(ours))
    }
}

const EXIT_HEADING: [&str; 4] = ["row", "ours", "KVM, mitigations off", "KVM, defaults"];

/// What became of a guest and of its split locks.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fate {
    faulted: usize,
    taken: usize,
    end: String,
}

impl Fate {
    fn of(truth: &[Truth], end: String) -> Self {
        let count = |outcome| truth.iter().filter(|truth| truth.outcome == outcome).count();
        Self { faulted: count(Outcome::Faulted), taken: count(Outcome::Taken), end }
    }
}

impl std::fmt::Display for Fate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { faulted, taken, end } = self;
        write!(f, "{faulted} stopped, {taken} took the bus; {end}")
    }
}

/// What becomes of the demonstration's guests and their split locks: under KVM with Linux' modes `warn` and
/// `fatal`, under ours with the policies of these names.
pub struct SplitLocks(Vec<(&'static str, [Fate; 4])>);

/// Runs the guests.
///
/// # Errors
/// If a machine cannot be run.
pub fn split_locks(system: &System) -> Result<SplitLocks> {
    let [warn, fatal] = ["warn", "fatal"].map(|mode| kvm(system, mode));
    let (warn, fatal) = (warn?, fatal?);
    let step = Step::start("Split locks under this hypervisor");
    let mut rows = Vec::new();
    for (guest, (warn, fatal)) in guests::demo().zip(warn.into_iter().zip(fatal)) {
        step.note(guest.name);
        let [own_warn, own_fatal] =
            [Policy::Warn, Policy::Fatal].map(|mode| own(system, guest, mode));
        rows.push((guest.name, [warn, own_warn?, fatal, own_fatal?]));
    }
    step.done();
    Ok(SplitLocks(rows))
}

/// The guests' fates under KVM.
fn kvm(system: &System, mode: &str) -> Result<Vec<Fate>> {
    let step = Step::start(&format!("Split locks under KVM, split_lock_detect={mode}"));
    let options = format!("{MITIGATIONS_OFF} split_lock_detect={mode}");
    let names: Vec<&str> = guests::demo().map(|guest| guest.name).collect();
    let left = nested::run_guests(system, &names, &options, &step)?;
    step.done();
    let end = |end: &End| match end {
        End::Exit(status) => format!("exit {status}"),
        End::Signal(signal) => format!("QEMU killed by signal {signal}"),
    };
    Ok(left.truth.iter().zip(&left.ends).map(|(truth, how)| Fate::of(truth, end(how))).collect())
}

/// A guest's fate under this hypervisor.
fn own(system: &System, guest: &Guest, mode: Policy) -> Result<Fate> {
    let disk = system.temporary_disk(&Setup::of_guests(mode, &[guest.name.to_owned()], false)?)?;
    let config = MachineConfig { image: disk.path().to_owned(), ..MachineConfig::default() };
    let outcome = machine::record(&config, &mut |_| {})?.parse()?;
    if let Err(why) = judge(&outcome) {
        bail!("{why}\n{}", outcome.serial);
    }
    let mut ends = outcome.events.iter().filter_map(|event| match &event.body {
        Body::VmEnd { reason, status: Some(status), .. } => Some(format!("{reason} {status}")),
        Body::VmEnd { reason, .. } => Some(format!("VM stopped: {reason}")),
        _ => None,
    });
    let end = ends.next_back().context("the VM did not end")?;
    Ok(Fate::of(&outcome.truth, end))
}

const SPLIT_HEADING: [&str; 5] = ["guest", "KVM, warn", "ours, warn", "KVM, fatal", "ours, fatal"];

impl SplitLocks {
    fn rows(&self) -> Vec<[String; 5]> {
        let row = |(name, fates): &(&str, [Fate; 4])| {
            let [a, b, c, d] = fates.each_ref().map(ToString::to_string);
            [(*name).to_owned(), a, b, c, d]
        };
        self.0.iter().map(row).collect()
    }

    /// A table for a terminal.
    pub fn table(&self) -> String {
        align(&[vec![SPLIT_HEADING.map(str::to_owned)], self.rows()].concat())
    }

    /// The same for the document.
    pub fn markdown(&self) -> String {
        markdown(SPLIT_HEADING, &self.rows())
    }
}

fn markdown<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    let mut text = format!("| {} |\n|{}\n", heading.join(" | "), "---|".repeat(N));
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Address;

    #[test]
    fn rows_stand_side_by_side_where_both_have_them() {
        let of = |median| {
            let none = ("hlt_pending".to_owned(), Err("no x2APIC".to_owned()));
            BTreeMap::from([("cpuid".to_owned(), Ok((median - 1, median))), none])
        };
        let exits = Exits { off: of(1430), defaults: of(1600) };
        let ours = [("cpuid", 164), ("hlt_pending", 497), ("vcpu_switch", 1177)];
        let expected = "\
            | row | ours | KVM, mitigations off | KVM, defaults |\n|---|---|---|---|\n\
            | cpuid | 164 | 1430 | 1600 |\n| hlt_pending | 497 | no x2APIC | no x2APIC |\n";
        assert_eq!(exits.markdown(ours), expected);
        assert!(exits.table(ours).contains("\ncpuid"));
    }

    #[test]
    fn fates_count_what_the_machine_saw() {
        let truth = |outcome| Truth { cpu: 0, rip: Address(0), cpl: 0, vmx: true, outcome };
        let seen = [Outcome::Faulted, Outcome::Taken, Outcome::Taken].map(truth);
        let fate = Fate::of(&seen, "exit 33".to_owned());
        assert_eq!(fate.to_string(), "1 stopped, 2 took the bus; exit 33");
    }
}
