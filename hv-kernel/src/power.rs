//! The end: the machine waits for somebody who reads, is switched off, or starts again.

use core::arch::asm;
use core::sync::atomic::{AtomicU8, Ordering};

use log::Level;
use spin::Once;
use vmx::instruction::now;
use x86_64::VirtAddr;
use x86_64::instructions::port::Port;
use x86_64::instructions::tables::lidt;
use x86_64::structures::DescriptorTablePointer;

use crate::acpi::{Power, Register};
use crate::config::AtEnd;
use crate::keyboard::{self, Keyboard};
use crate::x86::apic::LocalApic;
use crate::x86::idle;
use crate::{console, memory, panic, percpu, serial};

/// What ACPI says; unset where there is none.
static ACPI: Once<Power> = Once::new();

/// What the operator wants; [`AtEnd::Stay`] while that is not known.
static AT_END: AtomicU8 = AtomicU8::new(AtEnd::Stay as u8);

/// The tables of Bochs' BIOS and of QEMU's SeaBIOS name this maker.
const EMULATOR: [u8; 6] = *b"BOCHS ";
/// Bochs powers off when "Shutdown" is written to this port.
const BOCHS_PORT: u16 = 0x8900;
/// PM1_CNT: SLP_TYP is bits 12:10, SLP_EN bit 13, SCI_EN bit 0.
const SLP_TYP_SHIFT: u16 = 10;
const SLP_EN: u16 = 1 << 13;
const SCI_EN: u16 = 1 << 0;

/// Reset control: a reset of the whole machine, memory excepted, and that it happens now.
const RESET_CONTROL: u16 = 0xcf9;
const RESET_SYSTEM: u8 = 1 << 1;
const RESET_CPU: u8 = 1 << 2;
const RESET_BITS: u8 = 0xe;

/// PCI configuration space: address and data.
const PCI_ADDRESS: u16 = 0xcf8;
const PCI_DATA: u16 = 0xcfc;
const PCI_ENABLE: u32 = 1 << 31;

/// How long something may take that ends the machine, in ticks of the TSC.
const TAKES: u64 = 200_000_000;
/// From one look at the keyboard to the next, in ticks of the TSC. The firmware of some machines
/// has work to do for each.
const POLL: u64 = 10_000_000;
/// Keys that come so early, in looks, were pressed for something else.
const EARLY_POLLS: u32 = 50;

/// Remembers what ACPI says.
pub fn initialize(power: Power) {
    ACPI.call_once(|| power);
}

/// Remembers what the operator wants.
pub fn set_at_end(at_end: AtEnd) {
    AT_END.store(at_end as u8, Ordering::Relaxed);
}

/// What the operator wants.
pub fn at_end() -> AtEnd {
    let at_end = AT_END.load(Ordering::Relaxed);
    [AtEnd::PowerOff, AtEnd::Reboot]
        .into_iter()
        .find(|known| *known as u8 == at_end)
        .unwrap_or_default()
}

/// Sends what is left to send, and ends as the operator wants.
pub fn end() -> ! {
    // Whoever holds them now holds them for ever: a panic within a panic.
    console::try_with(console::Console::flush);
    serial::EVENTS.flush();
    // SAFETY: writes back and empties the caches: what is logged is in memory when the machine
    // starts again.
    unsafe { asm!("wbinvd", options(nostack, preserves_flags)) };
    match at_end() {
        AtEnd::Stay => {}
        AtEnd::PowerOff => off(),
        AtEnd::Reboot => restart(),
    }
    wait_for_key();
    restart();
}

/// Returns when a key is pressed; never without a keyboard.
fn wait_for_key() {
    let mut keyboard = Keyboard::find();
    let mut early = EARLY_POLLS;
    loop {
        rest(POLL);
        let pressed = keyboard.as_mut().is_some_and(Keyboard::poll);
        if pressed && early == 0 {
            return;
        }
        early = early.saturating_sub(1);
    }
}

/// Waits, asleep where that is possible: before the CPU has its handlers it is not, and a panic may
/// stand on the stack of one.
fn rest(ticks: u64) {
    match percpu::try_this().filter(|_| !panic::is_panicking()) {
        Some(cpu) if LocalApic::current().set_deadline(Some(now().saturating_add(ticks))) => {
            cpu.kicked.store(false, Ordering::Relaxed);
            // SAFETY: at CPL 0 with interrupts off; the IDT has handlers for the timer and NMIs.
            unsafe { idle::wait(&raw const cpu.kicked) };
        }
        _ => wait(ticks),
    }
}

fn wait(ticks: u64) {
    let start = now();
    while now().wrapping_sub(start) < ticks {
        core::hint::spin_loop();
    }
}

/// Switches the machine off; returns where nobody says how, or it does not work.
fn off() {
    let acpi = ACPI.get();
    if acpi.is_none_or(|acpi| acpi.oem == EMULATOR) {
        for byte in *b"Shutdown" {
            // SAFETY: no real machine with ACPI tables gets here.
            unsafe { Port::<u8>::new(BOCHS_PORT).write(byte) };
        }
    }
    if let Some(soft_off) = acpi.and_then(|acpi| acpi.soft_off) {
        // SAFETY: the machine is at its end; the ports are those that its ACPI tables name.
        unsafe {
            let mut control = soft_off.controls.iter().flatten();
            if let (Some((port, _)), Some((smi, value))) = (control.next(), soft_off.enable)
                && Port::<u16>::new(*port).read() & SCI_EN == 0
            {
                Port::<u8>::new(smi).write(value);
                // The firmware may need some time for that.
                let start = now();
                while Port::<u16>::new(*port).read() & SCI_EN == 0
                    && now().wrapping_sub(start) < TAKES
                {
                    core::hint::spin_loop();
                }
            }
            for (port, kind) in soft_off.controls.into_iter().flatten() {
                Port::<u16>::new(port).write(u16::from(kind) << SLP_TYP_SHIFT | SLP_EN);
            }
        }
    }
    wait(TAKES);
    console::try_with(|console| {
        console
            .log(Level::Warn, format_args!("this machine does not switch itself off: please do"));
    });
}

/// Starts the machine again, in every way there is: as ACPI says, by the chipset, by the keyboard
/// controller, by an exception that cannot be delivered.
fn restart() -> ! {
    if let Some((register, value)) = ACPI.get().and_then(|acpi| acpi.reset) {
        write(register, value);
        wait(TAKES);
    }
    // SAFETY: the machine is at its end.
    unsafe {
        let mut control = Port::<u8>::new(RESET_CONTROL);
        let others = control.read() & !RESET_BITS;
        control.write(others | RESET_SYSTEM);
        wait(TAKES / 100);
        control.write(others | RESET_SYSTEM | RESET_CPU);
    }
    wait(TAKES);
    keyboard::reset_machine();
    wait(TAKES);
    // SAFETY: the machine is at its end: without an IDT the next exception shuts the CPU down, by
    // which a PC resets.
    unsafe {
        lidt(&DescriptorTablePointer { limit: 0, base: VirtAddr::zero() });
        asm!("ud2", options(noreturn));
    }
}

/// Writes to the register by which ACPI resets the machine.
fn write(register: Register, value: u8) {
    // SAFETY: the machine is at its end, and its firmware says that this resets it.
    unsafe {
        match register {
            Register::Port(port) => Port::<u8>::new(port).write(value),
            // What is higher may not be mapped.
            Register::Memory(address) if address.as_u64() >= 1 << 32 => {}
            Register::Memory(address) => memory::to_virtual::<u8>(address).write_volatile(value),
            Register::Pci { device, function, offset } => {
                let address = u32::from(device) << 11 | u32::from(function) << 8;
                Port::<u32>::new(PCI_ADDRESS).write(PCI_ENABLE | address | u32::from(offset & !3));
                Port::<u8>::new(PCI_DATA + u16::from(offset & 3)).write(value);
            }
        }
    }
}
