//! #AC whose delivery raises #AC, for ever: its gate stays in ring 3 of protected mode, on the stack
//! that is misaligned (CVE-2015-5307). Where #AC is not intercepted, nothing but a reset gets the
//! processor out of it.
//!
//! Exit codes: 0x30, the #AC was delivered after all; 0x31, there was none.

#![no_std]
#![no_main]

use core::arch::naked_asm;

use guests::exit::Failure;
use guests::protected::{self, Gate};
use guests::trap::vector;
use guests::{Boot, guest, println};

guest!(main);

const DELIVERED: u8 = 0x30;
const NONE: u8 = 0x31;

#[unsafe(naked)]
unsafe extern "C" fn misaligned() {
    naked_asm!(
        ".code32",
        "dec esp",
        "push eax",
        "mov al, {none}",
        "2: out 0xF4, al",
        "jmp 2b",
        ".code64",
        none = const NONE
    )
}

#[unsafe(naked)]
unsafe extern "C" fn on_alignment_check() {
    naked_asm!(
        ".code32",
        "mov al, {delivered}",
        "2: out 0xF4, al",
        "jmp 2b",
        ".code64",
        delivered = const DELIVERED
    )
}

fn main(_: &Boot) -> Result<(), Failure> {
    println!("#AC without end");
    let gate = Gate { vector: vector::ALIGNMENT_CHECK, handler: on_alignment_check, ring: 3 };
    // SAFETY: both are 32-bit code.
    unsafe { protected::run(misaligned, &[gate]) }
}
