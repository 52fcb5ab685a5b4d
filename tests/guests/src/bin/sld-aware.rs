//! Finds split-lock detection, as the manual says, turns it on for itself and expects the #AC: at
//! CPL 0 and CPL 3, for LOCK ADD and XCHG, and for nothing else. Also that the registers refuse
//! what they must.
//!
//! Exit codes: success; 0x1F the feature is not offered; [`split::failure`];
//! 0x30 to 0x38, see the constants.

#![no_std]
#![no_main]

use guests::cpu::{
    self, CORE_CAPABILITIES, CORE_CAPABILITIES_SPLIT_LOCK, SPLIT_LOCK_DETECT, TEST_CTRL, wrmsr,
};
use guests::exit::{self, Failure};
use guests::ring::{Ring, in_ring};
use guests::split::{self, Instruction, Place};
use guests::trap::Exception;
use guests::{Boot, guest, println};

guest!(main);

const NOT_OFFERED: Failure = Failure::new(exit::NOT_OFFERED, "split-lock detection is not offered");
const CAPABILITIES: Failure =
    Failure::new(0x30, "CPUID says that MSR 0xCF exists, but it cannot be read");
const NOT_RESET: Failure = Failure::new(0x31, "MSR 0x33 is not 0 at start");
const NOT_SET: Failure = Failure::new(0x32, "bit 29 of MSR 0x33 cannot be set");
const NOT_READ_BACK: Failure = Failure::new(0x33, "MSR 0x33 does not read back as written");
const RESERVED_TAKEN: Failure = Failure::new(0x34, "a reserved bit of MSR 0x33 gave no #GP(0)");
const RESERVED_STORED: Failure = Failure::new(0x35, "a refused write changed MSR 0x33");
const CAPABILITIES_WRITTEN: Failure = Failure::new(0x36, "a write to MSR 0xCF gave no #GP(0)");
const WRONG_CPL: Failure = Failure::new(0x37, "the #AC came from another CPL");
const NOT_CLEARED: Failure = Failure::new(0x38, "bit 29 of MSR 0x33 cannot be cleared");

/// Bits of MSR 0x33 that no virtual machine has: the ends of either half and the neighbours of bit
/// 29.
const RESERVED: [u32; 6] = [0, 28, 30, 31, 32, 63];

fn main(_: &Boot) -> Result<(), Failure> {
    println!("own split-lock detection: found, turned on, #AC expected");
    match cpu::offers_split_lock_detection() {
        Ok(true) => (),
        Ok(false) => return Err(NOT_OFFERED),
        Err(_) => return Err(CAPABILITIES),
    }

    NOT_RESET.unless(cpu::rdmsr(TEST_CTRL) == Ok(0))?;
    // SAFETY: the split locks below are caught, and the runtime has none of its own.
    NOT_SET.unless(unsafe { wrmsr(TEST_CTRL, SPLIT_LOCK_DETECT) }.is_ok())?;
    NOT_READ_BACK.unless(cpu::rdmsr(TEST_CTRL) == Ok(SPLIT_LOCK_DETECT))?;

    locks(0)?;
    in_ring(Ring::Three, || locks(3))?;
    refusals()?;

    // SAFETY: back to how the guest began.
    NOT_CLEARED.unless(unsafe { wrmsr(TEST_CTRL, 0) }.is_ok())?;
    NOT_READ_BACK.unless(cpu::rdmsr(TEST_CTRL) == Ok(0))
}

/// What locks and splits faults, what only locks or only splits does not.
fn locks(cpl: u8) -> Result<(), Failure> {
    for instruction in [Instruction::LockAdd, Instruction::Xchg] {
        let exception = split::faults(instruction, Place::AcrossLines)?;
        WRONG_CPL.unless(exception.cpl == cpl)?;
        println!("{instruction:?}: {exception}");
        split::happens(instruction, Place::LineEnd)?;
    }
    split::happens(Instruction::Add, Place::AcrossLines)
}

/// Writes that the manual forbids.
fn refusals() -> Result<(), Failure> {
    for bit in RESERVED {
        // SAFETY: nothing after this splits a lock.
        let result = unsafe { wrmsr(TEST_CTRL, 1 << bit | SPLIT_LOCK_DETECT) };
        RESERVED_TAKEN.unless(result.is_err_and(Exception::is_gp0))?;
        RESERVED_STORED.unless(cpu::rdmsr(TEST_CTRL) == Ok(SPLIT_LOCK_DETECT))?;
    }
    for value in [0, CORE_CAPABILITIES_SPLIT_LOCK] {
        // SAFETY: the register is read-only.
        let result = unsafe { wrmsr(CORE_CAPABILITIES, value) };
        CAPABILITIES_WRITTEN.unless(result.is_err_and(Exception::is_gp0))?;
    }
    Ok(())
}
