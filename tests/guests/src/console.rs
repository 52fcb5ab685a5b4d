//! The console: the 16550A at 0x3F8.

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::cpu;

const BASE: u16 = 0x3F8;
const LINE_STATUS: u16 = BASE + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// Far more reads than a character takes at 115200 baud, even where a read takes 100 ns.
const PATIENCE: u32 = 1 << 16;

/// Registers (offset from [`BASE`]) and values: interrupts off, 115200 baud, 8N1, FIFOs on, DTR and
/// RTS.
const SET_UP: [(u16, u8); 7] =
    [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0x07), (4, 0x03)];

/// Set when the transmitter never became empty: no more waiting then, no more output.
static ABSENT: AtomicBool = AtomicBool::new(false);

/// Programs the UART.
pub(crate) fn init() {
    for (offset, value) in SET_UP {
        // SAFETY: the UART is the console's; where there is none the write is ignored.
        unsafe { cpu::out8(BASE + offset, value) };
    }
}

/// The console as something to format to. Never fails and never hangs: without a UART the text is
/// lost.
pub struct Console;

impl Console {
    fn put(byte: u8) {
        if ABSENT.load(Ordering::Relaxed) {
            return;
        }
        // SAFETY: reading the line status has no effect that matters here. A port without a device
        // reads as all ones, which counts as empty.
        let ready =
            (0..PATIENCE).any(|_| unsafe { cpu::in8(LINE_STATUS) } & TRANSMITTER_EMPTY != 0);
        if ready {
            // SAFETY: the transmitter takes a byte.
            unsafe { cpu::out8(BASE, byte) };
        } else {
            ABSENT.store(true, Ordering::Relaxed);
        }
    }
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                Self::put(b'\r');
            }
            Self::put(byte);
        }
        Ok(())
    }
}

/// Prints a line on the console.
#[macro_export]
macro_rules! println {
    ($($text:tt)*) => {{
        use core::fmt::Write;
        let _ = core::writeln!($crate::console::Console, $($text)*);
    }};
}
