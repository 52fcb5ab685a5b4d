//! Programs for a machine without any other software: the BIOS loads a boot sector, which loads one
//! program. They test the machine itself, the split-lock shim above all.
//!
//! A program runs in real mode at [`LOAD_ADDRESS`] with zero data and stack segments and interrupts
//! off. It has these services:
//!
//! | interrupt | service |
//! |---|---|
//! | 0x40 | writes AL to the first serial port |
//! | 0x41 | writes EAX to it as eight hexadecimal digits and a space |
//! | 0x42 | powers the machine off |
//! | 13, 17 | a general-protection fault or an alignment check writes `G` or `F` and goes on at BP |

use std::arch::global_asm;

use xtask::image::Geometry;

/// Where programs run.
pub const LOAD_ADDRESS: u64 = 0x7e00;
/// Bytes of a program, at most: what the boot sector loads.
const MAX_PROGRAM: usize = 8 * 512;

/// Declares a program in 16-bit assembly, with its first label and the one behind it. (AT&T syntax: the
/// other cannot express a label's address in a program that is linked elsewhere than it runs.)
macro_rules! program {
    ($(#[$doc:meta])* $name:ident, $start:ident, $end:ident, $($line:literal)*) => {
        global_asm!(
            ".section .rodata",
            ".code16",
            concat!(".global ", stringify!($start)),
            concat!(".global ", stringify!($end)),
            concat!(stringify!($start), ":"),
            $($line,)*
            concat!(stringify!($end), ":"),
            ".code64",
            ".text",
            options(att_syntax)
        );
        $(#[$doc])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                static $start: u8;
                static $end: u8;
            }
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: the assembly above puts both symbols into the same read-only section, the end
            // behind the start, with initialized bytes between.
            unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
        }
    };
}

// Shared by the programs below. `attempt START, INSTRUCTION` writes `.` if the instruction completes; if
// it faults, the handler's letter stands there instead. START is the program's first label.
global_asm!(
    ".macro attempt start, instruction:vararg",
    "movw $9f - \\start + 0x7e00, %bp",
    "\\instruction",
    "pushw %ax",
    "movb $'.', %al",
    "int $0x40",
    "popw %ax",
    "9:",
    ".endm",
    // Writes the MSR in ECX.
    ".macro set_msr value",
    "movl $\\value, %eax",
    "xorl %edx, %edx",
    "wrmsr",
    ".endm",
    // Sets the handler of an interrupt to a label of the boot sector.
    ".macro set_vector vector, label",
    "movw $\\label - sector_boot + 0x7c00, (\\vector * 4)",
    "movw $0, (\\vector * 4 + 2)",
    ".endm",
    options(att_syntax)
);

program! {
    /// The boot sector.
    boot_sector, sector_boot, sector_boot_end,
    "xorw %ax, %ax"
    "movw %ax, %ds"
    "movw %ax, %es"
    "movw %ax, %ss"
    "movw $0x7c00, %sp"
    // INT 13h, function 42h: eight sectors from the second one on.
    "movw $50f - sector_boot + 0x7c00, %si"
    "movb $0x42, %ah"
    "int $0x13"
    "cli"
    // The first serial port: 115200 baud, 8N1.
    "movw $0x3fb, %dx"
    "movb $0x83, %al"
    "outb %al, %dx"
    "movw $0x3f8, %dx"
    "movw $1, %ax"
    "outw %ax, %dx"
    "movw $0x3fb, %dx"
    "movb $3, %al"
    "outb %al, %dx"
    // The services.
    "set_vector 0x40, 10f"
    "set_vector 0x41, 20f"
    "set_vector 0x42, 30f"
    "set_vector 13, 40f"
    "set_vector 17, 41f"
    "movw $0x7e00, %ax"
    "jmpw *%ax"
    // Write AL.
    "10:"
    "pushw %dx"
    "pushw %ax"
    "movw $0x3fd, %dx"
    "11:"
    "inb %dx, %al"
    "testb $0x20, %al"
    "jz 11b"
    "movw $0x3f8, %dx"
    "popw %ax"
    "outb %al, %dx"
    "popw %dx"
    "iretw"
    // Write EAX.
    "20:"
    "pushw %cx"
    "movw $8, %cx"
    "21:"
    "roll $4, %eax"
    "pushw %ax"
    "andb $15, %al"
    "cmpb $10, %al"
    "jb 22f"
    "addb $('a' - '0' - 10), %al"
    "22:"
    "addb $'0', %al"
    "int $0x40"
    "popw %ax"
    "loop 21b"
    "movb $' ', %al"
    "int $0x40"
    "popw %cx"
    "iretw"
    // Power off when the last character is out: on Bochs, then on QEMU.
    "30:"
    "movw $0x3fd, %dx"
    "31:"
    "inb %dx, %al"
    "testb $0x40, %al"
    "jz 31b"
    "movw $51f - sector_boot + 0x7c00, %si"
    "movw $8, %cx"
    "movw $0x8900, %dx"
    "rep outsb"
    "movw $0x604, %dx"
    "movw $0x2000, %ax"
    "outw %ax, %dx"
    "32:"
    "hlt"
    "jmp 32b"
    // Faults: continue at BP.
    "40:"
    "pushw %ax"
    "movb $'G', %al"
    "jmp 42f"
    "41:"
    "pushw %ax"
    "movb $'F', %al"
    "42:"
    "int $0x40"
    "popw %ax"
    "pushw %bx"
    "movw %sp, %bx"
    "movw %bp, 2(%bx)"
    "popw %bx"
    "iretw"
    // Disk address packet.
    "50:"
    ".byte 16, 0"
    ".word 8, 0x7e00, 0"
    ".quad 1"
    "51:"
    ".ascii \"Shutdown\""
    ".org sector_boot + 510"
    ".word 0xaa55"
}

program! {
    /// Split and other locks with detection off, then on, then off. Ends with the count that the split
    /// additions to one place left.
    locks, sector_locks, sector_locks_end,
    "movl $0, (0x603e)"
    "call 1f"
    "movl $1 << 29, %eax"
    "call 2f"
    "call 1f"
    "xorl %eax, %eax"
    "call 2f"
    "call 1f"
    "movl (0x603e), %eax"
    "int $0x41"
    "int $0x42"
    "1:"
    // Split.
    "40: attempt sector_locks, lock addl $1, (0x603e)"
    "41: attempt sector_locks, xchgl %ebx, (0x60fd)"
    "42: attempt sector_locks, lock incw (0x60bf)"
    "43: attempt sector_locks, lock cmpxchg8b (0x60f9)"
    // Split across two pages.
    "44: attempt sector_locks, lock orl $0, (0x6ffe)"
    "45: attempt sector_locks, xchgw %bx, (0x6fff)"
    // Not split.
    "attempt sector_locks, lock addl $1, (0x6044)"
    "attempt sector_locks, xchgl %ebx, (0x6ffc)"
    "attempt sector_locks, lock incb (0x60bf)"
    // Not locked.
    "attempt sector_locks, addl $1, (0x613e)"
    "attempt sector_locks, incl (0x6ffe)"
    "attempt sector_locks, movl %ebx, (0x613e)"
    "retw"
    "2:"
    "movl $0x33, %ecx"
    "xorl %edx, %edx"
    "attempt sector_locks, wrmsr"
    "retw"
    // For the test: where the split ones stand, behind the three bytes with which `attempt` begins.
    ".balign 2"
    ".word 40b + 3 - sector_locks, 41b + 3 - sector_locks, 42b + 3 - sector_locks"
    ".word 43b + 3 - sector_locks, 44b + 3 - sector_locks, 45b + 3 - sector_locks"
}

program! {
    /// MSRs 0x33 and 0xCF: reads both, shows the latter, writes it, writes 0x33 with a reserved bit, tries
    /// a split lock.
    msrs, sector_msrs, sector_msrs_end,
    "movl $0x33, %ecx"
    "attempt sector_msrs, rdmsr"
    "movl $0xcf, %ecx"
    "attempt sector_msrs, rdmsr"
    "int $0x41"
    // Not the value that is there: that write Bochs lets pass.
    "xorl %eax, %eax"
    "attempt sector_msrs, wrmsr"
    "movl $0x33, %ecx"
    "xorl %edx, %edx"
    "movl $(1 << 29 | 1), %eax"
    "attempt sector_msrs, wrmsr"
    "attempt sector_msrs, lock addl $1, (0x603e)"
    "int $0x42"
}

program! {
    /// A split lock that is executed ten times, entered first at the lock itself and then from before it:
    /// an emulator that keeps decoded code may have two copies of it.
    reentered, sector_reentered, sector_reentered_end,
    "movw $10, %cx"
    "jmp 2f"
    "1:"
    "incw %ax"
    "incw %bx"
    "2:"
    "lock addl $1, (0x603e)"
    "decw %cx"
    "jnz 1b"
    "int $0x42"
}

program! {
    /// A hundred split locks; then shows the time-stamp counter.
    timed, sector_timed, sector_timed_end,
    "movw $100, %cx"
    "1:"
    "lock addl $1, (0x603e)"
    "loop 1b"
    "rdtsc"
    "int $0x41"
    "int $0x42"
}

program! {
    /// Starts the other CPUs, which set bit 29 of their MSR 0x33 and halt; then tries a split lock on
    /// this one and shows this one's MSR.
    siblings, sector_siblings, sector_siblings_end,
    "movw $0, (0x6000)"
    // IA32_APIC_BASE: x2APIC mode, so that the APIC is reached without memory above 1 MiB.
    "movl $0x1b, %ecx"
    "rdmsr"
    "orb $0x0c, %ah"
    "wrmsr"
    // Interrupt command: INIT to all others, then start-up at 0x8000.
    "movl $0x830, %ecx"
    "set_msr 0xc4500"
    "set_msr 0xc4608"
    "1:"
    "pause"
    "cmpw $0, (0x6000)"
    "je 1b"
    "attempt sector_siblings, lock addl $1, (0x603e)"
    "movl $0x33, %ecx"
    "rdmsr"
    "int $0x41"
    "int $0x42"
    ".org sector_siblings + 0x200"
    "xorw %ax, %ax"
    "movw %ax, %ds"
    "movl $0x33, %ecx"
    "set_msr (1 << 29)"
    "incw (0x6000)"
    "2:"
    "cli"
    "hlt"
    "jmp 2b"
}

program! {
    /// Says one letter and then nothing, forever.
    silent, sector_silent, sector_silent_end,
    "movb $'S', %al"
    "int $0x40"
    "1:"
    "jmp 1b"
}

program! {
    /// Says one letter, to the end, and faults without an interrupt table.
    triple_fault, sector_triple_fault, sector_triple_fault_end,
    "movb $'S', %al"
    "int $0x40"
    "movw $0x3fd, %dx"
    "1:"
    "inb %dx, %al"
    "testb $0x40, %al"
    "jz 1b"
    "lidtw 2f - sector_triple_fault + 0x7e00"
    "int $3"
    "2:"
    ".word 0"
    ".long 0"
}

/// A disk that boots this program.
///
/// # Panics
/// If the program is larger than what the boot sector loads.
pub fn disk(program: &[u8]) -> Vec<u8> {
    assert!(program.len() <= MAX_PROGRAM, "the program is too large");
    let mut disk = [boot_sector(), program].concat();
    disk.resize(Geometry { cylinders: 1 }.bytes() as usize, 0);
    disk
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_sector_is_one() {
        let sector = boot_sector();
        assert_eq!((sector.len(), &sector[510..]), (512, &[0x55, 0xaa][..]));
    }
}
