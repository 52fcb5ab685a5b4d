//! Text on the screen and on the first serial port, by the boot record's own routine.

use core::fmt;

use super::{Registers, call_at, put_handler};

/// Where messages go.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                put(b'\r');
            }
            put(byte);
        }
        Ok(())
    }
}

fn put(byte: u8) {
    let mut registers = Registers { eax: u32::from(byte), ..Registers::default() };
    // SAFETY: the routine is in the first 64 KiB, where segment 0 reaches, and writes no memory.
    unsafe { call_at(put_handler as *const () as u32, &mut registers) }
}
