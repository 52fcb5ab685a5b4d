//! The console: the 16550A at 0x3F8.

use core::fmt::{self, Write};
use core::hint;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::area::this_cpu;
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

impl Write for Console {
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

/// The CPU that prints, plus one; 0: none.
static PRINTS: AtomicUsize = AtomicUsize::new(0);

/// Prints a line, while other CPUs wait. They do so not for ever, and not for themselves: an
/// exception while a CPU prints can be printed.
pub fn print_line(line: fmt::Arguments) {
    let own = this_cpu() + 1;
    let taken = (0..PATIENCE).any(|_| {
        hint::spin_loop();
        let taken = PRINTS.compare_exchange(0, own, Ordering::Acquire, Ordering::Relaxed);
        taken.is_ok() || taken == Err(own)
    });
    let _ = writeln!(Console, "{line}");
    if taken {
        PRINTS.store(0, Ordering::Release);
    }
}

/// Prints a line on the console.
#[macro_export]
macro_rules! println {
    () => { $crate::println!("") };
    ($($text:tt)*) => {
        $crate::console::print_line(core::format_args!($($text)*))
    };
}
