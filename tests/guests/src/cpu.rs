//! Instructions that Rust has no words for.

use core::arch::asm;

pub use core::arch::x86_64::{__cpuid as cpuid, __cpuid_count as cpuid_count};

use crate::probe;
use crate::trap::Exception;

/// `MSR_TEST_CTRL`, later named `IA32_MEMORY_CTRL`.
pub const TEST_CTRL: u32 = 0x33;
/// The bit of [`TEST_CTRL`] that turns split-lock detection on.
pub const SPLIT_LOCK_DETECT: u64 = 1 << 29;
/// `IA32_CORE_CAPABILITIES`.
pub const CORE_CAPABILITIES: u32 = 0xCF;
/// The bit of [`CORE_CAPABILITIES`] that says that [`SPLIT_LOCK_DETECT`] works.
pub const CORE_CAPABILITIES_SPLIT_LOCK: u64 = 1 << 5;

/// `CR0.AM`: EFLAGS.AC counts at CPL 3.
pub const CR0_AM: u64 = 1 << 18;
/// `EFLAGS.AC`: alignment checking, together with [`CR0_AM`] and at CPL 3 only.
pub const EFLAGS_AC: u64 = 1 << 18;

/// Whether CPUID enumerates IA32_CORE_CAPABILITIES (SDM volume 2, CPUID, leaf 7, subleaf 0, EDX bit
/// 30).
pub fn has_core_capabilities() -> bool {
    cpuid(0).eax >= 7 && cpuid_count(7, 0).edx & 1 << 30 != 0
}

/// Whether the processor offers split-lock detection, as the manual enumerates it (SDM volume 4,
/// IA32_CORE_CAPABILITIES).
///
/// # Errors
///
/// The exception of reading IA32_CORE_CAPABILITIES although CPUID enumerates it.
pub fn offers_split_lock_detection() -> Result<bool, Exception> {
    Ok(has_core_capabilities() && rdmsr(CORE_CAPABILITIES)? & CORE_CAPABILITIES_SPLIT_LOCK != 0)
}

/// Reads a model-specific register, whether it exists or not.
///
/// # Errors
///
/// The exception that the instruction raised.
pub fn rdmsr(msr: u32) -> Result<u64, Exception> {
    let (low, high): (u32, u32);
    // SAFETY: RDMSR reads; it faults where it may not, and that is caught.
    let run = unsafe {
        probe!(2, ["rdmsr"], in("ecx") msr, inout("eax") 0 => low, inout("edx") 0 => high)
    };
    match run.caught {
        None => Ok(u64::from(high) << 32 | u64::from(low)),
        Some(exception) => Err(exception),
    }
}

/// Writes a model-specific register, whether it exists or not.
///
/// # Errors
///
/// The exception that the instruction raised; nothing is written then.
///
/// # Safety
///
/// If the register takes `value`, the guest's code must survive that.
pub unsafe fn wrmsr(msr: u32, value: u64) -> Result<(), Exception> {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: the caller vouches for the value; a fault is caught.
    let run = unsafe { probe!(2, ["wrmsr"], in("ecx") msr, in("eax") low, in("edx") high) };
    match run.caught {
        None => Ok(()),
        Some(exception) => Err(exception),
    }
}

/// CR0.
pub fn cr0() -> u64 {
    let value;
    // SAFETY: reading CR0 at CPL 0 has no effect.
    unsafe { asm!("mov {}, cr0", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Sets CR0.
///
/// # Safety
///
/// Long mode, paging and SSE must stay as they are.
pub unsafe fn set_cr0(value: u64) {
    // SAFETY: the caller vouches for the value.
    unsafe { asm!("mov cr0, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// Lets interrupts in.
pub fn enable_interrupts() {
    // SAFETY: the guest has set up what may arrive.
    unsafe { asm!("sti", options(nostack)) };
}

/// Keeps interrupts out.
pub fn disable_interrupts() {
    // SAFETY: nothing arrives that had not before.
    unsafe { asm!("cli", options(nostack)) };
}

/// Lets interrupts in and halts until one arrives, without a gap in which it could be missed; keeps
/// them out again.
pub fn halt() {
    // SAFETY: the guest has set up what may arrive.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// The time-stamp counter.
pub fn now() -> u64 {
    // SAFETY: RDTSC only reads, at any CPL while CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// CR2, the address of the last page fault.
pub fn cr2() -> u64 {
    let value;
    // SAFETY: reading CR2 at CPL 0 has no effect.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Port input and output of one width.
macro_rules! ports {
    ($read:ident, $write:ident, $type:ty, $register:tt, $width:literal) => {
        #[doc = concat!("Reads ", $width, " from an I/O port.")]
        ///
        /// # Safety
        ///
        /// Whatever answers there must not disturb the guest by being read.
        pub unsafe fn $read(port: u16) -> $type {
            let value;
            // SAFETY: the caller vouches for the port.
            unsafe {
                asm!(concat!("in ", $register, ", dx"), in("dx") port, out($register) value,
                    options(nostack, preserves_flags));
            }
            value
        }

        #[doc = concat!("Writes ", $width, " to an I/O port.")]
        ///
        /// # Safety
        ///
        /// Whatever answers there must not disturb the guest by being written.
        pub unsafe fn $write(port: u16, value: $type) {
            // SAFETY: the caller vouches for the port.
            unsafe {
                asm!(concat!("out dx, ", $register), in("dx") port, in($register) value,
                    options(nostack, preserves_flags));
            }
        }
    };
}

ports!(in8, out8, u8, "al", "a byte");
ports!(in16, out16, u16, "ax", "two bytes");
ports!(in32, out32, u32, "eax", "four bytes");
