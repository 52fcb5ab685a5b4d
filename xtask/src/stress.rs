//! `cargo xtask stress`: several CPUs, several VMs of several vCPUs, moved about all the time, and
//! everything that they did checked afterwards.
//!
//! All VMs run the guest `stress` in one of its roles, for ever: the hypervisor ends them after a number
//! of vCPU loads. The same arguments give the same run.

use std::fmt::{self, Display};
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Serialize;

use crate::config::{HvConfig, Policy, Setup, SldSource, Source, Vm};
use crate::console::Step;
use crate::guests;
use crate::machine::{self, MachineConfig, RunOutcome};
use crate::profile::Functions;
use crate::system::System;
use crate::topology::Topology;

mod examine;

use examine::examine;
pub use examine::{Fairness, Report, VmReport};

/// Arguments of `stress`.
#[derive(Args, Debug)]
pub struct StressArgs {
    /// The CPUs: how many, or how many packages, cores of each and threads of each of these.
    #[arg(long, default_value = "4", value_name = "N-or-PACKAGES:CORES:THREADS")]
    cpus: Topology,
    /// Number of VMs, each of 2 to 4 vCPUs.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=32))]
    vms: u32,
    /// The VMs are ended after so many vCPU loads in total.
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    loads: u64,
    /// What the host does about split locks.
    #[arg(long, default_value = "warn", value_name = "POLICY")]
    sld: Policy,
    /// Where split locks are detected: msr, trace, or auto; with trace, everything is slow.
    #[arg(long, value_name = "SOURCE")]
    source: Option<SldSource>,
    /// Decides what the VMs do, and how many vCPUs each has.
    #[arg(long, default_value_t = 1, value_name = "S")]
    seed: u64,
    /// Store the result here, as one JSON object.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Runs it and shows the result.
///
/// # Errors
/// If it cannot be run, or if anything was wrong.
pub fn run(args: &StressArgs) -> Result<()> {
    let StressArgs { cpus, vms, loads, sld, source, seed, .. } = *args;
    let plan = Plan { cpus, vms, loads, sld, source, seed };
    // Made now, so that a wrong path is found before the run and not after it.
    let create = |path: &PathBuf| {
        fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))
    };
    let file = args.json.as_ref().map(create).transpose()?;
    let Stressed { report, outcome } = plan.run(&System::build()?)?;
    print!("{report}");
    if let Some(mut file) = file {
        let json = serde_json::to_string_pretty(&report)? + "\n";
        file.write_all(json.as_bytes()).context("cannot write the result")?;
    }
    if report.wrong.is_empty() {
        return Ok(());
    }
    eprintln!("\nlast lines of the console:\n{}", last_lines(&outcome.serial, CONSOLE_LINES));
    bail!("the run was not as it must be: see \"wrong\" above")
}

/// How often it says that it goes on.
const PROGRESS_SECONDS: u64 = 10;
/// Lines of the console that are shown if anything is wrong.
const CONSOLE_LINES: usize = 30;

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

// ---- The plan ----------------------------------------------------------------------------------

/// The guest.
const GUEST: &str = "stress";
/// So few that the output of what the guests do is a small part of their time.
const IPS: u32 = 1_000_000;
/// A vCPU's turn, in ticks of the time-stamp counter.
const SLICE_TICKS: u64 = 30_000;
/// After so many VM exits on a CPU a vCPU goes to the next one: after eight loads or so.
const MIGRATE_EXITS: u64 = 25;
/// Rounds without a split lock before the first, of a guest that the first one ends.
const CALM_ROUNDS: u32 = 50;
/// Of ten loads one is a migration at least, where vCPUs share CPUs.
const LOADS_PER_MIGRATION: u64 = 10;
/// A vCPU that gets less than so much of its fair share starves. Short runs are uneven: vCPUs start one after
/// the other.
const LEAST_PERCENT: f64 = 33.0;
/// Memory of the machine, in MiB, besides that of its VMs.
const MACHINE_MIB: u32 = 192;

/// A machine and what runs on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Its CPUs.
    pub cpus: Topology,
    /// Number of VMs.
    pub vms: u32,
    /// After how many vCPU loads it ends.
    pub loads: u64,
    /// The host's mode.
    pub sld: Policy,
    /// Where split locks are detected; as the hypervisor likes without it.
    pub source: Option<SldSource>,
    /// Decides roles and vCPUs.
    pub seed: u64,
}

/// How a VM ends that runs until the hypervisor ends it.
const LIMIT: &str = "load limit";

/// What a VM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Splits locks and knows nothing of detection.
    Unaware,
    /// Turns its own detection on and off and splits locks both ways.
    Aware,
    /// Has legacy alignment checking on, splits locks with it and without.
    Legacy,
    /// Never splits a lock, and must never notice that others do.
    Calm,
}

impl Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unaware => "unaware",
            Self::Aware => "aware",
            Self::Legacy => "legacy",
            Self::Calm => "calm",
        })
    }
}

/// A VM of the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    name: String,
    role: Role,
    vcpus: u32,
    seed: u32,
}

/// SplitMix64: small, and good enough to make plans differ.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    fn below(&mut self, bound: u32) -> u32 {
        (self.next() % u64::from(bound)) as u32
    }
}

impl Default for Plan {
    /// What `cargo xtask stress` runs unless told otherwise.
    fn default() -> Self {
        Self { cpus: 4.into(), vms: 3, loads: 10_000, sld: Policy::Warn, source: None, seed: 1 }
    }
}

impl Plan {
    /// The VMs. An aware and an unaware one come first, then one that must not be affected by these;
    /// where nothing detects there is nothing to be aware of.
    fn members(&self) -> Vec<Member> {
        let mut random = Random(self.seed);
        let mut roles = match random.below(2) {
            0 => [Role::Aware, Role::Unaware, Role::Calm, Role::Legacy],
            _ => [Role::Aware, Role::Unaware, Role::Legacy, Role::Calm],
        };
        if self.sld == Policy::Off {
            roles[0] = Role::Unaware;
        }
        (1..=self.vms)
            .zip(roles.into_iter().cycle())
            .map(|(number, role)| Member {
                name: format!("{role}-{number}"),
                role,
                vcpus: 2 + random.below(3),
                seed: random.below(u32::MAX),
            })
            .collect()
    }

    /// Whether a split lock ends a VM of this role.
    fn kills(&self, role: Role) -> bool {
        self.sld == Policy::Fatal && role == Role::Unaware
    }

    fn config(&self) -> Result<HvConfig> {
        let guest = guests::find(GUEST).context("the guest is not registered")?;
        let vm = |Member { name, role, vcpus, seed }: Member| {
            let restraint = match self.sld {
                Policy::Fatal if self.kills(role) => format!(" calm={CALM_ROUNDS}"),
                Policy::Fatal => " held".to_owned(),
                _ => String::new(),
            };
            Vm {
                name,
                vcpus,
                expose_sld: role == Role::Aware,
                limit_ticks: None,
                cmdline: format!("role={role} vcpus={vcpus} seed={seed}{restraint}"),
                ..Vm::of_guest(guest)
            }
        };
        Ok(HvConfig {
            source: self.source,
            slice_ticks: Some(SLICE_TICKS),
            verify: true,
            migrate_exits: Some(MIGRATE_EXITS),
            stop_after_loads: Some(self.loads),
            ..HvConfig::new(self.sld, self.members().into_iter().map(vm).collect())
        })
    }

    /// Boots the machine, waits for its end and examines what it did.
    ///
    /// # Errors
    /// If it cannot be run. Whatever it did wrong stands in the report.
    pub fn run(&self, system: &System) -> Result<Stressed> {
        let guest = fs::read(system.guest(GUEST)?)?;
        let functions = Functions::of(&guest)?;
        ensure!(functions.names().any(is_detected), "{GUEST} has no function {DETECTED}…");
        let detected = |rip| functions.symbol(rip).is_some_and(is_detected);

        let config = self.config()?;
        let memory_mib = MACHINE_MIB + config.vms.iter().map(|vm| vm.memory_mib).sum::<u32>();
        let images = vec![(config.vms[0].image.clone(), Source::Registered(GUEST))];
        let setup = Setup { config: config.to_text()?, images };
        let disk = system.temporary_disk(&setup)?;
        let machine = MachineConfig {
            image: disk.path().to_owned(),
            cpus: self.cpus,
            memory_mib,
            ips: IPS,
            // Calm VMs alone say nothing.
            timeout: Duration::from_secs(60 + self.loads / 100),
            ..MachineConfig::default()
        };
        let vcpus: u32 = config.vms.iter().map(|vm| vm.vcpus).sum();
        let step = Step::start(&format!(
            "Running {} VMs with {vcpus} vCPUs on {} CPUs for {} loads",
            self.vms,
            self.cpus.cpus(),
            self.loads
        ));
        let started = Instant::now();
        let mut shown = 0;
        let recording = machine::record(&machine, &mut |_| {
            let seconds = started.elapsed().as_secs();
            if seconds >= shown + PROGRESS_SECONDS {
                step.note(&format!("{seconds} s"));
                shown = seconds;
            }
        })?;
        step.done();
        let outcome = recording.parse()?;
        Ok(Stressed { report: examine(self, &outcome, &detected), outcome })
    }
}

/// What the names of functions begin with whose split locks the guest only executes where they must
/// raise `#AC`.
const DETECTED: &str = "split_detected_";

fn is_detected(function: &str) -> bool {
    function.rsplit("::").next().is_some_and(|name| name.starts_with(DETECTED))
}

/// A run that was examined.
#[derive(Clone, Debug)]
pub struct Stressed {
    /// What it comes to.
    pub report: Report,
    /// All that it left.
    pub outcome: RunOutcome,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn plans_follow_from_the_seed() {
        let plans = || (0..50).map(|seed| Plan { vms: 4, seed, ..Plan::default() });
        for plan in plans() {
            let members = plan.members();
            assert_eq!(members, plan.members());
            assert!(members.iter().all(|member| (2..=4).contains(&member.vcpus)));
            let roles: BTreeSet<Role> = members.iter().map(|member| member.role).collect();
            assert_eq!(roles.len(), 4);
            let off = Plan { sld: Policy::Off, ..plan }.members();
            assert!(off.iter().all(|member| member.role != Role::Aware));
        }
        let third: BTreeSet<Role> = plans().map(|plan| plan.members()[2].role).collect();
        assert_eq!(third, BTreeSet::from([Role::Legacy, Role::Calm]));
        let vcpus: BTreeSet<u32> = plans().map(|plan| plan.members()[0].vcpus).collect();
        assert_eq!(vcpus, BTreeSet::from([2, 3, 4]));
        let seeds: BTreeSet<u32> = plans().map(|plan| plan.members()[0].seed).collect();
        assert_eq!(seeds.len(), 50);
    }

    #[test]
    fn the_configuration_moves_vcpus_about_and_checks_everything() {
        let text = Plan { loads: 777, ..Plan::default() }.config().unwrap().to_text().unwrap();
        for line in [
            "verify = true",
            "migrate_exits = 25",
            "stop_after_loads = 777",
            "cmdline = \"role=aware vcpus=",
            "cmdline = \"role=unaware vcpus=",
        ] {
            assert!(text.lines().any(|found| found.starts_with(line)), "{text}");
        }
        assert!(!text.contains("limit_ticks") && !text.contains("held"), "{text}");
        let fatal = Plan { sld: Policy::Fatal, ..Plan::default() }.config().unwrap();
        for vm in &fatal.vms {
            let restraint = if vm.cmdline.contains("unaware") { " calm=50" } else { " held" };
            assert!(vm.cmdline.ends_with(restraint), "{vm:?}");
            assert_eq!(vm.expose_sld, vm.cmdline.contains("role=aware"), "{vm:?}");
        }
    }

    #[test]
    fn detected_places_are_known_by_name() {
        assert!(is_detected("stress::aware::split_detected_xchg"));
        assert!(is_detected("split_detected_add"));
        assert!(!is_detected("stress::split_detected_x::run"));
        assert!(!is_detected("stress::split_taken"));
    }
}
