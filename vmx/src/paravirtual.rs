//! What the hypervisor tells a guest about its split locks: CPUID leaf 0x4000_0001. The layout stands in
//! `docs/guest-view.md`; bits that have a meaning keep it, all others are 0.

use raw_cpuid::CpuIdResult;
use sld::{Policy, VmPolicy};

use crate::bus_lock;
use crate::capability::Capabilities;

/// The leaf.
pub const LEAF: u32 = 0x4000_0001;

/// EAX bit 0: split-lock detection is offered, by CPUID.(7,0):EDX\[30\].
const OFFERED: u32 = 1 << 0;
/// EAX bit 1: a split lock ends the VM though the guest's own bit 29 is clear.
const FORCED: u32 = 1 << 1;
/// EAX bits 7:4: how split locks are noticed.
const SOURCE_SHIFT: u32 = 4;
/// EAX bits 11:8: what happens to those that the guest has not asked an #AC for.
const TREATMENT_SHIFT: u32 = 8;

/// How a VM's split locks are noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Source {
    /// They are not.
    None = 0,
    /// The CPU stops them: bit 29 of its MSR 0x33.
    Msr = 1,
    /// The hypervisor looks at each instruction.
    Trace = 2,
    /// The CPU tells of bus locks that were taken.
    BusLockExits = 3,
}

impl Source {
    /// That of a VM whose split locks are detected there, on CPUs with these capabilities.
    pub fn of(detected: sld::Source, vm: VmPolicy, caps: &Capabilities) -> Self {
        match detected {
            sld::Source::Trace if vm.detected() => Self::Trace,
            sld::Source::Auto | sld::Source::Msr if vm.detected() => Self::Msr,
            _ if bus_lock::wanted(vm, caps) => Self::BusLockExits,
            // Also where the host has detection off.
            _ => Self::None,
        }
    }
}

/// What happens to a split lock that the guest has not asked an #AC for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Treatment {
    /// It takes the bus, and nobody is told.
    Off = 0,
    /// The same, after the first one was reported.
    Warned = 1,
    /// It takes the bus, alone and counted.
    Stepped = 2,
    /// The hypervisor carries it out; it takes no bus.
    Emulated = 3,
    /// It takes the bus, so many times a second.
    Limited = 4,
    /// It ends the VM.
    Fatal = 5,
}

/// The leaf as it is now: the policy may change while the VM runs.
pub fn answer(vm: VmPolicy, source: Source) -> CpuIdResult {
    let stops = matches!(source, Source::Msr | Source::Trace);
    let (treatment, limit) = match vm.policy() {
        Policy::RateLimit(limit) if source != Source::None => {
            (Treatment::Limited, u32::from(limit.get()))
        }
        // What can only be told afterwards is not treated otherwise.
        _ if !stops => (Treatment::Off, 0),
        Policy::Off | Policy::RateLimit(_) => (Treatment::Off, 0),
        Policy::Warn => (Treatment::Warned, 0),
        Policy::Step => (Treatment::Stepped, 0),
        Policy::Emulate => (Treatment::Emulated, 0),
        Policy::Fatal => (Treatment::Fatal, 0),
    };
    let mut eax = (source as u32) << SOURCE_SHIFT | (treatment as u32) << TREATMENT_SHIFT;
    if vm.exposed() {
        eax |= OFFERED;
    }
    if treatment == Treatment::Fatal {
        eax |= FORCED;
    }
    CpuIdResult { eax, ebx: limit, ecx: 0, edx: 0 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use sld::{Host, SldMode};

    use super::*;

    const DOCUMENT: &str = include_str!("../../docs/guest-view.md");

    fn vm(policy: &str, detected: bool, expose: bool) -> VmPolicy {
        let configured: Policy = policy.parse().unwrap();
        let enforced = if detected { configured.mode() } else { SldMode::Off };
        VmPolicy::new(Host { configured, enforced }, None, expose).unwrap()
    }

    /// EAX and EBX.
    fn told(vm: VmPolicy, source: Source) -> (u32, u32) {
        let CpuIdResult { eax, ebx, ecx, edx } = answer(vm, source);
        assert_eq!((ecx, edx, eax & !0xff3), (0, 0, 0), "{eax:#x}");
        (eax, ebx)
    }

    #[test]
    fn every_policy_is_told() {
        for (policy, eax, limit) in [
            ("warn", 0x110, 0),
            ("step", 0x210, 0),
            ("emulate", 0x310, 0),
            ("ratelimit=7", 0x410, 7),
            ("fatal", 0x512, 0),
        ] {
            assert_eq!(told(vm(policy, true, false), Source::Msr), (eax, limit), "{policy}");
            assert_eq!(told(vm(policy, true, true), Source::Msr), (eax | 1, limit), "{policy}");
        }
        // A VM of its own policy in a host that detects.
        let host = Host { configured: Policy::Warn, enforced: SldMode::Warn };
        let off = VmPolicy::new(host, Some(Policy::Off), true).unwrap();
        assert_eq!(told(off, Source::Msr), (0x011, 0));
        assert_eq!(told(off.with(Policy::Emulate).unwrap(), Source::Msr), (0x311, 0));
    }

    #[test]
    fn nothing_is_claimed_that_cannot_be_done() {
        for policy in ["off", "warn", "step", "emulate", "fatal"] {
            assert_eq!(told(vm(policy, false, true), Source::None), (0, 0), "{policy}");
            assert_eq!(told(vm(policy, false, true), Source::BusLockExits), (0x030, 0));
        }
        // Wherever it is detected.
        let caps = Capabilities::read(|_| Ok::<_, ()>(u64::MAX << 32)).unwrap();
        for (detected, source) in [
            (sld::Source::Msr, Source::Msr),
            (sld::Source::Trace, Source::Trace),
            (sld::Source::None, Source::BusLockExits),
        ] {
            let warned = vm("warn", source != Source::BusLockExits, false);
            assert_eq!(Source::of(detected, warned, &caps), source);
            assert_eq!(Source::of(detected, vm("off", false, true), &caps), Source::None);
        }
        let limited = vm("ratelimit=9", false, false);
        assert_eq!(told(limited, Source::None), (0, 0));
        assert_eq!(told(limited, Source::BusLockExits), (0x430, 9));
    }

    /// The document's tables of numbers: heading to number to the first word.
    #[test]
    fn the_document_has_these_numbers() {
        let section = DOCUMENT.split("### Split locks: leaf 0x40000001\n").nth(1).unwrap();
        let section = section.split("\n#").next().unwrap();
        let rows: BTreeMap<&str, &str> = section
            .lines()
            .filter_map(|line| {
                let cells: Vec<&str> = line.split('|').map(str::trim).collect();
                matches!(cells.len(), 5).then(|| (cells[1], cells[2]))
            })
            .collect();
        for (bits, field) in [
            ("EAX 0", "offered"),
            ("EAX 1", "forced"),
            ("EAX 7:4", "source"),
            ("EAX 11:8", "treatment"),
            ("EBX", "limit"),
        ] {
            assert_eq!(rows.get(bits), Some(&field), "{bits}");
        }
        let numbers = |field: &str| -> Vec<String> {
            let row = section.lines().find(|line| line.contains(&format!("| {field} |"))).unwrap();
            let text = row.split('|').nth(3).unwrap();
            text.split("; ").map(|item| item.trim().split(':').next().unwrap().to_owned()).collect()
        };
        assert_eq!(numbers("source"), ["0 none", "1 MSR", "2 trace", "3 bus-lock exits"]);
        let treatments = ["0 off", "1 warned", "2 stepped", "3 emulated", "4 limited", "5 fatal"];
        assert_eq!(numbers("treatment"), treatments);
    }
}
