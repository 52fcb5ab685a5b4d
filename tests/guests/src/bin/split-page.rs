//! LOCK ADD and XCHG across two pages, at CPL 0 and CPL 3. Knows nothing of split-lock detection
//! and expects them to happen.
//!
//! Exit codes: success; [`split::failure`].

#![no_std]
#![no_main]

use guests::exit::Failure;
use guests::ring::{Ring, in_ring};
use guests::split::{self, Instruction, Place};
use guests::{Boot, guest, println};

guest!(main);

fn main(_: &Boot) -> Result<(), Failure> {
    println!("LOCK ADD and XCHG across two pages at CPL 0 and CPL 3");
    for instruction in [Instruction::LockAdd, Instruction::Xchg] {
        split::happens(instruction, Place::AcrossPages)?;
        in_ring(Ring::Three, || split::happens(instruction, Place::AcrossPages))?;
    }
    Ok(())
}
