//! The two serial ports: COM1 for people, COM2 for programs.

use core::fmt;

use spin::Mutex;
use uart_16550::backend::PioBackend;
use uart_16550::{BaudRate, Config, Uart16550};

/// COM1: the log and the guests' consoles.
pub static LOG: Port = Port::new(0x3f8);
/// COM2: the event stream.
pub static EVENTS: Port = Port::new(0x2f8);

/// A serial port, or nothing where there is none.
pub struct Port {
    base: u16,
    uart: Mutex<Option<Uart16550<PioBackend>>>,
}

impl Port {
    const fn new(base: u16) -> Self {
        Self { base, uart: Mutex::new(None) }
    }

    /// Programs the UART: 115200 baud, 8 data bits, no parity, 1 stop bit. Where none answers,
    /// output goes nowhere.
    pub fn initialize(&self) {
        let config = Config { baud_rate: BaudRate::Baud115200, ..Config::default() };
        // SAFETY: these are the ports of COM1 and COM2; nothing else in the hypervisor uses them.
        let uart = unsafe { Uart16550::new_port(self.base) };
        let uart = uart.ok().and_then(|mut uart| uart.init(config).is_ok().then_some(uart));
        *self.uart.lock() = uart;
    }

    /// Gives `write` the port for as long as it takes, so that lines of several CPUs do not mix.
    pub fn with(&self, write: impl FnOnce(&mut dyn fmt::Write) -> fmt::Result) {
        // The port takes everything, and what is printed has no failing formatters.
        let _ = match self.uart.lock().as_mut() {
            Some(uart) => write(&mut Writer(uart)),
            None => Ok(()),
        };
    }

    /// The same if nobody else has it; `None` if somebody has.
    pub fn try_with<R>(&self, write: impl FnOnce(&mut dyn fmt::Write) -> R) -> Option<R> {
        Some(match self.uart.try_lock()?.as_mut() {
            Some(uart) => write(&mut Writer(uart)),
            None => write(&mut Nowhere),
        })
    }

    /// Waits until the last byte is on the wire: before the power goes off.
    pub fn flush(&self) {
        if let Some(uart) = self.uart.lock().as_mut() {
            while !uart.lsr().contains(uart_16550::spec::registers::LSR::TRANSMITTER_EMPTY) {
                core::hint::spin_loop();
            }
        }
    }

    /// Takes the port away from whoever holds it.
    ///
    /// # Safety
    ///
    /// Nobody will go on with it: in a panic.
    pub unsafe fn break_lock(&self) {
        // SAFETY: the caller's obligation.
        unsafe { self.uart.force_unlock() };
    }
}

/// Where there is no port.
struct Nowhere;

impl fmt::Write for Nowhere {
    fn write_str(&mut self, _: &str) -> fmt::Result {
        Ok(())
    }
}

struct Writer<'a>(&'a mut Uart16550<PioBackend>);

impl fmt::Write for Writer<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.send_bytes_exact(text.as_bytes());
        Ok(())
    }
}
