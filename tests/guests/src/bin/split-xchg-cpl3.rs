//! XCHG across two cache lines, at CPL 3. Knows nothing of split-lock detection and expects the
//! exchanges to happen.
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
    println!("XCHG across two cache lines at CPL 3");
    in_ring(Ring::Three, || split::happens(Instruction::Xchg, Place::AcrossLines))
}
