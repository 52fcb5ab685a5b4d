//! `memcpy` and its kin, which the compiler calls and no C library provides.

use core::arch::asm;

/// # Safety
///
/// As C's `memcpy`.
// SAFETY (of the symbol): it is C's `memcpy` and behaves as such; the same for those below.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // Words for the bulk of what is long: on machines that count each repetition that is an eighth of
    // the cost.
    let words = if count < 64 { 0 } else { count / 8 };
    // SAFETY: the caller's obligation; DF is clear in all Rust code.
    unsafe {
        let (mut to, mut from) = (to, from);
        if words != 0 {
            asm!("rep movsq", inout("rcx") words => _, inout("rdi") to, inout("rsi") from,
                 options(nostack, preserves_flags));
        }
        asm!("rep movsb", inout("rcx") count - 8 * words => _, inout("rdi") to => _,
             inout("rsi") from => _, options(nostack, preserves_flags));
    }
    to
}

/// # Safety
///
/// As C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: a copy upwards does not overwrite what it still has to read.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: the caller's obligation; `count` is above 0 here; DF is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _,
             inout("rdi") to.add(count - 1) => _, inout("rsi") from.add(count - 1) => _,
             options(nostack));
    }
    to
}

/// # Safety
///
/// As C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // Words for the bulk, as above: what is cleared is long.
    let pattern = u64::from(value as u8) * 0x0101_0101_0101_0101;
    // SAFETY: the caller's obligation; DF is clear in all Rust code.
    unsafe {
        asm!("rep stosq", "mov rcx, {tail}", "rep stosb", tail = in(reg) count % 8,
             inout("rcx") count / 8 => _, inout("rdi") to => _, in("rax") pattern,
             options(nostack, preserves_flags));
    }
    to
}

/// # Safety
///
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for index in 0..count {
        // SAFETY: the caller's obligation. Volatile, lest the loop become a call of itself.
        let (a, b) = unsafe { (a.add(index).read_volatile(), b.add(index).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// # Safety
///
/// As `bcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's obligation.
    unsafe { memcmp(a, b, count) }
}
