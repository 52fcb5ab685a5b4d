//! Machine checks: what the banks say, and what is to be done about it. Only the decisions:
//! [`crate::x86::mca`] accesses the MSRs.
//!
//! Source: SDM volume 3, chapter "Machine-Check Architecture". The grades are those of Linux
//! (`arch/x86/kernel/cpu/mce/severity.c`). CPUs do not wait for each other: each looks at its own
//! banks, and one that finds nothing there that concerns it goes on.

use core::fmt;

use arrayvec::ArrayVec;
use vmx::addr::HostPhysAddr;

/// The most banks that are looked at.
pub const MAX_BANKS: usize = 32;

/// Their MSRs.
pub mod msr {
    /// IA32_MCG_CAP.
    pub const CAPABILITIES: u32 = 0x179;
    /// IA32_MCG_STATUS.
    pub const STATUS: u32 = 0x17a;
    /// IA32_MCG_CTL.
    pub const CONTROL: u32 = 0x17b;

    /// IA32_MCi_CTL.
    pub const fn bank_control(bank: u8) -> u32 {
        0x400 + 4 * bank as u32
    }

    /// IA32_MCi_STATUS.
    pub const fn bank_status(bank: u8) -> u32 {
        0x401 + 4 * bank as u32
    }

    /// IA32_MCi_ADDR.
    pub const fn bank_address(bank: u8) -> u32 {
        0x402 + 4 * bank as u32
    }

    /// IA32_MCi_MISC.
    pub const fn bank_misc(bank: u8) -> u32 {
        0x403 + 4 * bank as u32
    }
}

/// What IA32_MCG_CAP says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// How many banks there are, as far as they are looked at.
    pub banks: u8,
    /// IA32_MCG_CTL exists.
    pub has_control: bool,
    /// Errors say whether software can recover from them (MCG_SER_P).
    pub recovers: bool,
}

impl Capabilities {
    /// What this value means.
    pub fn of(value: u64) -> Self {
        Self {
            banks: (value as u8).min(MAX_BANKS as u8),
            has_control: value & 1 << 8 != 0,
            recovers: value & 1 << 24 != 0,
        }
    }
}

/// IA32_MCG_STATUS: execution can go on where it was interrupted.
const RIPV: u64 = 1 << 0;
/// IA32_MCG_STATUS: where it was interrupted has to do with the error.
const EIPV: u64 = 1 << 1;

/// IA32_MCi_STATUS: there is an error.
const VALID: u64 = 1 << 63;
/// An error before it was lost.
const OVERFLOW: u64 = 1 << 62;
/// The hardware could not correct it.
const UNCORRECTED: u64 = 1 << 61;
/// Its report is switched on.
const ENABLED: u64 = 1 << 60;
/// IA32_MCi_MISC belongs to it.
const HAS_MISC: u64 = 1 << 59;
/// IA32_MCi_ADDR belongs to it.
const HAS_ADDRESS: u64 = 1 << 58;
/// What the processor holds may be wrong.
const CONTEXT_CORRUPT: u64 = 1 << 57;
/// It was signalled by this machine check.
const SIGNALLED: u64 = 1 << 56;
/// Who hit it cannot go on.
const ACTION_REQUIRED: u64 = 1 << 55;

/// An error in a bank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bank {
    /// The bank's number.
    pub number: u8,
    /// IA32_MCi_STATUS.
    pub status: u64,
    /// IA32_MCi_ADDR.
    pub address: Option<u64>,
    /// IA32_MCi_MISC.
    pub misc: Option<u64>,
}

/// How bad an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grade {
    /// The hardware has corrected it.
    Corrected,
    /// Something is wrong somewhere, and nobody has used it yet.
    Latent,
    /// Who hit it cannot go on.
    Hit,
    /// Nothing can be relied upon.
    Fatal,
}

impl Bank {
    /// Reads a bank; `None` if there is no error in it.
    pub fn read(number: u8, mut read: impl FnMut(u32) -> Option<u64>) -> Option<Self> {
        let status = read(msr::bank_status(number)).filter(|status| status & VALID != 0)?;
        let mut with = |flag, register| if status & flag != 0 { read(register) } else { None };
        let address = with(HAS_ADDRESS, msr::bank_address(number));
        let misc = with(HAS_MISC, msr::bank_misc(number));
        Some(Self { number, status, address, misc })
    }

    /// How bad it is, on a CPU that can or cannot recover.
    pub fn grade(&self, recovers: bool) -> Grade {
        let has = |flag: u64| self.status & flag != 0;
        if !has(UNCORRECTED) {
            Grade::Corrected
        } else if !has(ENABLED) {
            Grade::Latent
        } else if has(CONTEXT_CORRUPT) {
            Grade::Fatal
        } else if recovers && !(has(SIGNALLED) && has(ACTION_REQUIRED)) {
            Grade::Latent
        } else if has(OVERFLOW) {
            // The one that was lost may have been another's.
            Grade::Fatal
        } else {
            Grade::Hit
        }
    }

    /// The memory that is bad, if that is what the error is about: its address is a physical one.
    pub fn bad_memory(&self) -> Option<HostPhysAddr> {
        /// IA32_MCi_MISC, bits 8:6: the address is physical.
        const PHYSICAL: u64 = 2;
        let physical = self.misc.is_some_and(|misc| misc >> 6 & 7 == PHYSICAL);
        let address = self.address.filter(|_| physical && self.status & UNCORRECTED != 0)?;
        HostPhysAddr::new(address & !0xfff)
    }
}

impl fmt::Display for Bank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bank {}: status {:#x}", self.number, self.status)?;
        if let Some(address) = self.address {
            write!(f, ", address {address:#x}")?;
        }
        match self.misc {
            Some(misc) => write!(f, ", misc {misc:#x}"),
            None => Ok(()),
        }
    }
}

/// What a CPU finds when a machine check comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// IA32_MCG_STATUS.
    pub status: u64,
    /// [`Capabilities::recovers`].
    pub recovers: bool,
    /// The banks with errors.
    pub banks: ArrayVec<Bank, MAX_BANKS>,
}

/// Where the machine check came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In a guest: VMX non-root operation.
    Guest,
    /// In the hypervisor.
    Hypervisor,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing: it is another CPU's, or nobody's yet.
    GoOn,
    /// The guest that ran cannot go on. All others can.
    EndVm,
    /// Nothing can be relied upon.
    Panic,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GoOn => "go-on",
            Self::EndVm => "end-vm",
            Self::Panic => "panic",
        })
    }
}

impl Report {
    /// What is to be done. What was interrupted matters to the guest only, if it came there: the
    /// hypervisor goes on from the state that the VM exit has loaded.
    ///
    /// | worst | RIPV | EIPV | in a guest | in the hypervisor |
    /// |---|---|---|---|---|
    /// | fatal | – | – | panic | panic |
    /// | hit | yes | no | go on: a sibling thread has hit it (if the CPU recovers) | same |
    /// | hit | one of them | | end the VM | panic |
    /// | hit | no | no | panic: it cannot be told who has | panic |
    /// | less, or nothing | yes | – | go on | go on |
    /// | less, or nothing | no | – | end the VM | panic |
    pub fn verdict(&self, place: Place) -> Verdict {
        let worst = self.banks.iter().map(|bank| bank.grade(self.recovers)).max();
        let restarts = self.status & RIPV != 0;
        let here = self.status & EIPV != 0;
        let goes_on = match worst {
            Some(Grade::Fatal) => return Verdict::Panic,
            Some(Grade::Hit) if !restarts && !here => return Verdict::Panic,
            Some(Grade::Hit) => self.recovers && restarts && !here,
            Some(Grade::Corrected | Grade::Latent) | None => restarts,
        };
        match place {
            _ if goes_on => Verdict::GoOn,
            Place::Guest => Verdict::EndVm,
            Place::Hypervisor => Verdict::Panic,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "machine check, MCG_STATUS {:#x}", self.status)?;
        if self.banks.is_empty() {
            return f.write_str(", no bank has an error");
        }
        self.banks.iter().try_for_each(|bank| write!(f, "; {bank}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    /// An error that was reported as usual, besides these flags.
    const fn bank(flags: u64) -> Bank {
        Bank { number: 3, status: VALID | ENABLED | flags, address: None, misc: None }
    }

    const UC: u64 = UNCORRECTED;
    const SRAO: u64 = UC | SIGNALLED;
    const SRAR: u64 = SRAO | ACTION_REQUIRED;
    const PCC: u64 = CONTEXT_CORRUPT;

    #[test]
    fn errors_are_graded_as_in_linux() {
        use Grade::{Corrected, Fatal, Hit, Latent};
        // Without and with recovery.
        for (flags, without, with) in [
            (0, Corrected, Corrected),
            (OVERFLOW, Corrected, Corrected),
            (PCC, Corrected, Corrected),
            (UC, Hit, Latent),
            (UC | OVERFLOW, Fatal, Latent),
            (UC | ACTION_REQUIRED, Hit, Latent),
            (SRAO, Hit, Latent),
            (SRAO | OVERFLOW, Fatal, Latent),
            (SRAR, Hit, Hit),
            (SRAR | OVERFLOW, Fatal, Fatal),
            (UC | PCC, Fatal, Fatal),
            (SRAR | PCC, Fatal, Fatal),
        ] {
            let bank = bank(flags);
            assert_eq!((bank.grade(false), bank.grade(true)), (without, with), "{flags:#x}");
            let not_enabled = Bank { status: bank.status & !ENABLED, ..bank };
            assert_eq!(not_enabled.grade(true), if flags & UC != 0 { Latent } else { Corrected });
        }
    }

    #[test]
    fn verdicts() {
        use Verdict::{EndVm, GoOn, Panic};
        const NO: u64 = 0;
        const BOTH: u64 = RIPV | EIPV;
        // Banks, MCG_STATUS; with recovery in a guest and in the hypervisor, and the same without.
        let table: [(&[u64], u64, [Verdict; 4]); 18] = [
            (&[], RIPV, [GoOn; 4]),
            (&[], BOTH, [GoOn; 4]),
            (&[], NO, [EndVm, Panic, EndVm, Panic]),
            (&[], EIPV, [EndVm, Panic, EndVm, Panic]),
            (&[0], RIPV, [GoOn; 4]),
            (&[0], NO, [EndVm, Panic, EndVm, Panic]),
            (&[UC], RIPV, [GoOn, GoOn, EndVm, Panic]),
            (&[UC], NO, [EndVm, Panic, Panic, Panic]),
            (&[SRAO, 0], RIPV, [GoOn, GoOn, EndVm, Panic]),
            (&[SRAO], EIPV, [EndVm, Panic, EndVm, Panic]),
            (&[SRAR], BOTH, [EndVm, Panic, EndVm, Panic]),
            (&[SRAR], EIPV, [EndVm, Panic, EndVm, Panic]),
            (&[SRAR], RIPV, [GoOn, GoOn, EndVm, Panic]),
            (&[SRAR], NO, [Panic; 4]),
            (&[0, SRAR, SRAO], BOTH, [EndVm, Panic, EndVm, Panic]),
            (&[SRAR | OVERFLOW], BOTH, [Panic; 4]),
            (&[UC | PCC], BOTH, [Panic; 4]),
            (&[SRAR, UC | PCC], RIPV, [Panic; 4]),
        ];
        for (banks, status, expected) in table {
            let banks: ArrayVec<_, MAX_BANKS> = banks.iter().map(|flags| bank(*flags)).collect();
            let found = [true, false].map(|recovers| {
                let report = Report { status, recovers, banks: banks.clone() };
                [report.verdict(Place::Guest), report.verdict(Place::Hypervisor)]
            });
            assert_eq!(found.concat(), expected, "{banks:x?}, {status:#x}");
        }
    }

    #[test]
    fn banks_are_read_as_far_as_they_say_something() {
        let msrs = |number| match number {
            0x401 => Some(0x1234),
            0x405 => Some(VALID | HAS_ADDRESS | 0x134),
            0x406 => Some(0xabc0),
            0x409 => Some(VALID | HAS_MISC | HAS_ADDRESS | UC),
            0x40a => Some(0x1234_5678),
            0x40b => Some(2 << 6 | 6),
            _ => None,
        };
        assert_eq!(Bank::read(0, msrs), None);
        let one = Bank::read(1, msrs).unwrap();
        assert_eq!((one.address, one.misc, one.bad_memory()), (Some(0xabc0), None, None));
        let two = Bank::read(2, msrs).unwrap();
        assert_eq!(two.bad_memory(), HostPhysAddr::new(0x1234_5000));
        let virtual_address = Bank { misc: Some(3 << 6), ..two };
        assert_eq!(virtual_address.bad_memory(), None);
        assert_eq!(Bank::read(3, msrs), None);
        assert_eq!(
            format!("{two}"),
            "bank 2: status 0xac00000000000000, address 0x12345678, misc 0x86"
        );
        let report = Report { status: 5, recovers: true, banks: ArrayVec::from_iter([one]) };
        let text =
            "machine check, MCG_STATUS 0x5; bank 1: status 0x8400000000000134, address 0xabc0";
        assert_eq!(format!("{report}"), text);
    }

    #[test]
    fn capabilities() {
        let wide = Capabilities::of(0x100_01ff);
        assert_eq!((wide.banks, wide.has_control, wide.recovers), (32, true, true));
        let plain = Capabilities::of(0x0c0a);
        assert_eq!((plain.banks, plain.has_control, plain.recovers), (10, false, false));
    }
}
