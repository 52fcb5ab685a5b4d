//! Address line 20, which a PC may hold low for the sake of programs of 1981.

use core::sync::atomic::{AtomicU32, Ordering};

use x86_64::instructions::port::Port;

use super::{Registers, call};

/// Makes sure that odd megabytes exist. False if the line stays low.
pub fn enable() -> bool {
    if is_enabled() {
        return true;
    }
    let mut registers = Registers { eax: 0x2401, ..Registers::default() };
    // SAFETY: the service (INT 15h function 2401h) writes no memory.
    unsafe { call(0x15, &mut registers) };
    if is_enabled() {
        return true;
    }
    let mut control = Port::<u8>::new(0x92);
    // SAFETY: system control port A of PCs: bit 1 is the line; bit 0, which resets the machine,
    // stays clear.
    unsafe {
        let value = control.read();
        control.write((value | 2) & !1);
    }
    is_enabled()
}

/// Whether a word of ours is another one than that a megabyte above.
fn is_enabled() -> bool {
    static PROBE: AtomicU32 = AtomicU32::new(0);
    let above = (&raw const PROBE).wrapping_byte_add(1 << 20).cast::<u32>();
    [0x5a5a_1234, 0xa5a5_4321].into_iter().any(|value| {
        PROBE.store(value, Ordering::SeqCst);
        // SAFETY: identity-mapped memory that nothing uses yet; reading it has no effect.
        unsafe { above.read_volatile() != value }
    })
}
