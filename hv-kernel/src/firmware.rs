//! What firmware leaves in a CPU's registers, and what the hypervisor makes of it. Only the decisions:
//! [`crate::x86`] carries them out.

use sld::MsrFault;

/// IA32_FEATURE_CONTROL: the value is locked until reset.
const LOCKED: u64 = 1 << 0;
/// IA32_FEATURE_CONTROL: VMXON is allowed in SMX operation, where only measured launches (TXT) get.
const VMX_IN_SMX: u64 = 1 << 1;
/// IA32_FEATURE_CONTROL: VMXON is allowed outside SMX operation.
const VMX_OUTSIDE_SMX: u64 = 1 << 2;

/// What IA32_FEATURE_CONTROL makes of VMX: SDM volume 3, section "Enabling and Entering VMX Operation".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmxLock {
    /// It can be used.
    On,
    /// The firmware has left it open: with this value it can be used.
    Open(u64),
    /// It is off until reset.
    Off,
    /// It is off until reset, but for TXT.
    OnlyInSmx,
}

impl VmxLock {
    /// What this value of the MSR means.
    pub const fn of(control: u64) -> Self {
        if control & LOCKED == 0 {
            Self::Open(control | LOCKED | VMX_OUTSIDE_SMX)
        } else if control & VMX_OUTSIDE_SMX != 0 {
            Self::On
        } else if control & VMX_IN_SMX != 0 {
            Self::OnlyInSmx
        } else {
            Self::Off
        }
    }
}

/// IA32_APIC_BASE: the APIC is on.
pub const APIC_ENABLED: u64 = 1 << 11;
/// IA32_APIC_BASE: x2APIC mode.
pub const APIC_X2APIC: u64 = 1 << 10;

/// What is to be written to IA32_APIC_BASE, one value after the other, so that the local APIC is on,
/// in x2APIC mode where there is one.
///
/// Every step is one that SDM volume 3, section "x2APIC State Transitions", has: from off, x2APIC mode
/// is reached through xAPIC mode. A CPU that is in x2APIC mode stays there, whatever CPUID says: it
/// could only go back through off, and not at all where the firmware has locked xAPIC mode out
/// (IA32_XAPIC_DISABLE_STATUS). INIT does not change the mode.
pub const fn apic_steps(base: u64, has_x2apic: bool) -> [Option<u64>; 2] {
    let on = base & APIC_ENABLED != 0;
    if on && base & APIC_X2APIC != 0 {
        return [None, None];
    }
    let xapic = base & !APIC_X2APIC | APIC_ENABLED;
    let first = if on { None } else { Some(xapic) };
    [first, if has_x2apic { Some(xapic | APIC_X2APIC) } else { None }]
}

/// CR0 in the hypervisor: PE, MP, ET, NE, WP, PG. No EM, TS and AM; the caches are on.
pub const CR0: u64 = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
/// CR0.CD.
pub const CR0_CD: u64 = 1 << 30;
/// CR4: five-level paging. It cannot change in 64-bit mode, so all CPUs have it as the loader has it.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4.OSXSAVE.
const CR4_OSXSAVE: u64 = 1 << 18;
/// CR4 in the hypervisor: PAE, MCE, OSFXSR, OSXMMEXCPT.
const CR4: u64 = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10;
/// EFER in the hypervisor: LME, LMA, NXE.
pub const EFER: u64 = 1 << 8 | 1 << 10 | 1 << 11;
/// DR7 with nothing on.
pub const DR7: u64 = 0x400;
/// IA32_PAT in the hypervisor: as after reset, but that entry 1 (PWT) is write-combining, for
/// framebuffers.
pub const PAT: u64 = 0x0007_0406_0007_0106;
/// IA32_MISC_ENABLE: no CPUID leaves above 3.
pub const MISC_LIMIT_CPUID: u64 = 1 << 22;

/// CR4 in the hypervisor, where the loader has left `found`. What firmware may have on is off: PGE,
/// PCIDE, SMEP, SMAP, CET, protection keys.
pub const fn cr4(found: u64, has_xsave: bool) -> u64 {
    CR4 | found & CR4_LA57 | if has_xsave { CR4_OSXSAVE } else { 0 }
}

/// Where split-lock detection is missed, and CPUID and IA32_CORE_CAPABILITIES (0xCF) do not tell the
/// same: what was found. `announced` is CPUID's word, `capabilities` the MSR.
///
/// Microcode updates can hide the MSR or take the announcement back.
pub fn hidden_detection(
    announced: bool,
    capabilities: Result<u64, MsrFault>,
) -> Option<&'static str> {
    let detects = |value| value & sld::CORE_CAPABILITIES_SPLIT_LOCK != 0;
    match (announced, capabilities) {
        (true, Err(MsrFault)) => Some(
            "CPUID announces IA32_CORE_CAPABILITIES but reading it faults: microcode or a hypervisor \
             hides it; treated as without detection",
        ),
        (true, Ok(value)) if !detects(value) => {
            Some("IA32_CORE_CAPABILITIES says that the CPU has no split-lock detection: bit 5 is 0")
        }
        (false, Ok(value)) if detects(value) => Some(
            "IA32_CORE_CAPABILITIES tells of split-lock detection, but CPUID does not announce that \
             MSR: microcode has taken it back; treated as without detection",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vmx_is_used_where_the_lock_lets_it() {
        for other in [0, 1 << 15, 1 << 18 | 1 << 20, !7] {
            let of = |bits| VmxLock::of(other | bits);
            // Lock, inside SMX, outside SMX.
            assert_eq!(of(0b000), VmxLock::Open(other | 0b101));
            assert_eq!(of(0b010), VmxLock::Open(other | 0b111));
            assert_eq!(of(0b100), VmxLock::Open(other | 0b101));
            assert_eq!(of(0b110), VmxLock::Open(other | 0b111));
            assert_eq!(of(0b001), VmxLock::Off);
            assert_eq!(of(0b011), VmxLock::OnlyInSmx);
            assert_eq!(of(0b101), VmxLock::On);
            assert_eq!(of(0b111), VmxLock::On);
            // What is written locks it on.
            if let VmxLock::Open(value) = of(0) {
                assert_eq!(VmxLock::of(value), VmxLock::On);
            }
        }
    }

    #[test]
    fn apics_take_the_steps_of_the_manual() {
        const BASE: u64 = 0xfee0_0100;
        let steps = |bits, has_x2apic| apic_steps(BASE | bits, has_x2apic);
        let (on, both) = (Some(BASE | APIC_ENABLED), Some(BASE | APIC_ENABLED | APIC_X2APIC));
        // Off; on; x2APIC.
        assert_eq!(steps(0, false), [on, None]);
        assert_eq!(steps(0, true), [on, both]);
        assert_eq!(steps(APIC_ENABLED, false), [None, None]);
        assert_eq!(steps(APIC_ENABLED, true), [None, both]);
        for has_x2apic in [false, true] {
            assert_eq!(steps(APIC_ENABLED | APIC_X2APIC, has_x2apic), [None, None]);
        }
        // Off with the mode left over, which no CPU shows: no step that would fault.
        assert_eq!(steps(APIC_X2APIC, true), [on, both]);
    }

    #[test]
    fn nothing_but_five_level_paging_is_taken_over() {
        for found in [0, !0, 0x37_06f8, 1 << 23 | 1 << 17 | 1 << 7] {
            let la57 = found & 1 << 12;
            assert_eq!(cr4(found, false), 0x660 | la57);
            assert_eq!(cr4(found, true), 0x4_0660 | la57);
        }
    }

    #[test]
    fn hidden_detection_is_named() {
        let says = |announced, value, text: &str| {
            let found = hidden_detection(announced, value);
            found.is_some_and(|found| found.contains(text))
        };
        assert!(says(true, Err(MsrFault), "but reading it faults"));
        assert!(says(true, Ok(0x1c), "bit 5 is 0"));
        assert!(says(false, Ok(0x20), "does not announce"));
        for (announced, value) in [(true, Ok(0x20)), (false, Ok(0)), (false, Err(MsrFault))] {
            assert_eq!(hidden_detection(announced, value), None);
        }
    }
}
