//! What a guest may do with MSRs, as one table.
//!
//! A row says how a read and a write are answered; MSRs that no row names raise #GP(0), as MSRs
//! that do not exist do. MSR numbers: SDM volume 4.

use crate::apic::{X2APIC_BASE, X2APIC_REGISTERS};
use crate::bitmap::MsrBitmap;

/// Behind the last x2APIC MSR.
const X2APIC_END: u32 = X2APIC_BASE + X2APIC_REGISTERS;

/// MSRs that the hypervisor treats by name.
pub mod msr {
    /// IA32_TIME_STAMP_COUNTER.
    pub const TSC: u32 = 0x10;
    /// IA32_PLATFORM_ID.
    pub const PLATFORM_ID: u32 = 0x17;
    /// MSR_TEST_CTRL, newer name MSR_MEMORY_CTRL.
    pub const TEST_CTRL: u32 = sld::MSR_TEST_CTRL;
    /// IA32_BIOS_SIGN_ID: the microcode revision.
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    /// IA32_CORE_CAPABILITIES.
    pub const CORE_CAPABILITIES: u32 = sld::MSR_CORE_CAPABILITIES;
    /// IA32_MTRRCAP.
    pub const MTRRCAP: u32 = 0xfe;
    /// IA32_SYSENTER_CS.
    pub const SYSENTER_CS: u32 = 0x174;
    /// IA32_SYSENTER_ESP.
    pub const SYSENTER_ESP: u32 = 0x175;
    /// IA32_SYSENTER_EIP.
    pub const SYSENTER_EIP: u32 = 0x176;
    /// IA32_TSC_DEADLINE.
    pub const TSC_DEADLINE: u32 = 0x6e0;
    /// IA32_APIC_BASE.
    pub const APIC_BASE: u32 = 0x1b;
    /// IA32_MISC_ENABLE.
    pub const MISC_ENABLE: u32 = 0x1a0;
    /// IA32_PAT.
    pub const PAT: u32 = 0x277;
    /// IA32_EFER.
    pub const EFER: u32 = 0xc000_0080;
    /// IA32_STAR.
    pub const STAR: u32 = 0xc000_0081;
    /// IA32_LSTAR.
    pub const LSTAR: u32 = 0xc000_0082;
    /// IA32_CSTAR.
    pub const CSTAR: u32 = 0xc000_0083;
    /// IA32_FMASK.
    pub const FMASK: u32 = 0xc000_0084;
    /// IA32_FS_BASE.
    pub const FS_BASE: u32 = 0xc000_0100;
    /// IA32_GS_BASE.
    pub const GS_BASE: u32 = 0xc000_0101;
    /// IA32_KERNEL_GS_BASE.
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    /// IA32_TSC_AUX.
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// How accesses to an MSR are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Reads and writes go to the CPU without an exit: VM entry and exit, or vCPU load and put,
    /// switch the register.
    Pass,
    /// Reads go to the CPU (with the TSC offset); a write moves the offset.
    Tsc,
    /// Split-lock detection answers.
    TestCtrl,
    /// Split-lock detection answers.
    CoreCapabilities,
    /// Reads give the value; writes are ignored.
    Constant(u64),
    /// The local APIC answers: this register of the x2APIC range 0x800 to 0x83f.
    Apic(u32),
    /// The local APIC's timer answers.
    TscDeadline,
    /// Reads give [`crate::apic::LocalApic::base`]; writing anything else is #GP(0).
    ApicBase,
    /// #GP(0).
    Fault,
}

/// The table: (MSR, policy). The x2APIC registers are not in it: [`policy`].
pub const TABLE: [(u32, Policy); 22] = [
    (msr::TSC, Policy::Tsc),
    (msr::PLATFORM_ID, Policy::Constant(0)),
    (msr::APIC_BASE, Policy::ApicBase),
    (msr::TEST_CTRL, Policy::TestCtrl),
    (msr::BIOS_SIGN_ID, Policy::Constant(0)),
    (msr::CORE_CAPABILITIES, Policy::CoreCapabilities),
    // No variable and no fixed ranges: the guest's memory types come from its PAT and from EPT.
    (msr::MTRRCAP, Policy::Constant(0)),
    (msr::SYSENTER_CS, Policy::Pass),
    (msr::SYSENTER_ESP, Policy::Pass),
    (msr::SYSENTER_EIP, Policy::Pass),
    // Fast strings. Linux reads it before it can take a fault.
    (msr::MISC_ENABLE, Policy::Constant(1)),
    (msr::PAT, Policy::Pass),
    (msr::TSC_DEADLINE, Policy::TscDeadline),
    (msr::EFER, Policy::Pass),
    (msr::STAR, Policy::Pass),
    (msr::LSTAR, Policy::Pass),
    (msr::CSTAR, Policy::Pass),
    (msr::FMASK, Policy::Pass),
    (msr::FS_BASE, Policy::Pass),
    (msr::GS_BASE, Policy::Pass),
    (msr::KERNEL_GS_BASE, Policy::Pass),
    // Where there is no RDTSCP the CPU itself faults.
    (msr::TSC_AUX, Policy::Pass),
];

/// MSRs up to here are looked up by index, the few above by search.
const INDEXED: usize = 0x300;
static BY_NUMBER: [Policy; INDEXED] = {
    let mut policies = [Policy::Fault; INDEXED];
    let mut row = 0;
    while row < TABLE.len() {
        if (TABLE[row].0 as usize) < INDEXED {
            policies[TABLE[row].0 as usize] = TABLE[row].1;
        }
        row += 1;
    }
    policies
};

/// The policy of an MSR.
#[inline]
pub fn policy(msr: u32) -> Policy {
    match BY_NUMBER.get(msr as usize) {
        Some(policy) => *policy,
        None => policy_above(msr),
    }
}

#[inline(never)]
fn policy_above(msr: u32) -> Policy {
    match msr {
        X2APIC_BASE..X2APIC_END => Policy::Apic(msr - X2APIC_BASE),
        _ => TABLE.iter().find(|row| row.0 == msr).map_or(Policy::Fault, |row| row.1),
    }
}

/// The bitmap that goes with the table.
pub const fn bitmap() -> MsrBitmap {
    let mut bitmap = MsrBitmap::all_exit();
    let mut row = 0;
    while row < TABLE.len() {
        let (msr, policy) = TABLE[row];
        match policy {
            Policy::Pass => {
                bitmap.pass_read(msr);
                bitmap.pass_write(msr);
            }
            Policy::Tsc => bitmap.pass_read(msr),
            _ => {}
        }
        row += 1;
    }
    bitmap
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apic::LocalApic;
    use proptest::prelude::*;
    use std::{format, string::String, vec::Vec};

    #[test]
    fn the_bitmap_passes_what_the_table_passes_and_nothing_else() {
        let bitmap = bitmap();
        for msr in (0..0x2000).chain(0xc000_0000..0xc000_2000).chain([u32::MAX]) {
            let policy = policy(msr);
            let read = matches!(policy, Policy::Pass | Policy::Tsc);
            assert_eq!(!bitmap.read_exits(msr), read, "{msr:#x}");
            assert_eq!(!bitmap.write_exits(msr), policy == Policy::Pass, "{msr:#x}");
        }
    }

    #[test]
    fn each_msr_has_one_row() {
        for (index, row) in TABLE.iter().enumerate() {
            assert!(TABLE[..index].iter().all(|other| other.0 != row.0), "{:#x}", row.0);
            assert_eq!(policy(row.0), row.1);
        }
    }
    /// How the document has a policy: its columns "read" and "write".
    fn in_words(policy: Policy) -> (String, &'static str) {
        match policy {
            Policy::Pass => ("the guest's own".into(), "yes"),
            Policy::Tsc => ("the TSC plus the offset".into(), "moves the offset"),
            Policy::TestCtrl => ("the guest's own".into(), "bit 29 if exposed, else only 0"),
            Policy::CoreCapabilities => ("0x20 if exposed, else #GP(0)".into(), "#GP(0)"),
            Policy::Constant(value) => (format!("{value:#x}"), "ignored"),
            Policy::Apic(_) => unreachable!("not in the table"),
            Policy::TscDeadline => ("the guest's own".into(), "arms the timer"),
            Policy::ApicBase => {
                let [first, other] = [0, 1].map(|id| LocalApic::new(id).base());
                (format!("{first:#x}; {other:#x} on others than vCPU 0"), "only this value")
            }
            Policy::Fault => ("#GP(0)".into(), "#GP(0)"),
        }
    }

    #[test]
    fn the_document_has_this_table() {
        let document = include_str!("../../docs/guest-view.md");
        let rows: Vec<Vec<&str>> = document
            .lines()
            .skip_while(|line| *line != "## MSRs")
            .skip(1)
            .take_while(|line| !line.starts_with("## "))
            .filter(|line| line.starts_with("| 0x"))
            .map(|line| line.split('|').map(str::trim).collect())
            .collect();
        assert_eq!(rows.len(), TABLE.len());
        for (row, (msr, policy)) in rows.iter().zip(TABLE) {
            let (read, write) = in_words(policy);
            assert_eq!(row[1], format!("{msr:#x}"));
            assert_eq!((row[3], row[4]), (read.as_str(), write), "{msr:#x}");
        }
    }

    proptest! {
        #[test]
        fn what_no_row_names_faults_and_exits(msr: u32) {
            let row = TABLE.iter().find(|row| row.0 == msr);
            let apic = (0x800..0x840).contains(&msr);
            let other = if apic { Policy::Apic(msr - 0x800) } else { Policy::Fault };
            prop_assert_eq!(policy(msr), row.map_or(other, |row| row.1));
            let bitmap = bitmap();
            if row.is_none() {
                prop_assert!(bitmap.read_exits(msr) && bitmap.write_exits(msr));
            }
        }
    }
}
