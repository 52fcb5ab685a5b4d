//! Turns its own split-lock detection on, off and on again. On, a split lock raises #AC; off, it
//! happens, unless the hypervisor never lets one happen: then it stops this guest between "off" and
//! "on again".
//!
//! Exit codes: success; 0x1F the feature is not offered; [`split::failure`];
//! 0x30 MSR 0x33 does not take the value or does not read back as written.

#![no_std]
#![no_main]

use guests::cpu::{self, SPLIT_LOCK_DETECT, TEST_CTRL, wrmsr};
use guests::exit::{self, Failure};
use guests::split::{self, Instruction, Place};
use guests::{Boot, guest, println};

guest!(main);

const NOT_OFFERED: Failure = Failure::new(exit::NOT_OFFERED, "split-lock detection is not offered");
const NOT_WRITTEN: Failure = Failure::new(0x30, "MSR 0x33 does not hold what was written");

fn main(_: &Boot) -> Result<(), Failure> {
    println!("own split-lock detection: on, off, on");
    NOT_OFFERED.unless(cpu::offers_split_lock_detection() == Ok(true))?;
    set(SPLIT_LOCK_DETECT)?;
    split::faults(Instruction::LockAdd, Place::AcrossLines)?;
    println!("off");
    set(0)?;
    split::happens(Instruction::LockAdd, Place::AcrossLines)?;
    println!("on");
    set(SPLIT_LOCK_DETECT)?;
    split::faults(Instruction::LockAdd, Place::AcrossLines)?;
    Ok(())
}

fn set(value: u64) -> Result<(), Failure> {
    // SAFETY: the guest splits locks only where it expects the consequence.
    let written = unsafe { wrmsr(TEST_CTRL, value) };
    NOT_WRITTEN.unless(written.is_ok() && cpu::rdmsr(TEST_CTRL) == Ok(value))
}
