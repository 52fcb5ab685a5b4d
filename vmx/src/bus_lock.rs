//! Bus-lock VM exits: the CPU tells of a bus lock that a guest has taken, where it cannot stop one.
//!
//! The exit comes after the instruction, like a trap: nothing is ever kept from happening, and RIP is
//! that of the next instruction. Another exit that comes at the same time goes before; bit 26 of
//! its reason then says that there was a bus lock as well. Any bus lock counts: also one that locks
//! memory which is not write-back.
//!
//! Source: SDM volume 3, sections "Secondary Processor-Based VM-Execution Controls", "Basic VM-Exit
//! Information" and "Bus-Lock Detection"; KVM treats them in the same way.

use sld::{PerSecond, Policy, SldMode, VmPolicy};

use crate::capability::Capabilities;
use crate::controls::Secondary;

/// Whether a vCPU's bus locks are to exit: where split locks cannot be stopped, and somebody wants to
/// know of them.
pub fn wanted(vm: VmPolicy, caps: &Capabilities) -> bool {
    let interest = vm.policy().mode() != SldMode::Off;
    interest && !vm.detected() && caps.has_secondary(Secondary::BUS_LOCK_DETECTION)
}

/// How many bus locks a second a vCPU may take before it has to wait, if what it takes is known by such
/// exits only. With detection, split locks are limited before they happen.
pub fn limit(vm: VmPolicy) -> Option<PerSecond> {
    match vm.policy() {
        Policy::RateLimit(limit) if !vm.detected() => Some(limit),
        _ => None,
    }
}

/// Whether a host with these capabilities can do anything for this policy: a limit wants to be told of
/// split locks in one way or the other. (The other policies are without effect on a VM that nothing
/// detects, which the log says at the boot.)
pub fn can_limit(vm: VmPolicy, caps: &Capabilities) -> bool {
    limit(vm).is_none() || caps.has_secondary(Secondary::BUS_LOCK_DETECTION)
}

#[cfg(test)]
mod tests {
    use sld::Host;

    use super::*;

    /// A CPU with these secondary controls.
    fn caps(secondary: Secondary) -> Capabilities {
        let read = |msr| -> Result<u64, ()> {
            Ok(match msr {
                0x48b => u64::from(secondary.bits()) << 32,
                _ => u64::MAX << 32,
            })
        };
        Capabilities::read(read).unwrap()
    }

    fn vm(policy: &str, enforced: SldMode) -> VmPolicy {
        let configured: Policy = policy.parse().unwrap();
        VmPolicy::new(Host { configured, enforced }, None, false).unwrap()
    }

    #[test]
    fn only_where_enumerated_and_nothing_better_is_there() {
        let (with, without) = (caps(Secondary::BUS_LOCK_DETECTION), caps(Secondary::empty()));
        for (policy, wants) in [
            ("off", false),
            ("warn", true),
            ("step", true),
            ("emulate", true),
            ("ratelimit=3", true),
            ("fatal", true),
        ] {
            let undetected = vm(policy, SldMode::Off);
            assert_eq!(wanted(undetected, &with), wants, "{policy}");
            assert!(!wanted(undetected, &without), "{policy}");
            let enforced = undetected.policy().mode();
            if enforced != SldMode::Off {
                assert!(!wanted(vm(policy, enforced), &with), "{policy}");
            }
        }
    }

    #[test]
    fn a_limit_needs_a_source() {
        let (with, without) = (caps(Secondary::BUS_LOCK_DETECTION), caps(Secondary::empty()));
        let three = PerSecond::new(3);
        assert_eq!(limit(vm("ratelimit=3", SldMode::Off)), three);
        assert_eq!(limit(vm("ratelimit=3", SldMode::Warn)), None);
        assert_eq!(limit(vm("step", SldMode::Off)), None);
        assert!(can_limit(vm("ratelimit=3", SldMode::Off), &with));
        assert!(!can_limit(vm("ratelimit=3", SldMode::Off), &without));
        assert!(can_limit(vm("ratelimit=3", SldMode::Warn), &without));
        assert!(can_limit(vm("warn", SldMode::Off), &without));
    }
}
