//! Turns its split-lock detection on and expects the #AC in real mode, where it comes without an
//! error code, and in virtual-8086 mode.
//!
//! Exit codes: success; 0x1F the feature is not offered; [`split::failure`]; 0x30 MSR 0x33 does not
//! hold what was written.

#![no_std]
#![no_main]

use guests::cpu::{self, SPLIT_LOCK_DETECT, TEST_CTRL, wrmsr};
use guests::exit::{self, Failure};
use guests::sixteen::{REAL, VM86};
use guests::split::{self, Instruction, Place};
use guests::{Boot, guest, println};

guest!(main);

const NOT_OFFERED: Failure = Failure::new(exit::NOT_OFFERED, "split-lock detection is not offered");
const NOT_WRITTEN: Failure = Failure::new(0x30, "MSR 0x33 does not hold what was written");

fn main(_: &Boot) -> Result<(), Failure> {
    println!("own split-lock detection in real mode and virtual-8086 mode");
    NOT_OFFERED.unless(cpu::offers_split_lock_detection() == Ok(true))?;
    // SAFETY: the guest splits locks only where it expects the consequence.
    let written = unsafe { wrmsr(TEST_CTRL, SPLIT_LOCK_DETECT) };
    NOT_WRITTEN.unless(written.is_ok())?;
    for (mode, name) in [(&REAL, "real mode"), (&VM86, "virtual-8086 mode")] {
        for instruction in [Instruction::LockAdd, Instruction::Xchg] {
            let exception = split::faults_by(mode, instruction, Place::AcrossLines, 0)?;
            println!("{name}: {instruction:?}: {exception}");
            split::happens_by(mode, instruction, Place::InLine, 0)?;
        }
    }
    NOT_WRITTEN.unless(cpu::rdmsr(TEST_CTRL) == Ok(SPLIT_LOCK_DETECT))
}
