//! Sleep until somebody has something for this CPU.

use core::arch::naked_asm;
use core::sync::atomic::AtomicBool;

/// Sleeps until an interrupt or an NMI comes, unless `kicked` is set. The only place where
/// interrupts are on.
///
/// An NMI between the look at `kicked` and HLT would be slept through: its handler moves RIP
/// behind the HLT ([`woken`]).
///
/// # Safety
///
/// At CPL 0, with interrupts off and handlers for all that may come.
#[unsafe(naked)]
pub unsafe extern "C" fn wait(kicked: *const AtomicBool) {
    naked_asm!(
        ".global idle_begin, idle_end",
        "idle_begin:",
        "cmp byte ptr [rdi], 0",
        "jne idle_end",
        "sti",
        "hlt",
        "idle_end:",
        "cli",
        "ret",
    )
}

unsafe extern "C" {
    fn idle_begin();
    fn idle_end();
}

/// Where an NMI that came at `rip` returns to.
pub fn woken(rip: u64) -> u64 {
    let (begin, end) = (idle_begin as *const () as u64, idle_end as *const () as u64);
    if (begin..end).contains(&rip) { end } else { rip }
}
