//! The keyboard, to wait for a key (INT 16h).

use super::{Registers, call};

/// Waits until somebody presses a key; those pressed before do not count.
pub fn wait() {
    while is_waiting() {
        read();
    }
    read();
}

/// Whether there is a key to be read (function 1).
fn is_waiting() -> bool {
    let mut registers = Registers { eax: 0x0100, ..Registers::default() };
    // SAFETY: the service writes no memory.
    unsafe { call(0x16, &mut registers) };
    !registers.zero()
}

/// Reads a key as soon as there is one (function 0).
fn read() {
    // SAFETY: the service writes no memory but the BIOS's own.
    unsafe { call(0x16, &mut Registers::default()) };
}
