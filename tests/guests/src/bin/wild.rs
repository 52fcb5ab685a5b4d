//! Jumps to a physical address where there is no memory. Its bytes read as 0xFF, and FF FF is no
//! instruction: the guest gets its own #UD, there.
//!
//! Exit codes: success; 0x30 anything else happened.

#![no_std]
#![no_main]

use guests::exit::Failure;
use guests::trap::vector;
use guests::{Boot, guest, println, probe};

guest!(main);

const NO_INVALID_OPCODE: Failure = Failure::new(0x30, "no #UD where no memory is");

/// Far above any test guest's memory, far below the devices under 4 GiB.
const NOWHERE: u64 = 0x8000_0000;

fn main(_: &Boot) -> Result<(), Failure> {
    println!("jump to {NOWHERE:#x}, where no memory is");
    // SAFETY: what is there does not execute, and the exception is caught.
    let run = unsafe { probe!(2, ["jmp {target}"], target = in(reg) NOWHERE) };
    NO_INVALID_OPCODE.unless(run.caught.is_some_and(|exception| {
        exception.vector == vector::INVALID_OPCODE && exception.rip == NOWHERE
    }))
}
