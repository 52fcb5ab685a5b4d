//! Accesses that look like split locks and are none: locked ones that stay within a cache line,
//! unlocked ones that do not. At CPL 0 and CPL 3. Whatever the hypervisor does about split locks,
//! none of these may raise #AC.
//!
//! Exit codes: success; [`split::failure`].

#![no_std]
#![no_main]

use guests::exit::Failure;
use guests::ring::{Ring, in_ring};
use guests::split::{self, Instruction, Place};
use guests::{Boot, guest, println};

guest!(main);

const LOCKED: [Instruction; 2] = [Instruction::LockAdd, Instruction::Xchg];
const WITHIN_A_LINE: [Place; 3] = [Place::Aligned, Place::InLine, Place::LineEnd];
const UNLOCKED: [Instruction; 2] = [Instruction::Add, Instruction::Store];
const ACROSS: [Place; 2] = [Place::AcrossLines, Place::AcrossPages];

fn main(_: &Boot) -> Result<(), Failure> {
    println!("locked within a cache line, unlocked across two, at CPL 0 and CPL 3");
    controls()?;
    in_ring(Ring::Three, controls)
}

fn controls() -> Result<(), Failure> {
    for (instructions, places) in [(LOCKED, &WITHIN_A_LINE[..]), (UNLOCKED, &ACROSS)] {
        for instruction in instructions {
            for &place in places {
                split::happens(instruction, place)?;
            }
        }
    }
    Ok(())
}
