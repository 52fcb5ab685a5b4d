//! What this CPU's VMX can do, read once.
//!
//! Source: SDM volume 3, appendix "VMX Capability Reporting Facility".

use core::fmt;

use crate::controls::{Allowed, Entry, Exit, PinBased, Primary, Secondary};

/// The MSRs that [`Capabilities::read`] needs.
pub mod msr {
    /// IA32_FEATURE_CONTROL.
    pub const FEATURE_CONTROL: u32 = 0x3a;
    /// IA32_VMX_BASIC.
    pub const BASIC: u32 = 0x480;
    /// IA32_VMX_PINBASED_CTLS; the TRUE variant is 0xc higher, likewise the next three.
    pub const PINBASED: u32 = 0x481;
    /// IA32_VMX_PROCBASED_CTLS.
    pub const PROCBASED: u32 = 0x482;
    /// IA32_VMX_EXIT_CTLS.
    pub const EXIT: u32 = 0x483;
    /// IA32_VMX_ENTRY_CTLS.
    pub const ENTRY: u32 = 0x484;
    /// IA32_VMX_MISC.
    pub const MISC: u32 = 0x485;
    /// IA32_VMX_CR0_FIXED0.
    pub const CR0_FIXED0: u32 = 0x486;
    /// IA32_VMX_CR0_FIXED1.
    pub const CR0_FIXED1: u32 = 0x487;
    /// IA32_VMX_CR4_FIXED0.
    pub const CR4_FIXED0: u32 = 0x488;
    /// IA32_VMX_CR4_FIXED1.
    pub const CR4_FIXED1: u32 = 0x489;
    /// IA32_VMX_PROCBASED_CTLS2.
    pub const PROCBASED2: u32 = 0x48b;
    /// IA32_VMX_EPT_VPID_CAP.
    pub const EPT_VPID: u32 = 0x48c;
    /// From the "true" controls' MSRs back to the plain ones.
    pub const TRUE_OFFSET: u32 = 0xc;
}

/// The capability MSRs of one CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// IA32_VMX_BASIC.
    pub basic: u64,
    /// IA32_VMX_MISC.
    pub misc: u64,
    /// Pin-based controls.
    pub pin: Allowed,
    /// Primary processor-based controls.
    pub primary: Allowed,
    /// Secondary processor-based controls; zero where there are none.
    pub secondary: Allowed,
    /// VM-exit controls.
    pub exit: Allowed,
    /// VM-entry controls.
    pub entry: Allowed,
    /// IA32_VMX_EPT_VPID_CAP; zero where there is neither.
    pub ept_vpid: u64,
    /// Bits that must be 1 in CR0 in VMX operation.
    pub cr0_fixed0: u64,
    /// Bits that may be 1 in CR0 in VMX operation.
    pub cr0_fixed1: u64,
    /// Bits that must be 1 in CR4 in VMX operation.
    pub cr4_fixed0: u64,
    /// Bits that may be 1 in CR4 in VMX operation.
    pub cr4_fixed1: u64,
}

/// The controls that this hypervisor cannot do without.
pub const PIN: PinBased = PinBased::EXTERNAL_INTERRUPT_EXITING
    .union(PinBased::NMI_EXITING)
    .union(PinBased::VIRTUAL_NMIS)
    .union(PinBased::PREEMPTION_TIMER);
/// As [`PIN`].
pub const PRIMARY: Primary = Primary::USE_TSC_OFFSETTING
    .union(Primary::HLT_EXITING)
    .union(Primary::MWAIT_EXITING)
    .union(Primary::MONITOR_EXITING)
    .union(Primary::RDPMC_EXITING)
    .union(Primary::CR8_LOAD_EXITING)
    .union(Primary::CR8_STORE_EXITING)
    .union(Primary::USE_IO_BITMAPS)
    .union(Primary::USE_MSR_BITMAPS)
    .union(Primary::ACTIVATE_SECONDARY);
/// Supported but not always on.
const PRIMARY_AT_TIMES: Primary = Primary::INTERRUPT_WINDOW_EXITING
    .union(Primary::NMI_WINDOW_EXITING)
    .union(Primary::MONITOR_TRAP_FLAG);
/// As [`PIN`].
pub const SECONDARY: Secondary = Secondary::ENABLE_EPT
    .union(Secondary::ENABLE_VPID)
    .union(Secondary::WBINVD_EXITING)
    .union(Secondary::UNRESTRICTED_GUEST);
/// Used where the CPU has them.
pub const SECONDARY_OPTIONAL: Secondary =
    Secondary::ENABLE_RDTSCP.union(Secondary::ENABLE_INVPCID).union(Secondary::PAUSE_LOOP_EXITING);
/// As [`PIN`].
pub const EXIT: Exit = Exit::SAVE_DEBUG_CONTROLS
    .union(Exit::HOST_ADDRESS_SPACE_SIZE)
    .union(Exit::ACKNOWLEDGE_INTERRUPT)
    .union(Exit::SAVE_PREEMPTION_TIMER)
    .union(Exit::SAVE_PAT)
    .union(Exit::LOAD_PAT)
    .union(Exit::SAVE_EFER)
    .union(Exit::LOAD_EFER);
/// As [`PIN`].
pub const ENTRY: Entry = Entry::LOAD_DEBUG_CONTROLS.union(Entry::LOAD_PAT).union(Entry::LOAD_EFER);

/// Bits of IA32_VMX_EPT_VPID_CAP that are needed, with their names.
const EPT_VPID: [(u64, &str); 7] = [
    (1 << 6, "EPT page-walk length 4"),
    (1 << 14, "EPT write-back memory type"),
    (1 << 16, "EPT 2-MiB pages"),
    (1 << 20, "INVEPT"),
    (1 << 25, "INVEPT single-context"),
    (1 << 26, "INVEPT all-context"),
    (1 << 32 | 1 << 41, "INVVPID single-context"),
];

impl Capabilities {
    /// Reads the MSRs through `read`.
    ///
    /// # Errors
    ///
    /// The first MSR that could not be read, with the error of `read`.
    pub fn read<E>(mut read: impl FnMut(u32) -> Result<u64, E>) -> Result<Self, (u32, E)> {
        let mut get = |msr| read(msr).map_err(|error| (msr, error));
        let basic = get(msr::BASIC)?;
        // Bit 55: the "true" MSRs exist and show which default-1 controls may be 0.
        let offset = if basic & 1 << 55 != 0 { msr::TRUE_OFFSET } else { 0 };
        let primary = Allowed(get(msr::PROCBASED + offset)?);
        let has_secondary = primary.supported() & Primary::ACTIVATE_SECONDARY.bits() != 0;
        let secondary = Allowed(if has_secondary { get(msr::PROCBASED2)? } else { 0 });
        let ept_or_vpid = Secondary::ENABLE_EPT.union(Secondary::ENABLE_VPID).bits();
        let ept_vpid =
            if secondary.supported() & ept_or_vpid != 0 { get(msr::EPT_VPID)? } else { 0 };
        Ok(Self {
            basic,
            misc: get(msr::MISC)?,
            pin: Allowed(get(msr::PINBASED + offset)?),
            primary,
            secondary,
            exit: Allowed(get(msr::EXIT + offset)?),
            entry: Allowed(get(msr::ENTRY + offset)?),
            ept_vpid,
            cr0_fixed0: get(msr::CR0_FIXED0)?,
            cr0_fixed1: get(msr::CR0_FIXED1)?,
            cr4_fixed0: get(msr::CR4_FIXED0)?,
            cr4_fixed1: get(msr::CR4_FIXED1)?,
        })
    }

    /// The VMCS revision identifier, which stands at the start of every VMXON and VMCS region.
    pub const fn revision(&self) -> u32 {
        self.basic as u32 & 0x7fff_ffff
    }

    /// Whether extended page tables may have 1-GiB pages.
    pub const fn ept_1g_pages(&self) -> bool {
        self.ept_vpid & 1 << 17 != 0
    }

    /// Whether the CPU sets accessed and dirty flags in extended page tables.
    pub const fn ept_accessed_dirty(&self) -> bool {
        self.ept_vpid & 1 << 21 != 0
    }

    /// Whether this optional control may be set.
    pub const fn has_secondary(&self, control: Secondary) -> bool {
        self.secondary.supported() & control.bits() == control.bits()
    }

    /// The preemption timer counts down by one each 2^N TSC ticks: this N.
    pub const fn preemption_timer_shift(&self) -> u32 {
        self.misc as u32 & 0x1f
    }

    /// Everything that this hypervisor needs and this CPU lacks. Displays as a list of names,
    /// "nothing" when empty.
    pub const fn missing(&self) -> Missing<'_> {
        Missing { capabilities: self }
    }
}

/// What a CPU lacks: see [`Capabilities::missing`].
#[derive(Debug, Clone, Copy)]
pub struct Missing<'a> {
    capabilities: &'a Capabilities,
}

impl Missing<'_> {
    /// Whether nothing is missing.
    pub fn is_empty(&self) -> bool {
        let mut any = false;
        self.for_each(|_| any = true);
        !any
    }

    fn for_each(&self, mut report: impl FnMut(&'static str)) {
        let caps = self.capabilities;
        let primary = PRIMARY | PRIMARY_AT_TIMES;
        let pin = PinBased::from_bits_retain(PIN.bits() & !caps.pin.supported());
        let primary = Primary::from_bits_retain(primary.bits() & !caps.primary.supported());
        let secondary = Secondary::from_bits_retain(SECONDARY.bits() & !caps.secondary.supported());
        let exit = Exit::from_bits_retain(EXIT.bits() & !caps.exit.supported());
        let entry = Entry::from_bits_retain(ENTRY.bits() & !caps.entry.supported());
        pin.iter_names().for_each(|(name, _)| report(name));
        primary.iter_names().for_each(|(name, _)| report(name));
        secondary.iter_names().for_each(|(name, _)| report(name));
        exit.iter_names().for_each(|(name, _)| report(name));
        entry.iter_names().for_each(|(name, _)| report(name));
        for (bits, name) in EPT_VPID {
            if caps.ept_vpid & bits != bits {
                report(name);
            }
        }
        // Bits 53:50: the memory type for VMCS access, 6 is write-back.
        if (caps.basic >> 50) & 0xf != 6 {
            report("write-back VMCS regions");
        }
    }
}

impl fmt::Display for Missing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut result = Ok(());
        self.for_each(|name| {
            if result.is_ok() {
                result = write!(f, "{separator}{name}");
                separator = ", ";
            }
        });
        result?;
        if separator.is_empty() { f.write_str("nothing") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    fn all(msr: u32) -> Result<u64, ()> {
        Ok(match msr {
            msr::BASIC => 1 << 55 | 6 << 50 | 0x12,
            msr::EPT_VPID => u64::MAX,
            _ => 0xffff_ffff_0000_0000,
        })
    }

    #[test]
    fn a_full_cpu_misses_nothing() {
        let caps = Capabilities::read(all).unwrap();
        assert!(caps.missing().is_empty());
        assert_eq!(caps.missing().to_string(), "nothing");
        assert_eq!(caps.revision(), 0x12);
    }

    #[test]
    fn everything_missing_is_listed() {
        let caps = Capabilities::read(|msr| match msr {
            msr::BASIC => Ok::<_, ()>(0x12),
            msr::PROCBASED => Ok(u64::from(Primary::ACTIVATE_SECONDARY.bits()) << 32),
            _ => Ok(0),
        })
        .unwrap();
        let text = caps.missing().to_string();
        for name in ["PREEMPTION_TIMER", "MONITOR_TRAP_FLAG", "ENABLE_EPT", "LOAD_EFER", "INVEPT"] {
            assert!(text.contains(name), "{name} in {text}");
        }
        assert!(!caps.missing().is_empty());
    }

    #[test]
    fn secondary_msrs_are_read_only_where_they_exist() {
        let caps = Capabilities::read(|msr| match msr {
            msr::PROCBASED2 | msr::EPT_VPID => Err(()),
            _ => Ok(0),
        });
        assert_eq!(caps.unwrap().secondary, Allowed(0));
    }

    #[test]
    fn an_unreadable_msr_is_named() {
        let failing = |msr| if msr == msr::MISC { Err("gp") } else { all(msr).map_err(|()| "") };
        assert_eq!(Capabilities::read(failing).unwrap_err(), (msr::MISC, "gp"));
    }
}
