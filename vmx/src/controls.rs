//! VM-execution, VM-exit and VM-entry controls.
//!
//! Source: SDM volume 3, chapter "Virtual Machine Control Structures", sections "VM-Execution
//! Control Fields", "VM-Exit Control Fields" and "VM-Entry Control Fields".

use bitflags::bitflags;

bitflags! {
    /// Pin-based VM-execution controls.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct PinBased: u32 {
        /// External interrupts cause VM exits.
        const EXTERNAL_INTERRUPT_EXITING = 1 << 0;
        /// Non-maskable interrupts cause VM exits.
        const NMI_EXITING = 1 << 3;
        /// "Blocking by NMI" means virtual-NMI blocking, and is undone by IRET in the guest.
        const VIRTUAL_NMIS = 1 << 5;
        /// The VMX-preemption timer counts down in the guest.
        const PREEMPTION_TIMER = 1 << 6;
    }

    /// Primary processor-based VM-execution controls.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Primary: u32 {
        /// An exit as soon as the guest can take an interrupt.
        const INTERRUPT_WINDOW_EXITING = 1 << 2;
        /// RDTSC returns the TSC plus the TSC offset.
        const USE_TSC_OFFSETTING = 1 << 3;
        /// HLT exits.
        const HLT_EXITING = 1 << 7;
        /// MWAIT exits.
        const MWAIT_EXITING = 1 << 10;
        /// RDPMC exits.
        const RDPMC_EXITING = 1 << 11;
        /// MOV to CR3 exits.
        const CR3_LOAD_EXITING = 1 << 15;
        /// MOV from CR3 exits.
        const CR3_STORE_EXITING = 1 << 16;
        /// MOV to CR8 exits.
        const CR8_LOAD_EXITING = 1 << 19;
        /// MOV from CR8 exits.
        const CR8_STORE_EXITING = 1 << 20;
        /// An exit as soon as the guest can take an NMI.
        const NMI_WINDOW_EXITING = 1 << 22;
        /// The I/O bitmaps say which ports exit.
        const USE_IO_BITMAPS = 1 << 25;
        /// An exit after each instruction.
        const MONITOR_TRAP_FLAG = 1 << 27;
        /// The MSR bitmaps say which MSR accesses exit.
        const USE_MSR_BITMAPS = 1 << 28;
        /// MONITOR exits.
        const MONITOR_EXITING = 1 << 29;
        /// The secondary controls are in force.
        const ACTIVATE_SECONDARY = 1 << 31;
    }

    /// Secondary processor-based VM-execution controls.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Secondary: u32 {
        /// Extended page tables.
        const ENABLE_EPT = 1 << 1;
        /// RDTSCP and RDPID do not fault.
        const ENABLE_RDTSCP = 1 << 3;
        /// Translations are tagged with a virtual-processor identifier.
        const ENABLE_VPID = 1 << 5;
        /// WBINVD exits.
        const WBINVD_EXITING = 1 << 6;
        /// The guest may run unpaged and in real mode.
        const UNRESTRICTED_GUEST = 1 << 7;
        /// PAUSE exits when a loop of them goes on for long.
        const PAUSE_LOOP_EXITING = 1 << 10;
        /// INVPCID does not fault.
        const ENABLE_INVPCID = 1 << 12;
        /// An exit after each bus lock.
        const BUS_LOCK_DETECTION = 1 << 30;
    }

    /// VM-exit controls.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Exit: u32 {
        /// DR7 and IA32_DEBUGCTL are saved.
        const SAVE_DEBUG_CONTROLS = 1 << 2;
        /// The host is in 64-bit mode.
        const HOST_ADDRESS_SPACE_SIZE = 1 << 9;
        /// The interrupt controller is acknowledged, the vector stored.
        const ACKNOWLEDGE_INTERRUPT = 1 << 15;
        /// IA32_PAT is saved.
        const SAVE_PAT = 1 << 18;
        /// IA32_PAT is loaded.
        const LOAD_PAT = 1 << 19;
        /// IA32_EFER is saved.
        const SAVE_EFER = 1 << 20;
        /// IA32_EFER is loaded.
        const LOAD_EFER = 1 << 21;
        /// The preemption timer's value is saved.
        const SAVE_PREEMPTION_TIMER = 1 << 22;
    }

    /// VM-entry controls.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Entry: u32 {
        /// DR7 and IA32_DEBUGCTL are loaded.
        const LOAD_DEBUG_CONTROLS = 1 << 2;
        /// The guest is in IA-32e mode.
        const IA32E_MODE_GUEST = 1 << 9;
        /// IA32_PAT is loaded.
        const LOAD_PAT = 1 << 14;
        /// IA32_EFER is loaded.
        const LOAD_EFER = 1 << 15;
    }
}

/// What a capability MSR allows of one control field: low half, bits that must be 1; high half,
/// bits that may be 1. SDM volume 3, appendix "VMX Capability Reporting Facility".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed(pub u64);

impl Allowed {
    /// The bits that must be 1.
    pub const fn required(self) -> u32 {
        self.0 as u32
    }

    /// The bits that may be 1.
    pub const fn supported(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The field's value: what is wanted plus what must be 1. The caller has checked that the
    /// CPU supports what it wants ([`crate::capability::Capabilities::missing`]).
    pub const fn adjust(self, wanted: u32) -> u32 {
        (wanted | self.required()) & self.supported()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjusting_adds_the_required_bits_and_drops_the_unsupported() {
        let allowed = Allowed(0x0000_00ff_0000_0016);
        assert_eq!(allowed.adjust(0x1), 0x17);
        assert_eq!(allowed.adjust(0x100), 0x16);
    }
}
