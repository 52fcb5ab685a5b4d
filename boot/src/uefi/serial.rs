//! The first serial port, if the firmware does not use it as a console.

use core::fmt;

use x86_64::instructions::port::Port;

const COM1: u16 = 0x3f8;

/// Line status: the transmitter takes a byte.
const READY: u8 = 0x20;

/// How often the line status is read before a byte is given up: a port on which nobody listens must
/// not hold the loader up.
const PATIENCE: u32 = 100_000;

/// The port. There may be none, in which case what is written to it is lost.
pub struct Serial;

impl Serial {
    /// 115200 baud, eight data bits, no parity, one stop bit.
    pub fn set_up(&self) {
        // Line control with access to the divisor, divisor, line control.
        for (register, value) in [(3, 0x83), (0, 1), (1, 0), (3, 3)] {
            // SAFETY: this is the serial port's place on a PC, and has nothing else.
            unsafe { Port::new(COM1 + register).write(value as u8) };
        }
    }

    fn put(&self, byte: u8) {
        let mut status = Port::<u8>::new(COM1 + 5);
        // SAFETY: as above. Reading the status has no effect on how the port works.
        if (0..PATIENCE).any(|_| unsafe { status.read() } & READY != 0) {
            // SAFETY: as above.
            unsafe { Port::new(COM1).write(byte) };
        }
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.put(b'\r');
            }
            self.put(byte);
        }
        Ok(())
    }
}
