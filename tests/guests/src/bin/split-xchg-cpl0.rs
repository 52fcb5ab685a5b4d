//! XCHG across two cache lines, at CPL 0. Knows nothing of split-lock detection and expects the
//! exchanges to happen.
//!
//! Exit codes: success; [`split::failure`].

#![no_std]
#![no_main]

use guests::exit::Failure;
use guests::split::{self, Instruction, Place};
use guests::{Boot, guest, println};

guest!(main);

fn main(_: &Boot) -> Result<(), Failure> {
    println!("XCHG across two cache lines at CPL 0");
    split::happens(Instruction::Xchg, Place::AcrossLines)
}
