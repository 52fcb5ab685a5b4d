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
/// Used where the CPU has them, by some VMs: see [`crate::bus_lock`].
const SECONDARY_AT_TIMES: Secondary = Secondary::BUS_LOCK_DETECTION;
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

/// IA32_VMX_BASIC: revision, size and memory type of a VMCS, "true" controls.
const BASIC_USED: u64 = 0x7fff_ffff | 0x1fff << 32 | 0xf << 50 | 1 << 55;
/// IA32_VMX_MISC: the preemption timer's rate, the activity states.
const MISC_USED: u64 = 0x1f | 7 << 6;
/// IA32_VMX_EPT_VPID_CAP: besides what is needed, 1-GiB pages, accessed and dirty flags.
const EPT_VPID_USED: u64 = {
    let (mut used, mut index) = (1 << 17 | 1 << 21, 0);
    while index < EPT_VPID.len() {
        used |= EPT_VPID[index].0;
        index += 1;
    }
    used
};
/// Bits of CR4 that the hypervisor or a guest sets: VME to OSXMMEXCPT, UMIP, LA57, VMXE, FSGSBASE,
/// PCIDE, OSXSAVE, SMEP, SMAP.
const CR4_USED: u64 = 0x7ff | 1 << 11 | 1 << 12 | 1 << 13 | 7 << 16 | 3 << 20;

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

    /// The MSR in which this CPU differs from another one, if a vCPU cannot move between them for it.
    ///
    /// Only what this hypervisor uses counts: the cores of a hybrid CPU differ in what it does not.
    pub fn differs_from(&self, other: &Self) -> Option<u32> {
        let controls = |of: fn(&Self) -> Allowed, used: u32| {
            let both = [of(self), of(other)];
            both[0].adjust(used) != both[1].adjust(used)
        };
        let primary = (PRIMARY | PRIMARY_AT_TIMES).bits();
        let secondary = (SECONDARY | SECONDARY_OPTIONAL | SECONDARY_AT_TIMES).bits();
        let fixed = |of: fn(&Self) -> u64, used: u64| (of(self) ^ of(other)) & used != 0;
        [
            (msr::BASIC, fixed(|caps| caps.basic, BASIC_USED)),
            (msr::PINBASED, controls(|caps| caps.pin, PIN.bits())),
            (msr::PROCBASED, controls(|caps| caps.primary, primary)),
            (msr::PROCBASED2, controls(|caps| caps.secondary, secondary)),
            (msr::EXIT, controls(|caps| caps.exit, EXIT.bits())),
            (msr::ENTRY, controls(|caps| caps.entry, ENTRY.bits())),
            (msr::MISC, fixed(|caps| caps.misc, MISC_USED)),
            (msr::EPT_VPID, fixed(|caps| caps.ept_vpid, EPT_VPID_USED)),
            (msr::CR0_FIXED0, fixed(|caps| caps.cr0_fixed0, u64::MAX)),
            (msr::CR0_FIXED1, fixed(|caps| caps.cr0_fixed1, u64::MAX)),
            (msr::CR4_FIXED0, fixed(|caps| caps.cr4_fixed0, u64::MAX)),
            (msr::CR4_FIXED1, fixed(|caps| caps.cr4_fixed1, CR4_USED)),
        ]
        .into_iter()
        .find_map(|(number, differs)| differs.then_some(number))
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
    fn only_what_is_used_keeps_a_vcpu_from_moving() {
        let caps = Capabilities::read(all).unwrap();
        assert_eq!(caps.differs_from(&caps), None);
        let changed = |change: fn(&mut Capabilities)| {
            let mut other = caps;
            change(&mut other);
            let differs = other.differs_from(&caps);
            assert_eq!(differs, caps.differs_from(&other));
            differs
        };
        // As cores of a hybrid CPU do: Intel PT in VMX, user wait, mode-based execution, PML, more
        // CR3-target values, INVVPID of single addresses, protection keys.
        assert_eq!(changed(|caps| caps.misc ^= 1 << 14 | 4 << 16), None);
        assert_eq!(changed(|caps| caps.secondary.0 ^= 0x0442_0000 << 32), None);
        assert_eq!(changed(|caps| caps.ept_vpid ^= 1 << 40 | 1 << 8), None);
        assert_eq!(changed(|caps| caps.cr4_fixed1 ^= 1 << 22 | 1 << 24), None);
        assert_eq!(changed(|caps| caps.basic ^= 1 << 54 | 1 << 56), None);
        // What counts.
        assert_eq!(changed(|caps| caps.basic ^= 1), Some(0x480));
        assert_eq!(changed(|caps| caps.pin.0 ^= 1 << 1), Some(0x481));
        assert_eq!(changed(|caps| caps.primary.0 ^= 1 << 63), Some(0x482));
        // An optional one that a fresh VMCS would have.
        assert_eq!(changed(|caps| caps.secondary.0 ^= 1 << 42), Some(0x48b));
        assert_eq!(changed(|caps| caps.secondary.0 ^= 1 << 62), Some(0x48b));
        assert_eq!(changed(|caps| caps.misc ^= 1), Some(0x485));
        assert_eq!(changed(|caps| caps.ept_vpid ^= 1 << 21), Some(0x48c));
        assert_eq!(changed(|caps| caps.cr0_fixed0 ^= 1 << 5), Some(0x486));
        assert_eq!(changed(|caps| caps.cr4_fixed1 ^= 1 << 20), Some(0x489));
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
