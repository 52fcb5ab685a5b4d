//! Many split locks in a loop: `count=N` on the command line, 1000 without, and `pause=N` for so many
//! turns of an empty loop after each, 0 without. Prints nothing between them.
//!
//! Exit codes: success; 0x30 the sum is wrong.

#![no_std]
#![no_main]

use core::arch::asm;
use core::cell::UnsafeCell;

use guests::exit::Failure;
use guests::{Boot, guest, println};

guest!(main);

const WRONG_SUM: Failure = Failure::new(0x30, "the sum is not the number of additions");

/// Two cache lines, the counter across them.
#[repr(C, align(64))]
struct Lines(UnsafeCell<[u8; 128]>);
// SAFETY: one processor, and only `main` uses it.
unsafe impl Sync for Lines {}

static LINES: Lines = Lines(UnsafeCell::new([0; 128]));

fn main(boot: &Boot) -> Result<(), Failure> {
    let count = boot.number("count").unwrap_or(1000);
    println!("{count} split locks");
    let pause = boot.number("pause").unwrap_or(0);
    let sum: u64;
    // SAFETY: the operand lies within LINES, which nothing else looks at.
    unsafe {
        let counter = LINES.0.get().cast::<u8>().add(60);
        asm!(
            "test {left}, {left}",
            "jz 3f",
            "2:",
            "lock add qword ptr [{counter}], 1",
            "mov {turns}, {pause}",
            "4:",
            "sub {turns}, 1",
            "jnc 4b",
            "dec {left}",
            "jnz 2b",
            "3:",
            "mov {sum}, [{counter}]",
            counter = in(reg) counter,
            left = inout(reg) count => _,
            pause = in(reg) pause,
            turns = out(reg) _,
            sum = lateout(reg) sum,
            options(nostack),
        );
    }
    WRONG_SUM.unless(sum == count)
}
