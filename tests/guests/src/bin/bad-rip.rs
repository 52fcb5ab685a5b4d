//! Jumps to addresses that its page tables do not map and to one that is not canonical. The guest
//! gets its own #PF and #GP; the hypervisor has no part in it, not even where it intercepts one of
//! them.
//!
//! Exit codes: success; 0x30 and 0x31, see the constants.

#![no_std]
#![no_main]

use guests::exit::Failure;
use guests::trap::{Exception, vector};
use guests::{Boot, guest, println, probe};

guest!(main);

const NO_PAGE_FAULT: Failure = Failure::new(0x30, "no #PF(0) at the unmapped address");
const NO_GENERAL_PROTECTION: Failure =
    Failure::new(0x31, "no #GP(0) for the address that is not canonical");

fn main(_: &Boot) -> Result<(), Failure> {
    println!("jumps to unmapped addresses");
    for target in [0x12_3456_7000_u64, 0x7FFF_FFFF_F000, 0xFFFF_FFFF_FFFF_F000] {
        // SAFETY: the jump arrives nowhere, and the exception is caught.
        let run = unsafe { probe!(2, ["jmp {target}"], target = in(reg) target) };
        NO_PAGE_FAULT.unless(run.caught.is_some_and(|exception| {
            exception.vector == vector::PAGE_FAULT
                // An instruction fetch (bit 4) shows only with NX on, which it is not.
                && exception.error == 0
                && exception.rip == target
                && exception.address == target
        }))?;
    }
    // SAFETY: as above.
    let run = unsafe { probe!(2, ["jmp {target}"], target = in(reg) 0x8000_0000_0000_0000_u64) };
    NO_GENERAL_PROTECTION.unless(run.caught.is_some_and(Exception::is_gp0))
}
