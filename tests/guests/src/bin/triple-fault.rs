//! Raises an exception without an IDT. The hypervisor must end this guest for a triple fault; the
//! code behind it never runs.
//!
//! Exit codes: 0x30 the guest survived.

#![no_std]
#![no_main]

use core::arch::asm;

use guests::exit::Failure;
use guests::{Boot, guest, println};

guest!(main);

const SURVIVED: Failure = Failure::new(0x30, "the guest survived a triple fault");

fn main(_: &Boot) -> Result<(), Failure> {
    println!("triple fault");
    let empty = [0_u8; 10];
    // SAFETY: not to return from here is the point.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &empty, options(nostack)) };
    Err(SURVIVED)
}
