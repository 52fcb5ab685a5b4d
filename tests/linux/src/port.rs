//! What goes out of the machine: serial ports for files that grow, and the port that switches it off.

use core::arch::asm;
use core::ffi::CStr;

use crate::sys::File;

/// Where Bochs takes the letters of `Shutdown` to switch the machine off.
const POWER: u16 = 0x8900;

/// A UART: 16 bytes of buffer.
const FIFO: usize = 16;
const LINE_STATUS: u16 = 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// Registers and values: interrupts off, 115200 baud, 8N1, FIFOs on, DTR and RTS.
const SET_UP: [(u16, u8); 7] =
    [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0x07), (4, 0x03)];

fn out(port: u16, value: u8) {
    // SAFETY: this process may use all ports, and uses those of devices that the kernel does not.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

fn input(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// A file whose content goes to a serial port as it grows.
pub struct Outlet<'a> {
    path: &'a CStr,
    base: u16,
    file: Option<File>,
}

impl<'a> Outlet<'a> {
    /// Sets up the serial port at `base`. The file need not exist yet.
    pub fn new(path: &'a CStr, base: u16) -> Self {
        for (register, value) in SET_UP {
            out(base + register, value);
        }
        Self { path, base, file: None }
    }

    /// Sends some of what there is if the port can take it. Whether there may be more to do.
    pub fn serve(&mut self) -> bool {
        if input(self.base + LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
            return true;
        }
        if self.file.is_none() {
            self.file = File::open(self.path).ok();
        }
        let mut buffer = [0; FIFO];
        let Some(Ok(bytes)) = self.file.as_ref().map(|file| file.read(&mut buffer)) else {
            return false;
        };
        bytes.iter().for_each(|byte| out(self.base, *byte));
        !bytes.is_empty()
    }
}

/// Switches the machine off.
pub fn power_off() -> ! {
    b"Shutdown".iter().for_each(|byte| out(POWER, *byte));
    loop {
        core::hint::spin_loop();
    }
}
