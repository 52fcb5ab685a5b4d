//! MSR 0x33 as the manuals and the errata have it: one per core, absent on most models.

use std::vec::Vec;

use crate::{MsrFault, TestCtrl};

/// Bit 29.
pub const BIT: u64 = 1 << 29;

/// What kind of core this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// CPUID and 0xCF enumerate the bit.
    Enumerated,
    /// A model that has the bit and does not say so.
    IceLake,
    /// A model that has neither the bit nor a harmless 0x33.
    Absent,
    /// Enumerated, and a hypervisor underneath lets both accesses fault.
    Hidden,
    /// Enumerated and readable; every write faults.
    ReadOnly,
    /// Enumerated; bit 29 keeps the value that it has.
    Stuck,
}

impl Kind {
    pub fn listed(self) -> bool {
        self != Self::Absent
    }

    pub fn readable(self) -> bool {
        self.listed() && self != Self::Hidden
    }

    pub fn works(self) -> bool {
        matches!(self, Self::Enumerated | Self::IceLake)
    }

    fn enumerated(self) -> bool {
        !matches!(self, Self::Absent | Self::IceLake)
    }
}

/// What a thread did to 0x33.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Any access on a model where it can do harm.
    Harmful,
    /// A WRMSR that did not fault.
    Write { old: u64, new: u64 },
}

/// One thread's view of its core's MSR.
pub struct Thread<'a> {
    pub kind: Kind,
    pub msr: &'a mut u64,
    pub accesses: Vec<Access>,
}

impl TestCtrl for Thread<'_> {
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        match (leaf, subleaf) {
            (0, _) => [
                0x16,
                u32::from_le_bytes(*b"Genu"),
                u32::from_le_bytes(*b"ntel"),
                u32::from_le_bytes(*b"ineI"),
            ],
            // Ice Lake client, or Skylake server.
            (1, _) if self.kind == Kind::IceLake => [0x706E5, 0, 0, 0],
            (1, _) => [0x50654, 0, 0, 0],
            (7, 0) => [0, 0, 0, u32::from(self.kind.enumerated()) << 30],
            _ => [0; 4],
        }
    }

    fn read_core_capabilities(&mut self) -> Result<u64, MsrFault> {
        if self.kind.enumerated() { Ok(0x20) } else { Err(MsrFault) }
    }

    fn read_test_ctrl(&mut self) -> Result<u64, MsrFault> {
        if !self.kind.listed() {
            self.accesses.push(Access::Harmful);
        }
        if self.kind.readable() { Ok(*self.msr) } else { Err(MsrFault) }
    }

    fn write_test_ctrl(&mut self, value: u64) -> Result<(), MsrFault> {
        if !self.kind.listed() {
            self.accesses.push(Access::Harmful);
        }
        if !self.kind.readable() || self.kind == Kind::ReadOnly {
            return Err(MsrFault);
        }
        self.accesses.push(Access::Write { old: *self.msr, new: value });
        *self.msr = if self.kind == Kind::Stuck { value & !BIT | *self.msr & BIT } else { value };
        Ok(())
    }
}
