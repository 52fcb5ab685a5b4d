//! What a stress run comes to: everything that it left, checked against its plan and against the ground truth.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Write};

use serde::Serialize;

use super::{LEAST_PERCENT, LIMIT, LOADS_PER_MIGRATION, Member, Plan, Role};
use crate::config::{Policy, as_text};
use crate::events::{self, Ac, Address, Body, Counters, Event, Outcome, Totals};
use crate::machine::RunOutcome;
use crate::report::{align, judge};
use crate::topology::Topology;
use crate::truth::{Differences, differences};

/// What a run comes to.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The machine's CPUs.
    #[serde(serialize_with = "as_text")]
    pub cpus: Topology,
    /// The host's policy.
    #[serde(serialize_with = "as_text")]
    pub sld: Policy,
    /// The seed.
    pub seed: u64,
    /// The VMs.
    pub vms: Vec<VmReport>,
    /// vCPU loads.
    pub loads: u64,
    /// Those on another CPU than before.
    pub migrations: u64,
    /// VM exits.
    pub exits: u64,
    /// `#AC` by verdict.
    pub verdicts: BTreeMap<String, u64>,
    /// Those of them that legacy alignment checking may have raised.
    pub legacy: u64,
    /// Split locks of guests that took the bus.
    pub bus_locks: u64,
    /// Writes of the real bit.
    pub real_bit_writes: u64,
    /// Invariants that did not hold.
    pub violations: u64,
    /// Split locks that were not reported, or took the bus where detection must have been on.
    pub missed: u64,
    /// Reports of split locks that did not happen.
    pub invented: u64,
    /// Split locks of the hypervisor itself.
    pub outside: u64,
    /// How equally the vCPUs were treated.
    pub fairness: Option<Fairness>,
    /// Everything that is wrong, in words.
    pub wrong: Vec<String>,
}

/// A VM in the report.
#[derive(Clone, Debug, Serialize)]
pub struct VmReport {
    /// Its name.
    pub name: String,
    /// What it did.
    pub role: Role,
    /// Number of its vCPUs.
    pub vcpus: u32,
    /// How it ended.
    pub end: String,
    /// vCPU loads.
    pub loads: u64,
    /// Those on another CPU than before.
    pub migrations: u64,
    /// VM exits.
    pub exits: u64,
    /// Ticks of the time-stamp counter that each vCPU was on a CPU.
    pub ticks: Vec<u64>,
    /// `#AC` by verdict.
    pub verdicts: BTreeMap<String, u64>,
}

/// How equally vCPUs were treated, by their ticks for each unit of weight. Of vCPUs that ran to the
/// end and never slept.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fairness {
    /// How many vCPUs these are.
    pub vcpus: usize,
    /// Jain's index: 1 if all got the same, 1/n if one got everything.
    pub jain: f64,
    /// The least that one got, in per cent of the mean.
    pub smallest_percent: f64,
}

impl Fairness {
    fn of(shares: &[f64]) -> Option<Self> {
        let sum: f64 = shares.iter().sum();
        let squares: f64 = shares.iter().map(|share| share * share).sum();
        let least = shares.iter().copied().reduce(f64::min)?;
        let count = shares.len() as f64;
        (sum > 0.0).then(|| Self {
            vcpus: shares.len(),
            jain: sum * sum / (count * squares),
            smallest_percent: 100.0 * least * count / sum,
        })
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![
            ["VM", "vCPUs", "loads", "migrations", "VM exits", "verdicts", "how it ended"]
                .map(str::to_owned),
        ];
        rows.extend(self.vms.iter().map(|vm| {
            [
                vm.name.clone(),
                vm.vcpus.to_string(),
                vm.loads.to_string(),
                vm.migrations.to_string(),
                vm.exits.to_string(),
                verdicts_text(&vm.verdicts),
                vm.end.clone(),
            ]
        }));
        writeln!(f, "{}", align(&rows))?;
        let fairness = self.fairness.map_or_else(
            || "no vCPU that ran all the time".to_owned(),
            |Fairness { vcpus, jain, smallest_percent }| {
                format!(
                    "{jain:.4} (Jain's index of {vcpus} vCPUs), smallest share {smallest_percent:.1} %"
                )
            },
        );
        let verdicts = verdicts_text(&self.verdicts);
        let lines = [
            ("loads", self.loads.to_string()),
            ("migrations", self.migrations.to_string()),
            ("VM exits", self.exits.to_string()),
            ("#AC by verdict", format!("{verdicts} (legacy: {})", self.legacy)),
            ("bus locks of guests", self.bus_locks.to_string()),
            ("real-bit writes", self.real_bit_writes.to_string()),
            ("invariant violations", self.violations.to_string()),
            ("missed split locks", self.missed.to_string()),
            ("invented split locks", self.invented.to_string()),
            ("split locks outside guests", self.outside.to_string()),
            ("fairness", fairness),
        ];
        let lines = lines.map(|(name, value)| [name.to_owned(), value]);
        f.write_str(&align(&lines))?;
        if !self.wrong.is_empty() {
            f.write_str("\nwrong:\n")?;
            self.wrong.iter().try_for_each(|wrong| writeln!(f, "  {wrong}"))?;
        }
        Ok(())
    }
}

fn verdicts_text(verdicts: &BTreeMap<String, u64>) -> String {
    let mut text = String::new();
    for (verdict, count) in verdicts.iter().filter(|(_, count)| **count > 0) {
        let separator = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{separator}{verdict} {count}");
    }
    if text.is_empty() { "-".to_owned() } else { text }
}

/// What is wrong, at most so many of a kind.
#[derive(Default)]
struct Wrong(Vec<String>);

impl Wrong {
    fn add(&mut self, what: impl Into<String>) {
        self.0.push(what.into());
    }

    fn unless(&mut self, right: bool, what: impl FnOnce() -> String) {
        if !right {
            self.add(what());
        }
    }

    /// Many of one kind.
    fn extend(&mut self, what: &[String]) {
        const MOST: usize = 10;
        self.0.extend(what.iter().take(MOST).cloned());
        let others = what.len().saturating_sub(MOST);
        self.unless(others == 0, || format!("… and {others} more like this"));
    }
}

/// A VM's part of the events.
#[derive(Default)]
struct Seen<'a> {
    started: Option<(u32, u32)>,
    end: Option<(&'a str, Option<u32>, &'a Counters)>,
    vcpus: BTreeMap<u32, VcpuSeen<'a>>,
}

/// A vCPU's part of them.
#[derive(Default)]
struct VcpuSeen<'a> {
    end: Option<&'a Counters>,
    verdicts: BTreeMap<&'a str, u64>,
    legacy: u64,
    real_bit_writes: u64,
}

/// Examines a run. `detected` says of a guest address whether the guest has a split lock there only where
/// it must raise `#AC`; in mode `fatal` all of them must.
pub(super) fn examine(
    plan: &Plan,
    outcome: &RunOutcome,
    detected: &dyn Fn(Address) -> bool,
) -> Report {
    let members = plan.members();
    let mut wrong = Wrong::default();
    if let Err(why) = judge(outcome) {
        wrong.add(why);
    }
    if let Err(why) = events::check_numbers(&outcome.events) {
        wrong.add(format!("{why:#}"));
    }
    let failures = outcome.serial.lines().filter(|line| line.contains("FAILED"));
    wrong.extend(&failures.map(str::to_owned).collect::<Vec<_>>());
    check_cpus(plan, &outcome.events, &mut wrong);

    let mut seen: BTreeMap<&str, Seen<'_>> = BTreeMap::new();
    outcome.events.iter().for_each(|event| note(&mut seen, event));
    let totals = outcome.events.iter().find_map(|event| match event.body {
        Body::Shutdown { counters } => Some(counters),
        _ => None,
    });
    let totals = totals.unwrap_or_default();

    let none = Seen::default();
    let mut reports = Vec::new();
    for member in &members {
        let seen = seen.get(&*member.name).unwrap_or(&none);
        check_vm(plan, member, seen, &mut wrong);
        let counters = seen.end.map(|(.., counters)| counters.clone()).unwrap_or_default();
        reports.push(VmReport {
            name: member.name.clone(),
            role: member.role,
            vcpus: member.vcpus,
            end: seen.end.map_or_else(|| "did not end".to_owned(), |end| end_text(end.0, end.1)),
            loads: counters.loads,
            migrations: counters.migrations,
            exits: counters.exits.values().sum(),
            ticks: seen.vcpus.values().filter_map(|vcpu| Some(vcpu.end?.ticks)).collect(),
            verdicts: counters.split_locks,
        });
    }
    check_totals(plan, &reports, &totals, &mut wrong);

    let Differences { outside, missed, invented } = differences(&outcome.events, &outcome.truth);
    let escaped: Vec<String> = outcome
        .truth
        .iter()
        .filter(|truth| truth.vmx && truth.outcome == Outcome::Taken)
        .filter(|truth| match plan.sld {
            Policy::Off | Policy::Warn => detected(truth.rip),
            // As many as were stepped: see below.
            Policy::Step | Policy::RateLimit(_) => false,
            Policy::Emulate | Policy::Fatal => true,
        })
        .map(|truth| format!("CPU {}: a split lock at {} was not stopped", truth.cpu, truth.rip))
        .collect();
    if matches!(plan.sld, Policy::Step | Policy::RateLimit(_)) {
        let taken =
            outcome.truth.iter().filter(|truth| truth.vmx && truth.outcome == Outcome::Taken);
        let stepped = outcome.events.iter().filter(
            |event| matches!(&event.body, Body::Ac(Ac { verdict, .. }) if verdict == "step"),
        );
        let (taken, stepped) = (taken.count(), stepped.count());
        wrong.unless(taken == stepped, || {
            format!("guests have locked the bus {taken} times, {stepped} steps were reported")
        });
    }
    for list in [&outside, &missed, &invented, &escaped] {
        wrong.extend(list);
    }

    let fairness = Fairness::of(&shares(&seen));
    wrong.unless(fairness.is_none_or(|fair| fair.smallest_percent >= LEAST_PERCENT), || {
        format!("a vCPU got less than {LEAST_PERCENT} % of its share")
    });
    let mut verdicts: BTreeMap<String, u64> = BTreeMap::new();
    for (verdict, count) in reports.iter().flat_map(|vm| &vm.verdicts) {
        *verdicts.entry(verdict.clone()).or_default() += count;
    }
    let violations =
        outcome.events.iter().filter(|event| matches!(event.body, Body::Violation { .. }));
    let taken = |truth: &&events::Truth| truth.vmx && truth.outcome == Outcome::Taken;
    Report {
        cpus: plan.cpus,
        sld: plan.sld,
        seed: plan.seed,
        loads: totals.loads,
        migrations: totals.migrations,
        exits: totals.exits,
        verdicts,
        legacy: seen.values().flat_map(|vm| vm.vcpus.values()).map(|vcpu| vcpu.legacy).sum(),
        bus_locks: outcome.truth.iter().filter(taken).count() as u64,
        real_bit_writes: outcome
            .events
            .iter()
            .filter(|event| matches!(event.body, Body::RealBit { .. }))
            .count() as u64,
        violations: totals.violations.max(violations.count() as u64),
        missed: (missed.len() + escaped.len()) as u64,
        invented: invented.len() as u64,
        outside: outside.len() as u64,
        fairness,
        vms: reports,
        wrong: wrong.0,
    }
}

/// Takes up an event.
fn note<'a>(seen: &mut BTreeMap<&'a str, Seen<'a>>, event: &'a Event) {
    let Some(vm) = event.vm() else { return };
    let vm = seen.entry(vm).or_default();
    match &event.body {
        Body::VmStart { vcpus, weight, .. } => vm.started = Some((*vcpus, *weight)),
        Body::Ac(Ac { vcpu, verdict, legacy, .. }) => {
            let vcpu = vm.vcpus.entry(*vcpu).or_default();
            *vcpu.verdicts.entry(verdict).or_default() += 1;
            vcpu.legacy += u64::from(*legacy);
        }
        Body::RealBit { vcpu: Some(vcpu), .. } => {
            vm.vcpus.entry(*vcpu).or_default().real_bit_writes += 1;
        }
        Body::VcpuEnd { vcpu, counters, .. } => {
            vm.vcpus.entry(*vcpu).or_default().end = Some(counters);
        }
        Body::VmEnd { reason, status, counters, .. } => {
            vm.end = Some((reason, *status, counters));
        }
        _ => {}
    }
}

fn end_text(reason: &str, status: Option<u32>) -> String {
    status.map_or_else(|| reason.to_owned(), |status| format!("{reason} {status}"))
}

/// All CPUs must take part.
fn check_cpus(plan: &Plan, events: &[Event], wrong: &mut Wrong) {
    let expected = plan.cpus.cpus();
    let mut online = 0;
    for event in events {
        match &event.body {
            Body::Boot { cpus, .. } => wrong.unless(u64::from(*cpus) == expected, || {
                format!("the hypervisor uses {cpus} CPUs of {expected}")
            }),
            Body::CpuOnline { .. } => online += 1,
            Body::CpuRefused { apic_id, why } => {
                wrong.add(format!("the CPU with APIC ID {apic_id} was refused: {why}"));
            }
            _ => {}
        }
    }
    wrong.unless(online == expected, || format!("{online} CPUs came online, of {expected}"));
}

/// A VM must end as planned, with counters that are those of its events, and every vCPU must have run.
fn check_vm(plan: &Plan, member: &Member, seen: &Seen<'_>, wrong: &mut Wrong) {
    let Member { name, role, vcpus, .. } = member;
    match seen.started {
        Some((started, _)) => wrong.unless(started == *vcpus, || {
            format!("{name} was made with {started} vCPUs, not {vcpus}")
        }),
        None => wrong.add(format!("{name} did not start")),
    }
    let Some((reason, status, counters)) = seen.end else {
        return wrong.add(format!("{name} did not end"));
    };
    let expected = if plan.kills(*role) { "split lock" } else { LIMIT };
    wrong.unless(reason == expected, || {
        format!("{name} ended with {}, not {expected}", end_text(reason, status))
    });

    let mut sums = Counters::default();
    for index in 0..*vcpus {
        let Some((vcpu, end)) = seen.vcpus.get(&index).and_then(|vcpu| Some((vcpu, vcpu.end?)))
        else {
            wrong.add(format!("vCPU {index} of {name} has no end"));
            continue;
        };
        wrong
            .unless(end.loads > 0 && end.ticks > 0, || format!("vCPU {index} of {name} never ran"));
        wrong.unless(end.real_bit_writes == vcpu.real_bit_writes, || {
            format!(
                "vCPU {index} of {name}: {} real-bit writes counted, {} reported",
                end.real_bit_writes, vcpu.real_bit_writes
            )
        });
        let counted: BTreeMap<&str, u64> = end
            .split_locks
            .iter()
            .filter(|(_, count)| **count > 0)
            .map(|(verdict, count)| (&**verdict, *count))
            .collect();
        wrong.unless(counted == vcpu.verdicts, || {
            format!(
                "vCPU {index} of {name}: verdicts {counted:?} counted, {:?} reported",
                vcpu.verdicts
            )
        });
        add(&mut sums, end);
    }
    wrong.unless(sums == *counters, || {
        format!("{name}: its counters are {counters:?}, those of its vCPUs sum up to {sums:?}")
    });
    check_role(plan, member, seen, wrong);
}

/// A VM must get the verdicts that its role brings about, and some of them.
fn check_role(plan: &Plan, Member { name, role, .. }: &Member, seen: &Seen<'_>, wrong: &mut Wrong) {
    let due: &[&str] = match (role, plan.sld) {
        (Role::Calm, _) | (Role::Unaware, Policy::Off) => &[],
        // Threads of a core cannot switch detection off for one of them alone: hence "step".
        (Role::Unaware, Policy::Warn) => &["warn", "step", "again"],
        (Role::Unaware, Policy::Fatal) => &["kill"],
        (Role::Aware, Policy::Step) => &["inject", "step", "again"],
        (Role::Aware, Policy::RateLimit(_)) => &["inject", "step", "again", "throttle"],
        (Role::Aware, Policy::Emulate) => &["inject", "emulate", "again"],
        (Role::Legacy, Policy::Step) => &["inject", "step", "again"],
        (Role::Legacy, Policy::RateLimit(_)) => &["inject", "step", "again", "throttle"],
        (Role::Legacy, Policy::Emulate) => &["inject", "emulate", "again"],
        (Role::Unaware, Policy::Step) => &["step", "again"],
        (Role::Unaware, Policy::RateLimit(_)) => &["step", "again", "throttle"],
        (Role::Unaware, Policy::Emulate) => &["emulate", "again"],
        (Role::Aware, Policy::Warn) => &["inject", "step", "again"],
        (Role::Legacy, Policy::Warn) => &["inject", "warn", "step", "again"],
        (Role::Aware | Role::Legacy, _) => &["inject"],
    };
    let found = || seen.vcpus.values().flat_map(|vcpu| vcpu.verdicts.keys());
    for verdict in found().filter(|verdict| !due.contains(verdict)) {
        wrong.add(format!("{name} got the verdict {verdict}, which is not due to its role"));
    }
    wrong.unless(due.is_empty() || found().next().is_some(), || {
        format!("{name} never raised #AC: it did not do what its role is")
    });
    let legacy: u64 = seen.vcpus.values().map(|vcpu| vcpu.legacy).sum();
    let injected = seen.vcpus.values().filter_map(|vcpu| vcpu.verdicts.get("inject")).sum();
    let expected = if *role == Role::Legacy { injected } else { 0 };
    wrong.unless(legacy == expected, || {
        format!("{name}: {legacy} #AC by legacy alignment checking, {expected} are due")
    });
}

fn add(sums: &mut Counters, counters: &Counters) {
    let Counters { exits, split_locks, bus_locks, real_bit_writes, loads, migrations, ticks } =
        counters;
    for (sums, counts) in [(&mut sums.exits, exits), (&mut sums.split_locks, split_locks)] {
        for (name, count) in counts {
            *sums.entry(name.clone()).or_default() += count;
        }
    }
    sums.bus_locks += bus_locks;
    sums.real_bit_writes += real_bit_writes;
    sums.loads += loads;
    sums.migrations += migrations;
    sums.ticks += ticks;
}

/// The totals must be the sums of the VMs', and as large as planned.
fn check_totals(plan: &Plan, vms: &[VmReport], totals: &Totals, wrong: &mut Wrong) {
    let sum = |part: &dyn Fn(&VmReport) -> u64| vms.iter().map(part).sum::<u64>();
    let verdict = |name: &'static str| {
        sum(&move |vm: &VmReport| vm.verdicts.get(name).copied().unwrap_or_default())
    };
    let pairs = [
        ("VMs", totals.vms, vms.len() as u64),
        ("VM exits", totals.exits, sum(&|vm| vm.exits)),
        ("loads", totals.loads, sum(&|vm| vm.loads)),
        ("migrations", totals.migrations, sum(&|vm| vm.migrations)),
        ("inject", totals.inject, verdict("inject")),
        ("warn", totals.warn, verdict("warn")),
        ("step", totals.step, verdict("step")),
        ("kill", totals.kill, verdict("kill")),
    ];
    for (what, total, sum) in pairs {
        wrong.unless(total == sum, || {
            format!("{what}: {total} in total, but the VMs sum up to {sum}")
        });
    }
    wrong.unless(totals.loads >= plan.loads, || {
        format!("{} loads, of {}", totals.loads, plan.loads)
    });
    let (cpus, vcpus) = (plan.cpus.cpus(), sum(&|vm| vm.vcpus.into()));
    let least = match cpus {
        1 => 0,
        // Each has a CPU of its own and may stay there.
        _ if vcpus <= cpus => 1,
        _ => plan.loads / LOADS_PER_MIGRATION,
    };
    wrong.unless(totals.migrations >= least, || {
        format!("{} migrations, {least} at least are due", totals.migrations)
    });
}

/// Ticks for each unit of weight of every vCPU that ran to the end and never slept.
fn shares(seen: &BTreeMap<&str, Seen<'_>>) -> Vec<f64> {
    let mut shares = Vec::new();
    for vm in seen.values() {
        let (Some((_, weight)), Some((reason, ..))) = (vm.started, vm.end) else { continue };
        if reason != LIMIT {
            continue;
        }
        for end in vm.vcpus.values().filter_map(|vcpu| vcpu.end) {
            if end.exits.get("hlt").is_none_or(|count| *count == 0) {
                shares.push(end.ticks as f64 / f64::from(weight.max(1)));
            }
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Truth;
    use crate::machine::Exit;

    const PLAN: Plan = Plan {
        cpus: Topology { packages: 2, cores: 1, threads: 1 },
        vms: 4,
        loads: 100,
        sld: Policy::Warn,
        source: None,
        seed: 3,
    };
    /// Where the guest's split locks are, those that must be detected and the others.
    const DETECTED_AT: Address = Address(0x1000);
    const OTHERS_AT: Address = Address(0x2000);

    /// A run on two CPUs: CPU and body of each event, and what else it leaves.
    #[derive(Default)]
    struct Run {
        events: Vec<(u32, Body)>,
        truth: Vec<Truth>,
        serial: String,
    }

    impl Run {
        /// A run as it should be: every vCPU raises `#AC` once, if its role does so at all.
        fn of(plan: &Plan) -> Self {
            let mut run = Self::default();
            let (version, sld_source, firmware) = (String::new(), String::new(), String::new());
            let sld = String::new();
            let ticks_per_second = None;
            run.add(
                0,
                Body::Boot { version, cpus: 2, sld, sld_source, ticks_per_second, firmware },
            );
            for cpu in 0..2 {
                run.add(cpu, Body::CpuOnline { apic_id: cpu, core: cpu });
            }
            let members = plan.members();
            for Member { name, vcpus, .. } in &members {
                let (vm, policy, source) = (name.clone(), String::new(), String::new());
                let (vcpus, weight, memory_bytes) = (*vcpus, 100, 1);
                run.add(
                    0,
                    Body::VmStart {
                        vm,
                        policy,
                        source,
                        exposed: true,
                        vcpus,
                        weight,
                        memory_bytes,
                    },
                );
            }
            let mut totals = Totals::default();
            for member in &members {
                run.vm(plan, member, &mut totals);
            }
            run.add(0, Body::Shutdown { counters: totals });
            run
        }

        fn add(&mut self, cpu: u32, body: Body) {
            self.events.push((cpu, body));
        }

        /// What a VM does on CPU 1, and its end.
        fn vm(
            &mut self,
            plan: &Plan,
            Member { name, role, vcpus, .. }: &Member,
            totals: &mut Totals,
        ) {
            let (verdict, rip) = match role {
                Role::Calm => (None, OTHERS_AT),
                Role::Aware => (Some("inject"), DETECTED_AT),
                Role::Legacy => (Some("inject"), OTHERS_AT),
                Role::Unaware if plan.kills(*role) => (Some("kill"), OTHERS_AT),
                Role::Unaware => (Some("warn"), OTHERS_AT),
            };
            let counters = Counters {
                exits: [("exception".to_owned(), 1), ("cpuid".to_owned(), 2)].into(),
                split_locks: verdict.map(|verdict| (verdict.to_owned(), 1)).into_iter().collect(),
                bus_locks: 0,
                real_bit_writes: (verdict == Some("warn")).into(),
                loads: 50,
                migrations: 10,
                ticks: 1000,
            };
            let mut sums = Counters::default();
            for vcpu in 0..*vcpus {
                if let Some(verdict) = verdict {
                    self.ac(name, vcpu, verdict, rip, *role == Role::Legacy);
                }
                let (vm, counters) = (name.clone(), counters.clone());
                add(&mut sums, &counters);
                self.add(0, Body::VcpuEnd { vm, vcpu, counters });
            }
            let count = |verdict: &str| sums.split_locks.get(verdict).copied().unwrap_or_default();
            totals.vms += 1;
            totals.exits += sums.exits.values().sum::<u64>();
            totals.inject += count("inject");
            totals.warn += count("warn");
            totals.kill += count("kill");
            totals.loads += sums.loads;
            totals.migrations += sums.migrations;
            let reason = if plan.kills(*role) { "split lock" } else { LIMIT };
            let (vm, reason) = (name.clone(), reason.to_owned());
            self.add(0, Body::VmEnd { vm, reason, status: None, counters: sums });
        }

        /// A vCPU's `#AC` on CPU 1, and what the machine saw of it.
        fn ac(&mut self, vm: &str, vcpu: u32, verdict: &str, rip: Address, legacy: bool) {
            let vm = vm.to_owned();
            let ac = Ac {
                vm: vm.clone(),
                vcpu,
                source: "msr".to_owned(),
                rip,
                cr3: Address::default(),
                bits: 64,
                cpl: 3,
                am: legacy,
                ac: legacy,
                virtual_bit: false,
                legacy,
                verdict: verdict.to_owned(),
                bytes: Default::default(),
            };
            self.add(1, Body::Ac(ac));
            if !legacy {
                self.truth.push(truth(rip, Outcome::Faulted));
            }
            if verdict == "warn" {
                let (vm, vcpu, why) = (Some(vm), Some(vcpu), verdict.to_owned());
                self.add(1, Body::RealBit { vm, vcpu, on: false, why });
                self.truth.push(truth(rip, Outcome::Taken));
            }
        }

        /// The counters of a VM's vCPU.
        fn counters(&mut self, role: Role, index: u32) -> &mut Counters {
            let name = name_of(role);
            self.events
                .iter_mut()
                .find_map(|(_, body)| match body {
                    Body::VcpuEnd { vm, vcpu, counters } if *vm == name && *vcpu == index => {
                        Some(counters)
                    }
                    _ => None,
                })
                .unwrap()
        }

        fn outcome(&self) -> RunOutcome {
            let mut next = [0, 0];
            let number = |(tsc, (cpu, body)): (u64, &(u32, Body))| {
                let seq = next[*cpu as usize];
                next[*cpu as usize] += 1;
                Event { seq, tsc, cpu: *cpu, body: body.clone() }
            };
            RunOutcome {
                events: (0..).zip(&self.events).map(number).collect(),
                truth: self.truth.clone(),
                serial: self.serial.clone(),
                exit: Exit::PoweredOff,
            }
        }

        fn examine(&self, plan: &Plan) -> Report {
            examine(plan, &self.outcome(), &|rip| rip == DETECTED_AT)
        }

        /// Everything that is wrong with it, a line each.
        fn wrong(&self) -> String {
            self.examine(&PLAN).wrong.join("\n")
        }

        /// The only thing that is wrong with it.
        fn only_wrong(&self) -> String {
            let report = self.examine(&PLAN);
            assert_eq!(report.wrong.len(), 1, "{report}");
            report.wrong[0].clone()
        }
    }

    fn truth(rip: Address, outcome: Outcome) -> Truth {
        Truth { cpu: 1, rip, cpl: 3, vmx: true, outcome }
    }

    fn member(role: Role) -> Member {
        PLAN.members().into_iter().find(|member| member.role == role).unwrap()
    }

    fn name_of(role: Role) -> String {
        member(role).name
    }

    #[test]
    fn a_run_as_it_should_be() {
        let report = Run::of(&PLAN).examine(&PLAN);
        assert!(report.wrong.is_empty(), "{report}");
        let of = |role| u64::from(member(role).vcpus);
        let all = of(Role::Aware) + of(Role::Unaware) + of(Role::Legacy) + of(Role::Calm);
        assert_eq!((report.loads, report.migrations), (50 * all, 10 * all));
        assert_eq!((report.missed, report.invented, report.outside), (0, 0, 0));
        let verdicts = [
            ("inject".to_owned(), of(Role::Aware) + of(Role::Legacy)),
            ("warn".to_owned(), of(Role::Unaware)),
        ];
        assert_eq!(report.verdicts, verdicts.into());
        assert_eq!((report.legacy, report.bus_locks), (of(Role::Legacy), of(Role::Unaware)));
        let fairness = Fairness { vcpus: all as usize, jain: 1.0, smallest_percent: 100.0 };
        assert_eq!(report.fairness, Some(fairness));
        let text = report.to_string();
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        assert!(!text.contains("wrong"), "{text}");
        let json = serde_json::to_string(&report).unwrap();
        assert!(json.starts_with(r#"{"cpus":"2","sld":"warn","seed":3,"vms":[{"name":"#), "{json}");
    }

    #[test]
    fn in_mode_fatal_unaware_vms_are_killed() {
        let fatal = Plan { sld: Policy::Fatal, ..PLAN };
        let mut run = Run::of(&fatal);
        let report = run.examine(&fatal);
        assert!(report.wrong.is_empty(), "{report}");
        assert_eq!(report.vms.iter().filter(|vm| vm.end == "split lock").count(), 1);
        let all: u32 = PLAN.members().iter().map(|member| member.vcpus).sum();
        let last = all - member(Role::Unaware).vcpus;
        assert_eq!(report.fairness.unwrap().vcpus, last as usize);
        // No bus lock may be taken at all.
        run.truth.push(truth(OTHERS_AT, Outcome::Taken));
        let report = run.examine(&fatal);
        assert_eq!((report.wrong.len(), report.missed), (1, 1), "{report}");
    }

    #[test]
    fn missed_invented_and_escaped_split_locks() {
        let mut run = Run::of(&PLAN);
        run.truth.push(truth(Address(0x3000), Outcome::Faulted));
        assert!(run.only_wrong().contains("not reported"));
        assert_eq!(run.examine(&PLAN).missed, 1);

        let mut run = Run::of(&PLAN);
        run.truth.push(truth(DETECTED_AT, Outcome::Taken));
        assert!(run.only_wrong().contains("was not stopped"));
        assert_eq!(run.examine(&PLAN).missed, 1);

        let mut run = Run::of(&PLAN);
        let last = run.truth.iter().rposition(|truth| truth.outcome == Outcome::Faulted);
        run.truth.remove(last.unwrap());
        assert!(run.only_wrong().contains("did not happen"));
        assert_eq!(run.examine(&PLAN).invented, 1);

        let mut run = Run::of(&PLAN);
        run.truth.push(Truth { vmx: false, ..truth(OTHERS_AT, Outcome::Taken) });
        assert!(run.only_wrong().contains("outside a guest"));
        assert_eq!(run.examine(&PLAN).outside, 1);
    }

    #[test]
    fn many_of_a_kind_are_summed_up() {
        let mut run = Run::of(&PLAN);
        run.truth.extend([truth(DETECTED_AT, Outcome::Taken); 25]);
        let report = run.examine(&PLAN);
        assert_eq!((report.missed, report.wrong.len()), (25, 11), "{report}");
        assert!(report.wrong[10].contains("15 more"), "{report}");
    }

    #[test]
    fn a_calm_vm_must_not_be_affected() {
        let mut run = Run::of(&PLAN);
        let calm = name_of(Role::Calm);
        run.ac(&calm, 0, "inject", OTHERS_AT, false);
        let wrong = run.wrong();
        assert!(wrong.contains(&format!("{calm} got the verdict inject")), "{wrong}");
        assert!(wrong.contains("verdicts {} counted, {\"inject\": 1} reported"), "{wrong}");
    }

    #[test]
    fn a_vm_must_do_what_its_role_is() {
        let aware = name_of(Role::Aware);
        let mut run = Run::of(&PLAN);
        run.events.retain(|(_, body)| !matches!(body, Body::Ac(ac) if ac.vm == aware));
        assert!(run.wrong().contains(&format!("{aware} never raised #AC")), "{}", run.wrong());

        let mut run = Run::of(&PLAN);
        let legacy = name_of(Role::Legacy);
        run.ac(&legacy, 0, "inject", OTHERS_AT, false);
        let count = member(Role::Legacy).vcpus;
        let expected =
            format!("{legacy}: {count} #AC by legacy alignment checking, {} are", count + 1);
        assert!(run.wrong().contains(&expected), "{}", run.wrong());

        let mut run = Run::of(&PLAN);
        run.ac(&aware, 0, "inject", OTHERS_AT, true);
        assert!(
            run.wrong().contains(&format!("{aware}: 1 #AC by legacy alignment checking, 0 are"))
        );
    }

    #[test]
    fn a_vm_must_end_as_planned() {
        let aware = name_of(Role::Aware);
        let mut run = Run::of(&PLAN);
        for (_, body) in &mut run.events {
            if let Body::VmEnd { vm, reason, status, .. } = body
                && *vm == aware
            {
                (*reason, *status) = ("exit".to_owned(), Some(67));
            }
        }
        assert_eq!(run.only_wrong(), format!("{aware} ended with exit 67, not load limit"));
        run.events.retain(|(_, body)| !matches!(body, Body::VmEnd { vm, .. } if *vm == aware));
        assert!(run.wrong().contains(&format!("{aware} did not end")));

        let mut run = Run::of(&PLAN);
        run.events.retain(|(_, body)| !matches!(body, Body::VcpuEnd { vcpu: 1, .. }));
        assert!(run.wrong().contains(&format!("vCPU 1 of {aware} has no end")));

        let mut run = Run::of(&PLAN);
        run.serial = format!("[calm-3] 1\r\n[{aware}] stress: FAILED value\r\n");
        assert_eq!(run.only_wrong(), format!("[{aware}] stress: FAILED value"));
    }

    #[test]
    fn counters_must_agree() {
        let wrong = |change: fn(&mut Counters)| {
            let mut run = Run::of(&PLAN);
            change(run.counters(Role::Unaware, 1));
            run.wrong()
        };
        let warned = wrong(|counters| *counters.split_locks.get_mut("warn").unwrap() = 2);
        assert!(warned.contains("verdicts {\"warn\": 2} counted, {\"warn\": 1}"), "{warned}");
        let written = wrong(|counters| counters.real_bit_writes = 3);
        assert!(written.contains("3 real-bit writes counted, 1 reported"), "{written}");
        assert!(wrong(|counters| counters.loads = 0).contains("never ran"));
        let exits = wrong(|counters| *counters.exits.get_mut("cpuid").unwrap() = 3);
        assert!(exits.contains("those of its vCPUs sum up to"), "{exits}");

        let mut run = Run::of(&PLAN);
        let Some((_, Body::Shutdown { counters })) = run.events.last_mut() else { panic!() };
        counters.vms = 3;
        assert!(run.only_wrong().contains("VMs: 3 in total, but the VMs sum up to 4"));
    }

    #[test]
    fn too_little_of_it_is_wrong() {
        let much = Plan { loads: 1_000_000, ..PLAN };
        let wrong = Run::of(&PLAN).examine(&much).wrong.join("\n");
        assert!(wrong.contains("loads, of 1000000"), "{wrong}");
        assert!(wrong.contains("migrations, 100000 at least"), "{wrong}");

        let mut run = Run::of(&PLAN);
        for (_, body) in &mut run.events {
            match body {
                Body::VcpuEnd { counters, .. } | Body::VmEnd { counters, .. } => {
                    counters.migrations = 0;
                }
                Body::Shutdown { counters } => counters.migrations = 0,
                _ => {}
            }
        }
        assert!(run.only_wrong().contains("0 migrations, 10 at least"));
        let of_cpus = |cpus: u32| Plan { cpus: cpus.into(), ..PLAN };
        assert!(!run.examine(&of_cpus(1)).wrong.join("\n").contains("migrations"));
        let roomy = run.examine(&of_cpus(64)).wrong.join("\n");
        assert!(roomy.contains("0 migrations, 1 at least"), "{roomy}");
    }

    #[test]
    fn every_cpu_must_take_part() {
        let mut run = Run::of(&PLAN);
        for (_, body) in &mut run.events {
            match body {
                Body::Boot { cpus, .. } => *cpus = 1,
                Body::CpuOnline { apic_id: 1, .. } => {
                    *body = Body::CpuRefused { apic_id: 1, why: "no VMX".to_owned() };
                }
                _ => {}
            }
        }
        let expected = [
            "the hypervisor uses 1 CPUs of 2",
            "the CPU with APIC ID 1 was refused: no VMX",
            "1 CPUs came online, of 2",
        ];
        assert_eq!(run.examine(&PLAN).wrong, expected);
    }

    #[test]
    fn violations_and_lost_events_are_wrong() {
        let mut run = Run::of(&PLAN);
        run.events.insert(3, (1, Body::Violation { what: "flag and bit differ".to_owned() }));
        assert!(run.only_wrong().contains("flag and bit differ"));
        assert_eq!(run.examine(&PLAN).violations, 1);

        let mut outcome = Run::of(&PLAN).outcome();
        outcome.events.remove(2);
        let report = examine(&PLAN, &outcome, &|rip| rip == DETECTED_AT);
        assert!(report.wrong[0].contains("CPU 1: event 0 is missing"), "{report}");
    }

    #[test]
    fn fairness_is_jains_index_and_the_smallest_share() {
        assert_eq!(Fairness::of(&[]), None);
        assert_eq!(Fairness::of(&[0.0]), None);
        let all = Fairness { vcpus: 3, jain: 1.0, smallest_percent: 100.0 };
        assert_eq!(Fairness::of(&[7.0, 7.0, 7.0]), Some(all));
        let one = Fairness { vcpus: 4, jain: 0.25, smallest_percent: 0.0 };
        assert_eq!(Fairness::of(&[0.0, 0.0, 9.0, 0.0]), Some(one));
        let half = Fairness::of(&[1.0, 3.0]).unwrap();
        assert_eq!((half.jain, half.smallest_percent), (0.8, 50.0));
    }

    #[test]
    fn a_starving_vcpu_is_wrong_and_a_sleeping_one_is_not() {
        let mut run = Run::of(&PLAN);
        run.counters(Role::Calm, 0).ticks = 10;
        assert!(run.wrong().contains("less than 33 % of its share"));
        run.counters(Role::Calm, 0).exits.insert("hlt".to_owned(), 2);
        assert!(!run.wrong().contains("share"));
    }
}
