//! What a run says about itself: the hypervisor's events and the shim's ground truth, one JSON object
//! a line each.
//!
//! Fields and events that this reader does not know are passed over, so that an older reader serves a
//! newer hypervisor. A known event without one of its fields is an error.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result};
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

/// An event with its common fields.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Event {
    /// Number of the event, from 0, without gaps.
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
        /// How it was booted.
        firmware: String,
    },
    /// A VM starts.
    VmStart {
        /// Its name.
        vm: String,
        /// What is done about its split locks.
        policy: String,
        /// Whether it is shown the feature.
        exposed: bool,
        /// Number of its vCPUs.
        vcpus: u32,
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
        /// The bit.
        on: bool,
        /// The reason.
        why: String,
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
        /// Its counters.
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
    /// Everything ended in order.
    Shutdown {
        /// Totals, and per vCPU.
        #[serde(default)]
        counters: Value,
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
    /// Guest RIP of the instruction.
    pub rip: Address,
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
}

/// A VM's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// VM exits by reason.
    pub exits: BTreeMap<String, u64>,
    /// Split locks by verdict.
    pub split_locks: BTreeMap<String, u64>,
    /// Writes of the real bit.
    pub real_bit_writes: u64,
}

impl Event {
    /// The VM that the event is about.
    pub fn vm(&self) -> Option<&str> {
        match &self.body {
            Body::VmStart { vm, .. }
            | Body::Ac(Ac { vm, .. })
            | Body::TestCtrlWrite { vm, .. }
            | Body::VmEnd { vm, .. }
            | Body::VmRefused { vm, .. } => Some(vm),
            Body::RealBit { vm, .. } => vm.as_deref(),
            _ => None,
        }
    }
}

/// A 64-bit number written `"0x…"`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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

    const AC: &str = r#"{"seq":4,"tsc":99,"cpu":1,"event":"ac","vm":"a","vcpu":0,"rip":"0x201000","cpl":3,"am":false,"ac":true,"virtual_bit":false,"legacy":false,"verdict":"warn","bytes":"f0830001"}"#;

    #[test]
    fn an_ac_event_is_read() {
        let events: Vec<Event> = parse_lines(&format!("{AC}\n")).unwrap();
        let [Event { seq: 4, tsc: 99, cpu: 1, body: Body::Ac(ac) }] = events.as_slice() else {
            panic!("{events:?}");
        };
        assert_eq!((ac.rip, ac.cpl, ac.am, ac.ac), (Address(0x20_1000), 3, false, true));
        assert_eq!((ac.legacy, ac.verdict.as_str()), (false, "warn"));
        assert_eq!(events[0].vm(), Some("a"));
    }

    #[test]
    fn all_kinds_are_read() {
        let lines = r#"
            {"seq":0,"tsc":1,"cpu":0,"event":"boot","version":"0.1.0","cpus":1,"sld":"warn","sld_source":"msr","firmware":"bios"}
            {"seq":1,"tsc":2,"cpu":0,"event":"vm-start","vm":"a","policy":"warn","exposed":false,"vcpus":1,"memory_bytes":8388608}
            {"seq":2,"tsc":3,"cpu":0,"event":"test-ctrl-write","vm":"a","vcpu":0,"value":"0x20000000","result":"stored"}
            {"seq":3,"tsc":4,"cpu":0,"event":"real-bit","on":true,"why":"boot"}
            {"seq":4,"tsc":5,"cpu":0,"event":"vm-end","vm":"a","reason":"exit","status":33,"counters":{"exits":{"hlt":2},"split_locks":{"warn":1},"real_bit_writes":1}}
            {"seq":5,"tsc":6,"cpu":0,"event":"vm-end","vm":"b","reason":"triple fault"}
            {"seq":6,"tsc":7,"cpu":0,"event":"vm-refused","vm":"c","why":"no"}
            {"seq":7,"tsc":8,"cpu":0,"event":"refused","why":"no VT-x"}
            {"seq":8,"tsc":9,"cpu":0,"event":"panic","message":"oh"}
            {"seq":9,"tsc":10,"cpu":0,"event":"shutdown","counters":{"exits":{"hlt":2}}}
        "#;
        let events: Vec<Event> = parse_lines(lines).unwrap();
        assert_eq!(events.len(), 10);
        assert!(events.iter().all(|event| event.body != Body::Other));
        let Body::VmEnd { status, counters, .. } = &events[4].body else { panic!() };
        assert_eq!((*status, counters.split_locks["warn"]), (Some(33), 1));
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
