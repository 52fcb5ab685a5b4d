//! Split locks at places of their own, each a function: `add=N`, `xchg=N` and `dec=N` times on the command
//! line; 5, 3 and 2 without. Then, `flood=N` times, 200 more places one after the other, with a visit to one
//! more between any two.
//!
//! Exit codes: success; 0x30 the sum is wrong.

#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;

use guests::exit::Failure;
use guests::{Boot, guest, println};

guest!(main);

const WRONG_SUM: Failure = Failure::new(0x30, "the number in memory is wrong");

/// Two cache lines, the number across them.
#[repr(C, align(64))]
struct Lines(UnsafeCell<[u8; 128]>);
// SAFETY: one processor, and only `main` uses it.
unsafe impl Sync for Lines {}

static LINES: Lines = Lines(UnsafeCell::new([0; 128]));

/// Adds 1 to the number.
///
/// # Safety
///
/// There are four bytes at `number` that nothing else uses.
#[unsafe(naked)]
unsafe extern "sysv64" fn site_add(number: *mut u8) {
    naked_asm!("lock add dword ptr [rdi], 1", "ret")
}

/// Leaves the number as it is, which is `value`.
///
/// # Safety
///
/// As [`site_add`].
#[unsafe(naked)]
unsafe extern "sysv64" fn site_xchg(number: *mut u8, value: u32) {
    naked_asm!("xchg dword ptr [rdi], esi", "ret")
}

/// Takes 1 from the number.
///
/// # Safety
///
/// As [`site_add`].
#[unsafe(naked)]
unsafe extern "sysv64" fn site_dec(number: *mut u8) {
    naked_asm!("lock dec dword ptr [rdi]", "ret")
}

/// Takes 1 from the number, between any two places of the flood. Changes no register.
///
/// # Safety
///
/// As [`site_add`].
#[unsafe(naked)]
unsafe extern "sysv64" fn site_frequent(number: *mut u8) {
    naked_asm!("lock dec dword ptr [rdi]", "ret")
}

fn main(boot: &Boot) -> Result<(), Failure> {
    let count = |name, usual| boot.number(name).unwrap_or(usual) as u32;
    let [add, xchg, dec] = [count("add", 5), count("xchg", 3), count("dec", 2)];
    let flood = count("flood", 0);
    println!(
        "split locks at three places: {add}, {xchg}, {dec}; {flood} times at 200 and one more"
    );
    // SAFETY: four bytes within LINES, which nothing else looks at.
    let sum = unsafe {
        let number = LINES.0.get().cast::<u8>().add(62);
        (0..add).for_each(|_| site_add(number));
        (0..xchg).for_each(|_| site_xchg(number, add));
        (0..dec).for_each(|_| site_dec(number));
        for _ in 0..flood {
            asm!(
                ".rept 200",
                "lock inc dword ptr [rdi]",
                "call {frequent}",
                ".endr",
                frequent = sym site_frequent,
                in("rdi") number,
            );
        }
        number.cast::<u32>().read_unaligned()
    };
    WRONG_SUM.unless(sum == add.wrapping_sub(dec))
}
