//! LOCK ADD and XCHG across two cache lines in virtual-8086 mode, which counts as CPL 3. Knows
//! nothing of split-lock detection and expects them to happen.
//!
//! Exit codes: success; [`split::failure`].

#![no_std]
#![no_main]

use guests::exit::Failure;
use guests::sixteen::VM86;
use guests::split::{self, Instruction, Place};
use guests::{Boot, guest, println};

guest!(main);

fn main(_: &Boot) -> Result<(), Failure> {
    println!("LOCK ADD and XCHG across two cache lines in virtual-8086 mode");
    for instruction in [Instruction::LockAdd, Instruction::Xchg] {
        split::happens_by(&VM86, instruction, Place::Aligned, 0)?;
        split::happens_by(&VM86, instruction, Place::AcrossLines, 0)?;
    }
    Ok(())
}
