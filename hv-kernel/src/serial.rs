//! Serial ports: 16550 UARTs, as they are found in PCs and where ACPI says that the firmware has its
//! console.
//!
//! People read the log on all of them but one, on which programs read the events: the port at 0x2F8,
//! unless the firmware's console is there.

use core::fmt;

use arrayvec::ArrayVec;
use spin::Mutex;
use uart_16550::backend::Backend;
use uart_16550::spec::registers::{LSR, MCR, MSR, offsets};
use uart_16550::{BaudRate, Config, Uart16550};
use vmx::addr::HostPhysAddr;
use vmx::instruction::now;
use x86_64::instructions::port::Port;

use crate::acpi::{SerialConsole, UartRegisters};
use crate::memory;

/// The ports that PCs have, apart from [`EVENTS_AT`].
const LOG_AT: [u16; 3] = [0x3f8, 0x3e8, 0x2e8];
/// Where the events go.
const EVENTS_AT: u16 = 0x2f8;
/// The same if [`EVENTS_AT`] is the firmware's console.
const OTHER_EVENTS_AT: u16 = 0x3f8;
/// How many ports the log has: those of a PC, and the firmware's.
const MAX_LOG_PORTS: usize = LOG_AT.len() + 1;

/// The speed of all ports but the firmware's.
const BAUD: u32 = 115_200;
/// The speed by a divisor of 1.
const TOP_BAUD: u32 = 115_200;

/// A transmitter that is not ready for so many ticks of the TSC is broken: at 9,600 baud a whole
/// FIFO takes 17 ms.
const PATIENCE: u64 = 500_000_000;

/// The event stream.
pub static EVENTS: EventPort = EventPort(Mutex::new(Ports::none()));

/// Ports that carry the log.
pub type LogPorts = Ports<Registers, MAX_LOG_PORTS>;

/// Finds all ports and sets them up. Those of the log are returned.
pub fn initialize(console: Option<SerialConsole>) -> LogPorts {
    let wanted = Wanted::new(console);
    let mut log = Ports::none();
    for (registers, baud) in wanted.log {
        if let Some(uart) = Uart::start(Registers(registers), baud) {
            log.0.push(uart);
        }
    }
    let mut events = EVENTS.0.lock();
    events.0.clear();
    if let Some(uart) = Uart::start(Registers(UartRegisters::Ports(wanted.events)), Some(BAUD)) {
        events.0.push(uart);
    }
    log
}

/// Where ports are looked for.
struct Wanted {
    /// For the log, with the speeds; `None` means as it is.
    log: ArrayVec<(UartRegisters, Option<u32>), MAX_LOG_PORTS>,
    events: u16,
}

impl Wanted {
    fn new(console: Option<SerialConsole>) -> Self {
        let console = console
            .map(|console| (console.registers, console.baud))
            .filter(|(registers, _)| is_mapped(*registers));
        let is_console =
            |port| console.is_some_and(|(registers, _)| registers == UartRegisters::Ports(port));
        let events = if is_console(EVENTS_AT) { OTHER_EVENTS_AT } else { EVENTS_AT };
        let others = LOG_AT.into_iter().filter(|port| *port != events && !is_console(*port));
        let others = others.map(|port| (UartRegisters::Ports(port), Some(BAUD)));
        // The clock of a port that is not a PC's is not known: it keeps its speed.
        let is_legacy = LOG_AT.into_iter().chain([EVENTS_AT]).any(is_console);
        let console = console.map(|(registers, baud)| (registers, baud.filter(|_| is_legacy)));
        Self { log: console.into_iter().chain(others).collect(), events }
    }
}

/// Whether the loader has mapped the registers: with all below 4 GiB.
fn is_mapped(registers: UartRegisters) -> bool {
    match registers {
        UartRegisters::Ports(_) => true,
        UartRegisters::Memory { base, stride, .. } => {
            base.as_u64() + 8 * u64::from(stride) <= 1 << 32
        }
    }
}

/// How the registers of a UART are reached.
#[derive(Debug, Clone, Copy)]
pub struct Registers(UartRegisters);

impl Registers {
    /// The register's address in the direct map.
    fn address(base: HostPhysAddr, stride: u8, register: u8) -> *mut u8 {
        memory::to_virtual::<u8>(base).wrapping_add(usize::from(stride) * usize::from(register))
    }
}

impl Backend for Registers {
    unsafe fn read(&mut self, register: u8) -> u8 {
        match self.0 {
            // SAFETY: the caller's obligation.
            UartRegisters::Ports(base) => unsafe { Port::new(base + u16::from(register)).read() },
            UartRegisters::Memory { base, stride, width } => {
                let address = Self::address(base, stride, register);
                // SAFETY: the firmware says that there are registers of this width, which is not
                // more than their distance; what is below 4 GiB is mapped.
                unsafe {
                    match width {
                        1 => address.read_volatile(),
                        2 => address.cast::<u16>().read_volatile() as u8,
                        _ => address.cast::<u32>().read_volatile() as u8,
                    }
                }
            }
        }
    }

    unsafe fn write(&mut self, register: u8, value: u8) {
        match self.0 {
            // SAFETY: the caller's obligation.
            UartRegisters::Ports(base) => unsafe {
                Port::new(base + u16::from(register)).write(value);
            },
            UartRegisters::Memory { base, stride, width } => {
                let address = Self::address(base, stride, register);
                // SAFETY: as for `read`.
                unsafe {
                    match width {
                        1 => address.write_volatile(value),
                        2 => address.cast::<u16>().write_volatile(value.into()),
                        _ => address.cast::<u32>().write_volatile(value.into()),
                    }
                }
            }
        }
    }
}

/// A UART that answers.
#[derive(Debug)]
struct Uart<B: Backend> {
    uart: Uart16550<B>,
    /// Its transmitter has not got stuck.
    works: bool,
}

impl<B: Backend> Uart<B> {
    /// Sets a UART up: 8 data bits, no parity, 1 stop bit, with this speed or the one that it has.
    /// `None` where there is none that works; then nothing waits for it.
    fn start(registers: B, baud: Option<u32>) -> Option<Self> {
        // SAFETY: either the port of a UART or one that nothing else in a PC uses, or the
        // registers that the firmware names; nothing else in the hypervisor uses them.
        let mut uart = unsafe { Uart16550::new_with_backend(registers) };
        if !uart.check_present() || !has_loopback(&mut uart) {
            return None;
        }
        let divisor = match baud {
            Some(baud) => TOP_BAUD / baud,
            None => {
                let (low, high) = uart.dll_dlm();
                u32::from(high) << 8 | u32::from(low)
            }
        };
        // What is being sent goes out at the old speed; and `init` waits for that without end.
        let mut uart = Self { uart, works: true };
        uart.flush(PATIENCE);
        // A frequency which makes this speed of that divisor.
        let config = Config {
            frequency: 16 * divisor.max(1),
            baud_rate: BaudRate::Custom(1),
            ..Config::default()
        };
        (uart.works && uart.uart.init(config).is_ok()).then_some(uart)
    }

    /// Sends what there is room for; how many bytes that was.
    fn send(&mut self, bytes: &[u8]) -> usize {
        self.uart.send_bytes(bytes)
    }

    /// Waits until the last byte is on the wire, `patience` at most.
    fn flush(&mut self, patience: u64) {
        let start = now();
        while self.works && !self.uart.lsr().contains(LSR::TRANSMITTER_EMPTY) {
            self.works = now().wrapping_sub(start) < patience;
            core::hint::spin_loop();
        }
    }
}

/// Whether the modem's lines come back in loopback mode. An address at which nothing answers, or
/// something else does, fails here.
fn has_loopback<B: Backend>(uart: &mut Uart16550<B>) -> bool {
    const OUT: MCR = MCR::LOOP_BACK.union(MCR::RTS).union(MCR::OUT_2_INT_ENABLE);
    // RTS comes back as CTS, OUT2 as CD.
    const IN: MSR = MSR::CTS.union(MSR::CD);
    const LINES: MSR = IN.union(MSR::DSR).union(MSR::RI);
    let before = uart.mcr();
    let backend = uart.backend_mut();
    // SAFETY: a register of the UART, which gets its value back.
    unsafe { backend.write(offsets::MCR as u8, OUT.bits()) };
    let lines = uart.msr() & LINES;
    // SAFETY: as above.
    unsafe { uart.backend_mut().write(offsets::MCR as u8, before.bits()) };
    lines == IN
}

/// Ports that all carry the same.
#[derive(Debug)]
pub struct Ports<B: Backend, const N: usize>(ArrayVec<Uart<B>, N>);

impl<B: Backend, const N: usize> Ports<B, N> {
    /// Output goes nowhere.
    pub const fn none() -> Self {
        Self(ArrayVec::new_const())
    }

    /// Sends on all of them at the same time. One that gets stuck is used no more.
    fn send(&mut self, bytes: &[u8], patience: u64) {
        let mut sent = [0; N];
        let mut since = [now(); N];
        loop {
            let mut waits = false;
            for ((uart, sent), since) in self.0.iter_mut().zip(&mut sent).zip(&mut since) {
                if !uart.works || *sent == bytes.len() {
                    continue;
                }
                let count = uart.send(&bytes[*sent..]);
                *sent += count;
                if count > 0 {
                    *since = now();
                } else {
                    uart.works = now().wrapping_sub(*since) < patience;
                }
                waits |= *sent < bytes.len();
            }
            if !waits {
                return;
            }
            core::hint::spin_loop();
        }
    }

    /// Takes what has come in, `room` bytes at most. Never waits.
    pub fn receive(&mut self, room: usize, mut take: impl FnMut(u8)) {
        let mut left = room;
        for uart in &mut self.0 {
            while left > 0
                && let Ok(byte) = uart.uart.try_receive_byte()
            {
                take(byte);
                left -= 1;
            }
        }
    }

    /// Waits until the last byte is on the wire: before the power goes off.
    pub fn flush(&mut self) {
        self.0.iter_mut().for_each(|uart| uart.flush(PATIENCE));
    }
}

impl<B: Backend, const N: usize> fmt::Write for Ports<B, N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.send(text.as_bytes(), PATIENCE);
        Ok(())
    }
}

/// The port of the event stream, or nothing where there is none.
pub struct EventPort(Mutex<Ports<Registers, 1>>);

impl EventPort {
    /// Gives `write` the port for as long as it takes, so that lines of several CPUs do not mix.
    pub fn with(&self, write: impl FnOnce(&mut dyn fmt::Write) -> fmt::Result) {
        // The port takes everything, and what is printed has no failing formatters.
        let _ = write(&mut *self.0.lock());
    }

    /// The same if nobody else has it; `None` if somebody has.
    pub fn try_with<R>(&self, write: impl FnOnce(&mut dyn fmt::Write) -> R) -> Option<R> {
        Some(write(&mut *self.0.try_lock()?))
    }

    /// Waits until the last byte is on the wire, unless somebody else has the port.
    pub fn flush(&self) {
        if let Some(mut port) = self.0.try_lock() {
            port.flush();
        }
    }

    /// Takes the port away from whoever holds it.
    ///
    /// # Safety
    ///
    /// Nobody will go on with it: in a panic.
    pub unsafe fn break_lock(&self) {
        // SAFETY: the caller's obligation.
        unsafe { self.0.force_unlock() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{vec, vec::Vec};

    /// What answers at an address.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Device {
        Nothing,
        /// All that is written can be read.
        Memory,
        Uart {
            /// It sends so many bytes, then it is stuck.
            works_for: usize,
        },
    }

    #[derive(Debug)]
    struct Fake {
        device: Device,
        written: [u8; 8],
        divisor: [u8; 2],
        sent: Vec<u8>,
    }

    impl Fake {
        fn new(device: Device) -> Self {
            Self { device, written: [0; 8], divisor: [12, 0], sent: vec![] }
        }
    }

    impl Backend for Fake {
        unsafe fn read(&mut self, register: u8) -> u8 {
            let written = self.written[usize::from(register)];
            match (self.device, register) {
                (Device::Nothing, _) => 0xff,
                (Device::Memory, _) => written,
                (_, 0 | 1) if self.written[3] & 0x80 != 0 => self.divisor[usize::from(register)],
                (_, 2) => 0xc1,
                (Device::Uart { works_for }, 5) => {
                    if self.sent.len() < works_for {
                        0x60
                    } else {
                        0
                    }
                }
                (_, 6) if self.written[4] & 0x10 != 0 => {
                    let out = self.written[4];
                    (out & 2) << 3 | (out & 1) << 5 | (out & 4) << 4 | (out & 8) << 4
                }
                _ => written,
            }
        }

        unsafe fn write(&mut self, register: u8, value: u8) {
            match register {
                0 | 1 if self.written[3] & 0x80 != 0 => self.divisor[usize::from(register)] = value,
                0 => self.sent.push(value),
                _ => self.written[usize::from(register)] = value,
            }
        }
    }

    fn start(device: Device, baud: Option<u32>) -> Option<Uart<Fake>> {
        Uart::start(Fake::new(device), baud)
    }

    const GOOD: Device = Device::Uart { works_for: usize::MAX };

    #[test]
    fn only_a_uart_that_works_is_taken() {
        assert!(start(GOOD, Some(BAUD)).is_some());
        assert!(start(Device::Nothing, Some(BAUD)).is_none());
        assert!(start(Device::Memory, Some(BAUD)).is_none());
        // Present, but its transmitter never gets ready.
        assert!(start(Device::Uart { works_for: 0 }, Some(BAUD)).is_none());
    }

    #[test]
    fn the_speed_is_set_or_kept() {
        let divisor = |baud| start(GOOD, baud).unwrap().uart.backend().divisor;
        assert_eq!(divisor(Some(115_200)), [1, 0]);
        assert_eq!(divisor(Some(9_600)), [12, 0]);
        assert_eq!(divisor(None), [12, 0]);
        // Set by nobody.
        let mut fake = Fake::new(GOOD);
        fake.divisor = [0, 0];
        assert_eq!(Uart::start(fake, None).unwrap().uart.backend().divisor, [1, 0]);
        let mut fake = Fake::new(GOOD);
        fake.divisor = [0xff, 0xff];
        assert_eq!(Uart::start(fake, None).unwrap().uart.backend().divisor, [0xff, 0xff]);
    }

    #[test]
    fn one_that_gets_stuck_keeps_nobody() {
        let mut ports: Ports<Fake, 3> = Ports::none();
        for device in [GOOD, Device::Uart { works_for: 20 }, GOOD] {
            ports.0.push(start(device, Some(BAUD)).unwrap());
        }
        let text = [b'x'; 100];
        ports.send(&text, 1_000_000);
        ports.send(&text, 1_000_000);
        let sent: Vec<_> = ports.0.iter().map(|uart| uart.uart.backend().sent.len()).collect();
        // A FIFO is filled in one go.
        assert_eq!(sent, [200, 32, 200]);
        assert!(ports.0[0].works && !ports.0[1].works && ports.0[2].works);
        ports.flush();
    }

    fn wanted(
        registers: UartRegisters,
        baud: Option<u32>,
    ) -> (Vec<(UartRegisters, Option<u32>)>, u16) {
        let wanted = Wanted::new(Some(SerialConsole { registers, baud }));
        (wanted.log.to_vec(), wanted.events)
    }

    #[test]
    fn the_firmwares_console_has_the_log_and_no_port_has_it_twice() {
        use UartRegisters::Ports;
        let all = |ports: &[u16]| -> Vec<_> {
            ports.iter().map(|port| (Ports(*port), Some(BAUD))).collect()
        };
        let none: Vec<_> = Wanted::new(None).log.to_vec();
        assert_eq!(none, all(&[0x3f8, 0x3e8, 0x2e8]));
        assert_eq!(Wanted::new(None).events, 0x2f8);
        let slow = Some(9_600);
        let (log, events) = wanted(Ports(0x3f8), slow);
        assert_eq!((log[0], log.len(), events), ((Ports(0x3f8), slow), 3, 0x2f8));
        // Serial over LAN is mostly there.
        let (log, events) = wanted(Ports(0x2f8), None);
        assert_eq!((log[0], events), ((Ports(0x2f8), None), 0x3f8));
        assert_eq!(log[1..], all(&[0x3e8, 0x2e8])[..]);
        // Not the clock of a PC's port.
        let (log, events) = wanted(Ports(0xe000), slow);
        assert_eq!((log[0], log.len(), events), ((Ports(0xe000), None), 4, 0x2f8));
        let memory = |base| {
            let base = HostPhysAddr::new(base).unwrap();
            UartRegisters::Memory { base, stride: 4, width: 4 }
        };
        assert_eq!(wanted(memory(0xfe03_4000), slow).0[0], (memory(0xfe03_4000), None));
        assert_eq!(wanted(memory(0x40_0000_0000), slow).0, all(&[0x3f8, 0x3e8, 0x2e8]));
    }
}
