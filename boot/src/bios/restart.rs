//! Starting the machine anew.

use core::arch::asm;

use x86_64::instructions::port::Port;

/// Resets the machine by the keyboard controller, by the chipset, and if that does not help, by a
/// fault that the CPU cannot report.
pub fn restart() -> ! {
    // SAFETY: the ports are those of all PCs; nobody minds a reset now.
    unsafe {
        Port::<u8>::new(0x64).write(0xfe);
        wait();
        let mut control = Port::<u8>::new(0xcf9);
        control.write(0x02);
        control.write(0x06);
        wait();
        asm!("push 0", "push 0", "lidt [rsp]", "ud2", options(noreturn))
    }
}

/// Gives a reset the time to come.
fn wait() {
    let mut delay = Port::<u8>::new(0x80);
    for _ in 0..100_000 {
        // SAFETY: the port of diagnostic codes, each access to which takes about a microsecond.
        unsafe { delay.write(0) };
    }
}
