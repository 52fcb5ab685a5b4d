//! Split-lock detection for Bochs, as a preloaded library, and the ground truth of every split lock.
//!
//! Bochs implements VMX but no split-lock detection. This library adds it from outside: its
//! initializer patches some of Bochs' (empty) instrumentation stubs, and every read-modify-write
//! that Bochs reports is judged. A locked one that crosses a cache line is a *split lock*. If bit 29
//! of MSR 0x33 (TEST_CTRL) is set on that CPU, `#AC(0)` is raised instead of the access, as SDM
//! "Volume 3, Bus Locking" describes; otherwise the access happens. Either way one line of JSON
//! goes to the truth file:
//!
//! ```text
//! {"cpu":0,"rip":"0x7c3f","cpl":0,"vmx":false,"outcome":"faulted"}
//! ```
//!
//! | field | meaning |
//! |---|---|
//! | `cpu` | Bochs' CPU number, which is also the initial APIC id |
//! | `rip` | offset of the instruction in its code segment, as a VM exit reports guest RIP |
//! | `cpl` | current privilege level; 0 in real mode, 3 in virtual-8086 mode |
//! | `vmx` | whether the CPU was in VMX non-root operation |
//! | `outcome` | `faulted`: `#AC` was raised, no bus lock; `taken`: the bus lock happened |
//!
//! # How it is driven
//!
//! | environment variable | meaning |
//! |---|---|
//! | `SLD_SHIM_TRUTH` | file for the truth lines, truncated at start; unset: detection without a record |
//! | `SLD_SHIM_PROFILE` | file for a profile of what runs between VM exits and VM entries, written at the end; unset: none, and its hooks are not there |
//! | `SLD_SHIM_SCOPE` | `thread` (default): every CPU has its own MSR 0x33; `core`: siblings share it, the last write wins, as in hardware |
//! | `SLD_SHIM_THREADS_PER_CORE` | with `core` scope: CPUs `k*n..(k+1)*n` are one core |
//! | `SLD_SHIM_MISHAP` | what happens at the first split lock of a VMX guest, before it is judged: `nmi`, an NMI that no CPU has sent; `mc` and writes as in the next row, to that CPU: `#MC` in place of the access |
//! | `SLD_SHIM_MSRS` | what the firmware leaves in MSRs: writes `number=value` (or `cpu:number=value`, on this CPU only) in hexadecimal, separated by commas, carried out when a CPU is in long mode for the first time, where no firmware of BIOS machines is |
//!
//! The MSR itself is Bochs' (`cpu: msrs=FILE`): the shim reads its present value from Bochs and keeps
//! no copy, so resets and refused writes need no care. A machine without it never faults, but every
//! split lock is still recorded as taken.
//!
//! Nothing else that the shim does changes the machine, but for two repairs: where Bochs divides signed
//! 64-bit numbers wrongly, as Debian's 3.1 does, a right division takes its place; and the host's clock
//! stands still, so that a run does not depend on how fast the host is. It reads registers and memory
//! through Bochs' debug interfaces and spends no machine time. Time is counted in instructions, so a run
//! is the same with and without a truth file. (RDRAND alone gives other numbers every time.)
//!
//! # What it relies on, and what it does when that is not there
//!
//! No header, no structure offset and no rebuild of Bochs: only exported symbols, which are checked
//! one by one. Whatever is not as expected (a missing symbol, a stub that does something, a
//! truth file that cannot be written, an instruction that the decoder and Bochs measure
//! differently) ends the emulator at once with status [`EXIT_STATUS`] and a message on the standard
//! error: there is never a run that silently has no detection.
//!
//! # What is not seen
//!
//! * Implicit locked accesses: setting a descriptor's accessed bit or a TSS's busy bit in a
//!   misaligned descriptor table, and paging-structure accessed and dirty bits (always aligned).
//!   Bochs does the former as single bytes or plain dwords, so no instruction of the kinds above is
//!   involved. CMPXCHG16B, CMPccXADD and the AADD family demand alignment and can never split.
//! * A split lock at CPL 3 under legacy alignment checking (CR0.AM and EFLAGS.AC set): Bochs itself
//!   raises #AC for the misalignment before the access. No bus lock is taken, and no line is written.

#[cfg_attr(test, allow(dead_code))]
mod bochs;
mod code;
#[cfg_attr(test, allow(dead_code))]
mod hooks;
mod mishap;
#[cfg_attr(test, allow(dead_code))]
mod profile;
mod truth;

/// Status with which the emulator ends when the shim cannot do its work (`EX_SOFTWARE`).
pub const EXIT_STATUS: i32 = 70;

/// Ends the emulator with a message. Never returns, never unwinds into Bochs.
fn die(why: &str) -> ! {
    let message = format!("sld-shim: {why}\n");
    // SAFETY: the buffer is valid for its length; _exit ends the process without running anything.
    unsafe {
        libc::write(libc::STDERR_FILENO, message.as_ptr().cast(), message.len());
        libc::_exit(EXIT_STATUS)
    }
}

/// Runs when the dynamic loader has mapped Bochs and this library, before Bochs' `main`.
#[cfg(not(test))]
#[used]
#[unsafe(link_section = ".init_array")]
static INITIALIZER: extern "C" fn() = {
    extern "C" fn initialize() {
        hooks::install();
    }
    initialize
};
