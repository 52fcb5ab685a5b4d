//! Legacy alignment checking: CPL 3, CR0.AM, EFLAGS.AC. The guest expects its own #AC for a
//! misaligned access, be it a plain one or a split lock, and none without any one of the three.
//!
//! Exit codes: success; [`split::failure`]; 0x30 the #AC did not come from CPL 3.

#![no_std]
#![no_main]

use guests::cpu::{self, CR0_AM, EFLAGS_AC};
use guests::exit::Failure;
use guests::ring::{Ring, in_ring};
use guests::sixteen::{REAL, VM86};
use guests::split::{self, HERE, Instruction, Place};
use guests::{Boot, guest, println};

guest!(main);

const WRONG_CPL: Failure = Failure::new(0x30, "the #AC did not come from CPL 3");

/// Every #AC of this guest.
const FAULTS: [(Instruction, Place); 5] = [
    (Instruction::Store, Place::InLine),
    (Instruction::Add, Place::AcrossPages),
    (Instruction::LockAdd, Place::InLine),
    (Instruction::LockAdd, Place::AcrossLines),
    (Instruction::Xchg, Place::AcrossPages),
];

fn main(_: &Boot) -> Result<(), Failure> {
    println!("legacy alignment checking");
    // CR0.AM off: EFLAGS.AC does nothing.
    in_ring(Ring::Three, || {
        split::happens_by(&HERE, Instruction::Store, Place::InLine, EFLAGS_AC)
    })?;

    // SAFETY: AM counts only where EFLAGS.AC is set, around the accesses below.
    unsafe { cpu::set_cr0(cpu::cr0() | CR0_AM) };
    for (instruction, place) in FAULTS {
        let exception =
            in_ring(Ring::Three, || split::faults_by(&HERE, instruction, place, EFLAGS_AC))?;
        println!("{instruction:?} {place:?}: {exception}");
        WRONG_CPL.unless(exception.cpl == 3)?;
    }

    // An aligned access, EFLAGS.AC off, or a CPL below 3: nothing to report.
    in_ring(Ring::Three, || {
        split::happens_by(&HERE, Instruction::LockAdd, Place::Aligned, EFLAGS_AC)?;
        split::happens(Instruction::Store, Place::InLine)
    })?;
    for ring in [Ring::One, Ring::Two] {
        in_ring(ring, || split::happens_by(&HERE, Instruction::Store, Place::InLine, EFLAGS_AC))?;
    }
    split::happens_by(&HERE, Instruction::Store, Place::AcrossPages, EFLAGS_AC)?;

    // Virtual-8086 mode counts as CPL 3, real mode as CPL 0.
    let exception = split::faults_by(&VM86, Instruction::LockAdd, Place::AcrossLines, EFLAGS_AC)?;
    println!("virtual-8086 mode: {exception}");
    split::happens_by(&VM86, Instruction::LockAdd, Place::Aligned, EFLAGS_AC)?;
    split::happens_by(&VM86, Instruction::LockAdd, Place::InLine, 0)?;
    split::happens_by(&REAL, Instruction::LockAdd, Place::InLine, EFLAGS_AC)
}
