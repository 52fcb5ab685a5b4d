//! What a run says about itself: the hypervisor's events and the shim's ground truth, one JSON object
//! a line each.
//!
//! Fields and events that this reader does not know are passed over, so that an older reader serves a
//! newer hypervisor. A known event without one of its fields is an error.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Deserializer, de};

/// An event with its common fields.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Event {
    /// Number of the event on its CPU, from 0, without gaps, in the order in which things happened.
    pub seq: u64,
    /// Time-stamp counter of the CPU.
    pub tsc: u64,
    /// Host CPU.
    pub cpu: u32,
    /// What happened.
    #[serde(flatten)]
    pub body: Body,
}

/// The part of an event that its kind decides.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Body {
    /// The hypervisor is up.
    Boot {
        /// The hypervisor's version.
        version: String,
        /// CPUs in use.
        cpus: u32,
        /// The host's mode.
        sld: String,
        /// How split locks are found: `msr`, `trace` or `none`.
        sld_source: String,
        /// Ticks of the time-stamp counter in a second, where the CPU says so.
        #[serde(default)]
        ticks_per_second: Option<u64>,
        /// How it was booted.
        firmware: String,
    },
    /// A CPU takes part.
    CpuOnline {
        /// Its APIC ID.
        apic_id: u32,
        /// The core that it is a thread of.
        core: u32,
    },
    /// A CPU does not take part; the others do.
    CpuRefused {
        /// Its APIC ID.
        apic_id: u32,
        /// What it lacks.
        why: String,
    },
    /// A VM starts.
    VmStart {
        /// Its name.
        vm: String,
        /// What is done about its split locks.
        policy: String,
        /// Where they are detected: `msr`, `trace` or `none`.
        #[serde(default)]
        source: String,
        /// Whether it is shown the feature.
        exposed: bool,
        /// Number of its vCPUs.
        vcpus: u32,
        /// Share of each of these.
        #[serde(default)]
        weight: u32,
        /// Bytes of its memory.
        memory_bytes: u64,
    },
    /// An `#AC` VM exit and the verdict.
    Ac(Ac),
    /// A guest wrote MSR 0x33.
    TestCtrlWrite {
        /// The VM.
        vm: String,
        /// The vCPU in it.
        vcpu: u32,
        /// What it wrote.
        value: Address,
        /// `stored`, `propagated` or `gp`.
        result: String,
    },
    /// Bit 29 of the CPU's own MSR 0x33 was written.
    RealBit {
        /// The VM on whose account, if it was on any's.
        #[serde(default)]
        vm: Option<String>,
        /// The vCPU in it.
        #[serde(default)]
        vcpu: Option<u32>,
        /// The bit.
        on: bool,
        /// The reason.
        why: String,
    },
    /// The bit was written by which the hypervisor traces a VM on this CPU.
    TraceBit {
        /// The VM on whose account, if it was on any's.
        #[serde(default)]
        vm: Option<String>,
        /// The vCPU in it.
        #[serde(default)]
        vcpu: Option<u32>,
        /// The bit.
        on: bool,
        /// The reason.
        why: String,
    },
    /// A VM has another policy, which is in force for this vCPU from now on.
    Policy {
        /// The VM.
        vm: String,
        /// The vCPU in it.
        vcpu: u32,
        /// What is done about its split locks.
        policy: String,
    },
    /// A vCPU was loaded, and its guest is about to run (with `schedule_events`).
    Load {
        /// The VM.
        vm: String,
        /// The vCPU in it.
        vcpu: u32,
        /// The flag of its task: detection is off for it.
        disabled: bool,
    },
    /// Its guest runs no more, and it is about to be put (with `schedule_events`).
    Put {
        /// The VM.
        vm: String,
        /// The vCPU in it.
        vcpu: u32,
        /// The flag of its task.
        disabled: bool,
    },
    /// Where a vCPU that is about to end split locks.
    Offender(Offender),
    /// A vCPU ended with its VM, which has its end later.
    VcpuEnd {
        /// The VM.
        vm: String,
        /// The vCPU in it.
        vcpu: u32,
        /// Its counters.
        counters: Counters,
    },
    /// A VM ended.
    VmEnd {
        /// Its name.
        vm: String,
        /// How.
        reason: String,
        /// With what, where it ended by itself.
        #[serde(default)]
        status: Option<u32>,
        /// The sums of its vCPUs' counters.
        #[serde(default)]
        counters: Counters,
    },
    /// A VM could not be started; the others run.
    VmRefused {
        /// Its name.
        vm: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// The hypervisor cannot run here.
    Refused {
        /// What is wrong and what to do.
        why: String,
    },
    /// The hypervisor failed.
    Panic {
        /// The panic message.
        message: String,
    },
    /// The hardware has failed; each bank that says how is an event.
    MachineCheck {
        /// The VM whose guest ran.
        #[serde(default)]
        vm: Option<String>,
        /// The bank, if one holds an error.
        #[serde(default)]
        bank: Option<u8>,
        /// Its status.
        #[serde(default)]
        status: Option<Address>,
        /// The address that it has to do with.
        #[serde(default)]
        address: Option<Address>,
        /// What was done: `go-on` or `end-vm`.
        verdict: String,
    },
    /// An invariant did not hold.
    Violation {
        /// Which, and how.
        what: String,
    },
    /// Everything ended in order.
    Shutdown {
        /// The sums of everything.
        #[serde(default)]
        counters: Totals,
    },
    /// An event that this reader does not know.
    #[serde(other)]
    Other,
}

/// An `#AC` VM exit and the verdict on it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Ac {
    /// The VM.
    pub vm: String,
    /// The vCPU in it.
    pub vcpu: u32,
    /// Who raised it: `msr` (the CPU) or `trace`.
    #[serde(default)]
    pub source: String,
    /// Guest RIP of the instruction.
    pub rip: Address,
    /// Guest CR3.
    #[serde(default)]
    pub cr3: Address,
    /// 16, 32 or 64: how code was executed there; 0 where that is not known.
    #[serde(default)]
    pub bits: u32,
    /// Guest privilege level.
    pub cpl: u8,
    /// Guest CR0.AM.
    pub am: bool,
    /// Guest EFLAGS.AC.
    pub ac: bool,
    /// Bit 29 as the guest has set it.
    pub virtual_bit: bool,
    /// Whether it may be an ordinary alignment check.
    pub legacy: bool,
    /// What was done.
    pub verdict: String,
    /// The instruction's bytes and those behind it.
    #[serde(default)]
    pub bytes: Bytes,
}

impl Ac {
    /// Whether it counts as a split lock: one that comes back is counted when something is done about it,
    /// and what may be an ordinary alignment check is none.
    pub fn is_counted(&self) -> bool {
        !self.legacy && !matches!(&*self.verdict, "again" | "throttle")
    }
}

/// An instruction of a guest that split locks.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Offender {
    /// The VM.
    pub vm: String,
    /// The vCPU in it.
    pub vcpu: u32,
    /// Guest RIP of the instruction.
    pub rip: Address,
    /// Guest CR3.
    pub cr3: Address,
    /// Guest privilege level, the first time.
    pub cpl: u8,
    /// 16, 32 or 64: how code was executed there.
    pub bits: u32,
    /// How often it is known to have split a lock.
    pub count: u64,
    /// It may have done so this much more often, at most.
    pub missed: u64,
    /// How often each thing was done about it.
    pub verdicts: BTreeMap<String, u64>,
    /// When it was first seen, and last (time-stamp counter).
    pub first: u64,
    /// See `first`.
    pub last: u64,
    /// The instruction's bytes and those behind it.
    pub bytes: Bytes,
}

/// Counters of a vCPU, or the sums of those of a VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// VM exits by reason.
    pub exits: BTreeMap<String, u64>,
    /// Split locks by verdict.
    pub split_locks: BTreeMap<String, u64>,
    /// Bus locks that bus-lock VM exits told of.
    pub bus_locks: u64,
    /// Writes of the real bit.
    pub real_bit_writes: u64,
    /// How often a CPU loaded it.
    pub loads: u64,
    /// How often that was another CPU than before.
    pub migrations: u64,
    /// Ticks of the time-stamp counter that it was on a CPU.
    pub ticks: u64,
}

/// Counters of a whole run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Totals {
    /// VMs that ran.
    pub vms: u64,
    /// VM exits.
    pub exits: u64,
    /// `#AC` that the guests got.
    pub inject: u64,
    /// Split locks that were warned of.
    pub warn: u64,
    /// Split locks that were let through, one instruction with detection off.
    pub step: u64,
    /// Split locks that ended a VM.
    pub kill: u64,
    /// NMIs that the hypervisor took.
    pub nmis: u64,
    /// Those of them that it has not sent.
    pub unknown_nmis: u64,
    /// Errors that the hardware has corrected.
    pub corrected_errors: u64,
    /// vCPU loads.
    pub loads: u64,
    /// Those on another CPU than before.
    pub migrations: u64,
    /// Invariants that did not hold.
    pub violations: u64,
}

impl Event {
    /// The VM that the event is about.
    pub fn vm(&self) -> Option<&str> {
        match &self.body {
            Body::VmStart { vm, .. }
            | Body::Ac(Ac { vm, .. })
            | Body::TestCtrlWrite { vm, .. }
            | Body::Policy { vm, .. }
            | Body::Load { vm, .. }
            | Body::Put { vm, .. }
            | Body::Offender(Offender { vm, .. })
            | Body::VcpuEnd { vm, .. }
            | Body::VmEnd { vm, .. }
            | Body::VmRefused { vm, .. } => Some(vm),
            Body::RealBit { vm, .. }
            | Body::TraceBit { vm, .. }
            | Body::MachineCheck { vm, .. } => vm.as_deref(),
            _ => None,
        }
    }
}

/// A 64-bit number written `"0x…"`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address(pub u64);

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.strip_prefix("0x")
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .map(Self)
            .ok_or_else(|| de::Error::custom(format!("{text:?} is not a number written 0x…")))
    }
}

/// Bytes written in hexadecimal, without anything between them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let byte = |pair: &[u8]| {
            let digit = |byte: &u8| char::from(*byte).to_digit(16);
            let [high, low] = pair else { return None };
            Some((digit(high)? << 4 | digit(low)?) as u8)
        };
        let bytes = text.as_bytes().chunks(2).map(byte).collect::<Option<_>>();
        bytes.map(Self).ok_or_else(|| de::Error::custom(format!("{text:?} is not hexadecimal")))
    }
}

/// A split lock as the machine saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Truth {
    /// Host CPU.
    pub cpu: u32,
    /// Instruction pointer of the instruction.
    pub rip: Address,
    /// Privilege level.
    pub cpl: u8,
    /// In a guest (VMX non-root operation) or not.
    pub vmx: bool,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of a split lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// `#AC` instead of the access.
    Faulted,
    /// The access happened, with a bus lock.
    Taken,
}

/// Puts the events of all CPUs into one order: those of a CPU always by their numbers, CPUs among each
/// other by the time-stamp counter (equal times by CPU).
pub fn in_order(mut events: Vec<Event>) -> Vec<Event> {
    events.sort_by_key(|event| (event.cpu, event.seq));
    // An event is not before an earlier one of its CPU, whatever the counter said. The sort is stable.
    let mut latest = BTreeMap::new();
    let time_of = |event: &Event| {
        let latest = latest.entry(event.cpu).or_insert(0);
        *latest = event.tsc.max(*latest);
        *latest
    };
    let times: Vec<u64> = events.iter().map(time_of).collect();
    let mut timed: Vec<_> = times.into_iter().zip(events).collect();
    timed.sort_by_key(|(time, _)| *time);
    timed.into_iter().map(|(_, event)| event).collect()
}

/// Checks that each CPU's events are numbered from 0 without gaps, in order.
///
/// # Errors
/// The first event that is not.
pub fn check_numbers(events: &[Event]) -> Result<()> {
    let mut next: BTreeMap<u32, u64> = BTreeMap::new();
    for Event { seq, cpu, body, .. } in events {
        let next = next.entry(*cpu).or_default();
        ensure!(seq == next, "CPU {cpu}: event {next} is missing before event {seq}, {body:?}");
        *next += 1;
    }
    Ok(())
}

/// Reads one JSON object a line. A last line without an end is one that the machine did not finish, and
/// is left out; empty lines are passed over.
///
/// # Errors
/// A line that is not what it should be, with its number.
pub fn parse_lines<T: de::DeserializeOwned>(text: &str) -> Result<Vec<T>> {
    text.split_inclusive('\n')
        .enumerate()
        .filter(|(_, line)| line.ends_with('\n') && !line.trim().is_empty())
        .map(|(index, line)| {
            let line = line.trim();
            serde_json::from_str(line).with_context(|| format!("line {}: {line}", index + 1))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const AC: &str = r#"{"seq":4,"tsc":99,"cpu":1,"event":"ac","vm":"a","vcpu":0,"source":"msr","rip":"0x201000","cpl":3,"am":false,"ac":true,"virtual_bit":false,"legacy":false,"verdict":"warn","bytes":"f0830001"}"#;

    #[test]
    fn an_ac_event_is_read() {
        let events: Vec<Event> = parse_lines(&format!("{AC}\n")).unwrap();
        let [Event { seq: 4, tsc: 99, cpu: 1, body: Body::Ac(ac) }] = events.as_slice() else {
            panic!("{events:?}");
        };
        assert_eq!((ac.rip, ac.cpl, ac.am, ac.ac), (Address(0x20_1000), 3, false, true));
        assert_eq!((ac.legacy, ac.verdict.as_str()), (false, "warn"));
        assert_eq!((ac.bytes.0.as_slice(), ac.bits), (&[0xf0, 0x83, 0, 1][..], 0));
        for bad in ["f0830", "f083xx", "é"] {
            assert!(parse_lines::<Event>(&format!("{AC}\n").replace("f0830001", bad)).is_err());
        }
        assert_eq!(events[0].vm(), Some("a"));
    }

    #[test]
    fn all_kinds_are_read() {
        let lines = r#"
            {"seq":0,"tsc":1,"cpu":0,"event":"boot","version":"0.1.0","cpus":1,"sld":"warn","sld_source":"msr","ticks_per_second":9,"firmware":"bios"}
            {"seq":1,"tsc":2,"cpu":0,"event":"vm-start","vm":"a","policy":"warn","source":"msr","exposed":false,"vcpus":1,"memory_bytes":8388608}
            {"seq":2,"tsc":3,"cpu":0,"event":"test-ctrl-write","vm":"a","vcpu":0,"value":"0x20000000","result":"stored"}
            {"seq":3,"tsc":4,"cpu":0,"event":"real-bit","on":true,"why":"boot"}
            {"seq":4,"tsc":5,"cpu":0,"event":"vm-end","vm":"a","reason":"exit","status":33,"counters":{"exits":{"hlt":2},"split_locks":{"warn":1},"real_bit_writes":1}}
            {"seq":5,"tsc":6,"cpu":0,"event":"vm-end","vm":"b","reason":"triple fault"}
            {"seq":6,"tsc":7,"cpu":0,"event":"vm-refused","vm":"c","why":"no"}
            {"seq":7,"tsc":8,"cpu":0,"event":"refused","why":"no VT-x"}
            {"seq":8,"tsc":9,"cpu":0,"event":"panic","message":"oh"}
            {"seq":9,"tsc":10,"cpu":0,"event":"cpu-online","apic_id":3,"core":1}
            {"seq":10,"tsc":10,"cpu":0,"event":"cpu-refused","apic_id":4,"why":"no VMX"}
            {"seq":11,"tsc":10,"cpu":0,"event":"vcpu-end","vm":"a","vcpu":1,"counters":{"exits":{"hlt":2},"split_locks":{"inject":0,"warn":1,"step":2,"kill":0},"real_bit_writes":1,"loads":5,"migrations":4,"ticks":99}}
            {"seq":12,"tsc":10,"cpu":0,"event":"violation","what":"flag and bit differ"}
            {"seq":14,"tsc":10,"cpu":0,"event":"policy","vm":"a","vcpu":1,"policy":"ratelimit=5"}
            {"seq":15,"tsc":10,"cpu":0,"event":"load","vm":"a","vcpu":1,"disabled":false}
            {"seq":16,"tsc":10,"cpu":0,"event":"put","vm":"a","vcpu":1,"disabled":true}
            {"seq":17,"tsc":10,"cpu":0,"event":"offender","vm":"a","vcpu":1,"rip":"0x7","cr3":"0x1000","cpl":3,"bits":64,"count":2,"missed":1,"verdicts":{"inject":0,"step":2,"again":3},"first":4,"last":5,"bytes":"f08300ff"}
            {"seq":13,"tsc":10,"cpu":0,"event":"shutdown","counters":{"vms":2,"exits":9,"inject":1,"warn":1,"step":1,"kill":1,"nmis":3,"loads":5,"migrations":4,"violations":1}}
        "#;
        let events: Vec<Event> = parse_lines(lines).unwrap();
        assert_eq!(events.len(), 18);
        assert!(events.iter().all(|event| event.body != Body::Other));
        let Body::VmEnd { status, counters, .. } = &events[4].body else { panic!() };
        assert_eq!((*status, counters.split_locks["warn"]), (Some(33), 1));
        assert_eq!(events[9].body, Body::CpuOnline { apic_id: 3, core: 1 });
        let Body::VcpuEnd { vcpu: 1, counters, .. } = &events[11].body else { panic!() };
        assert_eq!((counters.split_locks["step"], counters.ticks), (2, 99));
        let Body::Policy { vcpu: 1, policy, .. } = &events[13].body else { panic!() };
        assert_eq!(policy, "ratelimit=5");
        let [Body::Load { disabled: false, .. }, Body::Put { disabled: true, .. }] =
            [&events[14].body, &events[15].body]
        else {
            panic!()
        };
        let Body::Offender(offender) = &events[16].body else { panic!() };
        assert_eq!((offender.cr3, offender.count, offender.missed), (Address(0x1000), 2, 1));
        assert_eq!(
            (&offender.bytes.0[..], offender.verdicts["again"]),
            (&[0xf0, 0x83, 0, 0xff][..], 3)
        );
        let Body::Shutdown { counters } = &events[17].body else { panic!() };
        assert_eq!((counters.nmis, counters.migrations, counters.violations), (3, 4, 1));
    }

    fn event(cpu: u32, seq: u64, tsc: u64) -> Event {
        Event { seq, tsc, cpu, body: Body::Other }
    }

    fn numbers(events: &[Event]) -> Vec<(u32, u64)> {
        events.iter().map(|event| (event.cpu, event.seq)).collect()
    }

    #[test]
    fn events_of_several_cpus_are_put_in_order() {
        let written = vec![
            event(1, 1, 30),
            event(0, 0, 10),
            event(0, 1, 30),
            event(1, 0, 20),
            event(0, 2, 40),
        ];
        let expected = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)];
        assert_eq!(numbers(&in_order(written)), expected);
        // The counter goes back on CPU 0: its numbers say what came first.
        let back = vec![event(0, 0, 50), event(0, 1, 20), event(1, 0, 30), event(1, 1, 60)];
        assert_eq!(numbers(&in_order(back)), [(1, 0), (0, 0), (0, 1), (1, 1)]);
    }

    #[test]
    fn events_that_are_lost_or_twice_there_are_noticed() {
        let all = [event(0, 0, 1), event(1, 0, 2), event(0, 1, 3), event(1, 1, 4)];
        assert!(check_numbers(&all).is_ok());
        assert!(check_numbers(&[]).is_ok());
        let why = check_numbers(&[&all[..2], &all[3..], &[event(0, 2, 5)]].concat()).unwrap_err();
        assert!(why.to_string().contains("CPU 0: event 1 is missing before event 2"), "{why}");
        assert!(check_numbers(&all[1..]).is_err());
        assert!(check_numbers(&[&all[..], &all[3..]].concat()).is_err());
    }

    #[test]
    fn unknown_events_and_fields_are_passed_over() {
        let line = r#"{"seq":0,"tsc":1,"cpu":0,"event":"party","guests":["x"],"deep":{"a":[1]}}"#;
        let events: Vec<Event> = parse_lines(&format!("{line}\n")).unwrap();
        assert_eq!(events[0].body, Body::Other);
    }

    #[test]
    fn a_bad_line_is_an_error_with_its_number_but_an_unfinished_one_is_not() {
        let error = parse_lines::<Event>(&format!("{AC}\nnonsense\n")).unwrap_err();
        assert_eq!(error.to_string(), "line 2: nonsense");
        let missing = r#"{"seq":0,"tsc":1,"cpu":0,"event":"real-bit","on":true}"#;
        let error = parse_lines::<Event>(&format!("{missing}\n")).unwrap_err();
        assert!(format!("{error:#}").contains("why"), "{error:#}");
        assert_eq!(parse_lines::<Event>(&format!("{AC}\n\n{{\"seq\":5,\"ts")).unwrap().len(), 1);
    }

    #[test]
    fn truth_lines_are_read() {
        let line = r#"{"cpu":0,"rip":"0x7c3f","cpl":0,"vmx":true,"outcome":"faulted"}"#;
        let truth: Vec<Truth> = parse_lines(&format!("{line}\n")).unwrap();
        let expected =
            Truth { cpu: 0, rip: Address(0x7c3f), cpl: 0, vmx: true, outcome: Outcome::Faulted };
        assert_eq!(truth, [expected]);
        assert!(parse_lines::<Truth>(&line.replace("faulted", "lost").add_end()).is_err());
        assert!(parse_lines::<Truth>(&line.replace("0x", "").add_end()).is_err());
    }

    trait AddEnd {
        fn add_end(&self) -> String;
    }

    impl AddEnd for str {
        fn add_end(&self) -> String {
            format!("{self}\n")
        }
    }
}
