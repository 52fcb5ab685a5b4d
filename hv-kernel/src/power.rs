//! The end: power off, or halt where that is not possible.

use spin::Once;
use x86_64::instructions::hlt;
use x86_64::instructions::port::Port;

use crate::acpi::Power;
use crate::serial;

/// What ACPI says; unset where there is none.
static ACPI: Once<Power> = Once::new();

/// The tables of Bochs' BIOS and of QEMU's SeaBIOS name this maker.
const EMULATOR: [u8; 6] = *b"BOCHS ";
/// Bochs powers off when "Shutdown" is written to this port.
const BOCHS_PORT: u16 = 0x8900;
/// PM1_CNT: SLP_TYP is bits 12:10, SLP_EN bit 13, SCI_EN bit 0.
const SLP_TYP_SHIFT: u16 = 10;
const SLP_EN: u16 = 1 << 13;
const SCI_EN: u16 = 1 << 0;

/// Remembers what ACPI says, for [`off`].
pub fn initialize(power: Power) {
    ACPI.call_once(|| power);
}

/// Sends what is left to send and switches the machine off; halts where nobody says how.
pub fn off() -> ! {
    serial::LOG.flush();
    serial::EVENTS.flush();
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
            }
            for (port, kind) in soft_off.controls.into_iter().flatten() {
                Port::<u16>::new(port).write(u16::from(kind) << SLP_TYP_SHIFT | SLP_EN);
            }
        }
    }
    loop {
        hlt();
    }
}
