//! The devices that every guest finds: a 16550A as console, `isa-debug-exit`, the debug console.

use alloc::collections::VecDeque;

use arrayvec::ArrayVec;
use vmx::run::PortWrite;

/// The UART's registers: 0x3f8 to 0x3ff.
const UART: core::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
/// `isa-debug-exit`.
const DEBUG_EXIT: u16 = 0xf4;
/// The debug console; reads as its own number, as Bochs's and QEMU's do.
const DEBUG_CONSOLE: u16 = 0xe9;
/// The longest line that is held back to be printed in one piece.
const LINE: usize = 160;

/// How many lines wait to be printed. A guest that writes more waits with them.
const LINES: usize = 16;

/// A line of output.
pub type Line = ArrayVec<u8, LINE>;

/// A guest's output, line by line.
#[derive(Debug)]
struct Console {
    /// What is not ended yet.
    line: Line,
    /// What waits to be printed.
    ended: VecDeque<Line>,
}

impl Console {
    fn new() -> Self {
        Self { line: Line::new(), ended: VecDeque::with_capacity(LINES) }
    }

    /// Whether it takes another byte: any byte may end one line.
    fn is_full(&self) -> bool {
        self.ended.len() >= LINES
    }

    fn put(&mut self, byte: u8) {
        match byte {
            b'\n' => self.end_line(),
            b'\r' => {}
            _ => {
                // Terminal control is the operator's, not a guest's.
                let shown =
                    if byte.is_ascii_graphic() || b" \t".contains(&byte) { byte } else { b'.' };
                if self.line.is_full() {
                    self.end_line();
                }
                self.line.push(shown);
            }
        }
    }

    fn end_line(&mut self) {
        self.ended.push_back(core::mem::take(&mut self.line));
    }
}

/// A 16550A without input: SDM-independent, as its data sheet and QEMU's `serial.c` have it.
#[derive(Debug, Default)]
struct Uart {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: [u8; 2],
}

impl Uart {
    const LCR_DLAB: u8 = 1 << 7;
    const MCR_LOOPBACK: u8 = 1 << 4;
    /// Transmitter and its holding register are empty: output never waits.
    const LSR_EMPTY: u8 = 0x60;
    /// Carrier, data set ready, clear to send.
    const MSR_READY: u8 = 0xb0;

    fn dlab(&self) -> bool {
        self.lcr & Self::LCR_DLAB != 0
    }

    fn read(&self, register: u16) -> u8 {
        match register {
            0 | 1 if self.dlab() => self.divisor[usize::from(register)],
            0 => 0,
            1 => self.ier,
            // No interrupt pending; bits 7:6 show that the FIFOs are on.
            2 => 1 | if self.fcr & 1 != 0 { 0xc0 } else { 0 },
            3 => self.lcr,
            4 => self.mcr,
            5 => Self::LSR_EMPTY,
            // In loopback the modem outputs DTR, RTS, OUT1, OUT2 appear as DSR, CTS, RI, DCD.
            6 if self.mcr & Self::MCR_LOOPBACK != 0 => {
                let out = self.mcr;
                (out & 2) << 3 | (out & 1) << 5 | (out & 4) << 4 | (out & 8) << 4
            }
            6 => Self::MSR_READY,
            _ => self.scratch,
        }
    }

    /// The byte that goes out, if one does.
    fn write(&mut self, register: u16, value: u8) -> Option<u8> {
        match register {
            0 | 1 if self.dlab() => self.divisor[usize::from(register)] = value,
            0 if self.mcr & Self::MCR_LOOPBACK == 0 => return Some(value),
            1 => self.ier = value & 0xf,
            2 => self.fcr = value,
            3 => self.lcr = value,
            4 => self.mcr = value & 0x1f,
            7 => self.scratch = value,
            _ => {}
        }
        None
    }
}

/// All devices of one VM, which its vCPUs share.
#[derive(Debug)]
pub struct Devices {
    uart: Uart,
    console: Console,
}

impl Devices {
    /// The devices of a VM.
    pub fn new() -> Self {
        Self { uart: Uart::default(), console: Console::new() }
    }

    /// Whether a device owns this port.
    #[inline(always)]
    pub fn own(port: u16) -> bool {
        UART.contains(&port) || matches!(port, DEBUG_CONSOLE | DEBUG_EXIT)
    }

    /// IN of `size` bytes. A port that nobody owns reads as all ones.
    pub fn port_read(&mut self, port: u16, size: u8) -> u32 {
        match port {
            port if UART.contains(&port) && size == 1 => self.uart.read(port - UART.start()).into(),
            DEBUG_CONSOLE => u32::from(DEBUG_CONSOLE),
            _ => u32::MAX,
        }
    }

    /// OUT of `size` bytes.
    pub fn port_write(&mut self, port: u16, size: u8, value: u32) -> PortWrite {
        match port {
            _ if self.console.is_full() && (port == DEBUG_CONSOLE || UART.contains(&port)) => {
                return PortWrite::Full;
            }
            port if UART.contains(&port) && size == 1 => {
                if let Some(byte) = self.uart.write(port - UART.start(), value as u8) {
                    self.console.put(byte);
                }
            }
            DEBUG_CONSOLE => self.console.put(value as u8),
            DEBUG_EXIT => return PortWrite::End(value << 1 | 1),
            _ => {}
        }
        PortWrite::Done
    }

    /// The next line that waits to be printed.
    pub fn next_line(&mut self) -> Option<Line> {
        self.console.ended.pop_front()
    }

    /// Whether lines wait to be printed.
    pub fn has_lines(&self) -> bool {
        !self.console.ended.is_empty()
    }

    /// Whether as many do as there is room for.
    pub fn is_full(&self) -> bool {
        self.console.is_full()
    }

    /// The VM has ended: so has its last line.
    pub fn end_line(&mut self) {
        if !self.console.line.is_empty() {
            self.console.end_line();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_nobody_owns_read_as_ones() {
        let mut devices = Devices::new();
        assert!(!Devices::own(0x80) && Devices::own(0xf4) && Devices::own(0x3ff));
        assert_eq!(devices.port_read(0x80, 1), u32::MAX);
        assert_eq!(devices.port_write(0x80, 1, 5), PortWrite::Done);
        assert_eq!(devices.port_read(0xe9, 1), 0xe9);
    }

    #[test]
    fn debug_exit_gives_the_status_that_qemu_gives() {
        assert_eq!(Devices::new().port_write(0xf4, 1, 0x10), PortWrite::End(33));
    }

    #[test]
    fn the_uart_answers_as_a_16550a() {
        let mut uart = Uart::default();
        assert_eq!(uart.read(5) & 0x60, 0x60);
        uart.write(2, 1);
        assert_eq!(uart.read(2), 0xc1);
        uart.write(3, 0x83);
        assert_eq!(uart.write(0, 1), None);
        assert_eq!((uart.read(0), uart.read(3)), (1, 0x83));
        uart.write(3, 3);
        assert_eq!(uart.write(0, b'x'), Some(b'x'));
        uart.write(4, 0x1f);
        assert_eq!((uart.read(6) & 0xf0, uart.write(0, b'x')), (0xf0, None));
        uart.write(7, 0x5a);
        assert_eq!(uart.read(7), 0x5a);
    }

    #[test]
    fn lines_are_cut_not_lost() {
        let mut console = Console::new();
        (0..LINE).for_each(|_| console.put(b'a'));
        assert_eq!((console.line.len(), console.ended.len()), (LINE, 0));
        console.put(0x1b);
        assert_eq!((console.line.as_slice(), console.ended.len()), (&b"."[..], 1));
    }

    #[test]
    fn what_there_is_no_room_for_is_not_taken() {
        let mut devices = Devices::new();
        for _ in 0..LINES {
            assert!(!devices.is_full());
            assert_eq!(devices.port_write(0xe9, 1, b'\n'.into()), PortWrite::Done);
        }
        assert_eq!(devices.port_write(0xe9, 1, b'x'.into()), PortWrite::Full);
        assert_eq!(devices.port_write(0x3f8, 1, b'x'.into()), PortWrite::Full);
        assert_eq!(devices.port_write(0x80, 1, 0), PortWrite::Done);
        assert!(devices.next_line().is_some());
        assert_eq!(devices.port_write(0xe9, 1, b'x'.into()), PortWrite::Done);
        devices.end_line();
        assert!(devices.has_lines() && devices.is_full());
    }
}
