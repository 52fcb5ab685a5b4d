//! For a VM to which split-lock detection is not exposed: CPUID does not offer it, and its
//! registers behave like those of a processor without it, except that MSR 0x33 may be read and
//! takes a zero.
//!
//! Exit codes: success; 0x30 to 0x34, see the constants.

#![no_std]
#![no_main]

use guests::cpu::{self, CORE_CAPABILITIES, SPLIT_LOCK_DETECT, TEST_CTRL, wrmsr};
use guests::exit::Failure;
use guests::trap::Exception;
use guests::{Boot, guest, println};

guest!(main);

const OFFERED: Failure = Failure::new(0x30, "CPUID offers MSR 0xCF");
const CAPABILITIES: Failure = Failure::new(0x31, "an access to MSR 0xCF gave no #GP(0)");
const NOT_ZERO: Failure = Failure::new(0x32, "MSR 0x33 does not read as 0");
const ZERO_REFUSED: Failure = Failure::new(0x33, "MSR 0x33 does not take 0");
const BIT_TAKEN: Failure = Failure::new(0x34, "bit 29 of MSR 0x33 gave no #GP(0)");

fn main(_: &Boot) -> Result<(), Failure> {
    println!("split-lock detection is hidden");
    OFFERED.unless(!cpu::has_core_capabilities())?;
    CAPABILITIES.unless(cpu::rdmsr(CORE_CAPABILITIES).is_err_and(Exception::is_gp0))?;
    NOT_ZERO.unless(cpu::rdmsr(TEST_CTRL) == Ok(0))?;
    // SAFETY: the guest splits no lock.
    unsafe {
        CAPABILITIES.unless(wrmsr(CORE_CAPABILITIES, 0).is_err_and(Exception::is_gp0))?;
        ZERO_REFUSED.unless(wrmsr(TEST_CTRL, 0).is_ok())?;
        BIT_TAKEN.unless(wrmsr(TEST_CTRL, SPLIT_LOCK_DETECT).is_err_and(Exception::is_gp0))?;
    }
    NOT_ZERO.unless(cpu::rdmsr(TEST_CTRL) == Ok(0))
}
