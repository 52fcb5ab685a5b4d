//! Halts with interrupts off. Nothing can wake it, which the hypervisor must see instead of waiting
//! for ever. With `timer` on the command line it waits with interrupts on for a timer that fires in
//! the far future, which is to be waited for as long as the VM may run.
//!
//! Exit codes: 0x30 the guest woke up, 0x31 its local APIC cannot be set up.

#![no_std]
#![no_main]

use core::arch::asm;

use guests::cpu::wrmsr;
use guests::exit::Failure;
use guests::{Boot, guest, println};

guest!(main);

const WOKE: Failure = Failure::new(0x30, "HLT with nothing to wake it came back");
const APIC: Failure = Failure::new(0x31, "the local APIC cannot be set up");

/// x2APIC MSRs and IA32_TSC_DEADLINE, with values that arm the timer for the far future: the APIC
/// on, TSC-deadline mode with vector 0x40, a deadline.
const FAR_TIMER: [(u32, u64); 3] = [(0x80f, 0x1ff), (0x832, 0x4_0040), (0x6e0, 1 << 60)];

fn main(boot: &Boot) -> Result<(), Failure> {
    println!("HLT for ever");
    if boot.has("timer") {
        for (msr, value) in FAR_TIMER {
            // SAFETY: no interrupt comes for so long that there need be no handler.
            unsafe { wrmsr(msr, value) }.map_err(|_| APIC)?;
        }
        // SAFETY: as above; nothing else is enabled to interrupt.
        unsafe { asm!("sti", "hlt", "cli", options(nomem, nostack)) };
        return Err(WOKE);
    }
    // SAFETY: the runtime never enables interrupts.
    unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    Err(WOKE)
}
