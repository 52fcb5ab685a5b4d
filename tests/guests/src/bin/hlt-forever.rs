//! Halts with interrupts off. Nothing can wake it, which the hypervisor must see instead of waiting
//! for ever.
//!
//! Exit codes: 0x30 the guest woke up.

#![no_std]
#![no_main]

use core::arch::asm;

use guests::exit::Failure;
use guests::{Boot, guest, println};

guest!(main);

const WOKE: Failure = Failure::new(0x30, "HLT with interrupts off came back");

fn main(_: &Boot) -> Result<(), Failure> {
    println!("HLT for ever");
    // SAFETY: the runtime never enables interrupts.
    unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    Err(WOKE)
}
