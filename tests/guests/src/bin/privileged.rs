//! Control registers, EFER, XCR0 and the caches: what the manual forbids raises #GP(0) and changes
//! nothing, what it allows reads back as written. Whichever of it the hypervisor handles itself, no
//! value may reach VM entry that fails it.
//!
//! Exit codes: success; 0x30 to 0x35, see the constants.

#![no_std]
#![no_main]

use core::arch::asm;

use guests::exit::Failure;
use guests::trap::{Exception, Run, vector};
use guests::{Boot, cpu, guest, println, probe};

guest!(main);

const TAKEN: Failure = Failure::new(0x30, "a forbidden value gave no #GP(0)");
const CHANGED: Failure = Failure::new(0x31, "a refused write changed the register");
const REFUSED: Failure = Failure::new(0x32, "an allowed value was refused");
const NOT_READ_BACK: Failure = Failure::new(0x33, "the register does not read back as written");
const XSETBV: Failure = Failure::new(0x34, "XSETBV gave no #UD although CR4.OSXSAVE is clear");

const RESUME_FLAG: Failure =
    Failure::new(0x35, "RFLAGS.RF outlives the instruction that it was set for");

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_TS: u64 = 1 << 3;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR4_TSD: u64 = 1 << 2;
const CR4_PAE: u64 = 1 << 5;
const CR4_PGE: u64 = 1 << 7;
const CR4_LA57: u64 = 1 << 12;
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER: u32 = 0xC000_0080;
const EFER_SCE: u64 = 1 << 0;
const EFER_LME: u64 = 1 << 8;

/// Functions that read and write a control register, and fail on what they should not do.
macro_rules! control_register {
    ($name:ident, $register:literal) => {
        mod $name {
            use super::*;

            fn read() -> u64 {
                let value;
                // SAFETY: reading it has no effect.
                unsafe {
                    asm!(concat!("mov {}, ", $register), out(reg) value,
                        options(nomem, nostack, preserves_flags));
                }
                value
            }

            /// Writes `before` with `bits` flipped, reads it back and writes `before`, in one go:
            /// compiled code does not run with every value.
            fn flip(before: u64, bits: u64) -> (Run, u64) {
                let mut after = before;
                // SAFETY: the values below leave these instructions running, or are refused.
                let run = unsafe {
                    probe!(
                        2,
                        [
                            concat!("mov ", $register, ", {value}"),
                            concat!("mov {after}, ", $register),
                            concat!("mov ", $register, ", {before}"),
                        ],
                        value = in(reg) before ^ bits,
                        after = inout(reg) after,
                        before = in(reg) before
                    )
                };
                (run, after)
            }

            /// Flips `bits`, which is forbidden.
            pub fn refuses(bits: u64) -> Result<(), Failure> {
                let before = read();
                let (run, _) = flip(before, bits);
                if !run.caught.is_some_and(Exception::is_gp0) {
                    println!("{} = {:#x}: {:x?}", $register, before ^ bits, run.caught);
                    return Err(TAKEN);
                }
                CHANGED.unless(read() == before)
            }

            /// Flips `bits`, which is allowed, and flips them back.
            #[allow(dead_code)]
            pub fn takes(bits: u64) -> Result<(), Failure> {
                let before = read();
                let (run, after) = flip(before, bits);
                if run.caught.is_some() || after != before ^ bits {
                    println!("{} = {:#x}: {after:#x} {:x?}", $register, before ^ bits, run.caught);
                    REFUSED.unless(run.caught.is_none())?;
                    return Err(NOT_READ_BACK);
                }
                NOT_READ_BACK.unless(read() == before)
            }
        }
    };
}

control_register!(cr0, "cr0");
control_register!(cr3, "cr3");
control_register!(cr4, "cr4");
control_register!(cr8, "cr8");

fn main(_: &Boot) -> Result<(), Failure> {
    println!("control registers");
    // SAFETY: caches on, as every loader should leave them.
    unsafe { cpu::set_cr0(cpu::cr0() & !(CR0_CD | CR0_NW)) };
    // No paging without PE, no NW without CD; the upper half is reserved.
    for bits in [CR0_PE, CR0_NW, 1 << 32, 1 << 63] {
        cr0::refuses(bits)?;
    }
    for bits in [CR0_TS, CR0_MP, CR0_NE, cpu::CR0_AM, CR0_WP, CR0_CD, CR0_CD | CR0_NW] {
        cr0::takes(bits)?;
    }
    cr3::refuses(1 << 62)?;
    // In long mode PAE stays, and so does the number of paging levels.
    for bits in [CR4_PAE, CR4_LA57, 1 << 15, 1 << 32, 1 << 63] {
        cr4::refuses(bits)?;
    }
    for bits in [CR4_TSD, CR4_PGE] {
        cr4::takes(bits)?;
    }
    cr8::refuses(1 << 4)?;
    resume_flag()?;

    println!("EFER");
    let efer = cpu::rdmsr(EFER);
    let Ok(value) = efer else { return Err(NOT_READ_BACK) };
    // SAFETY: paging is on, so LME stays; SCE only enables an instruction that nothing here uses.
    unsafe {
        for bits in [EFER_LME, 1 << 1, 1 << 9, 1 << 32, 1 << 63] {
            TAKEN.unless(cpu::wrmsr(EFER, value ^ bits).is_err_and(Exception::is_gp0))?;
            CHANGED.unless(cpu::rdmsr(EFER) == efer)?;
        }
        for value in [value ^ EFER_SCE, value] {
            REFUSED.unless(cpu::wrmsr(EFER, value).is_ok())?;
            NOT_READ_BACK.unless(cpu::rdmsr(EFER) == Ok(value))?;
        }
    }

    println!("XCR0");
    let run = xsetbv(0, 1);
    XSETBV
        .unless(run.caught.is_some_and(|exception| exception.vector == vector::INVALID_OPCODE))?;
    if cpu::cpuid(1).ecx & 1 << 26 != 0 {
        extended_control()?;
    } else {
        cr4::refuses(CR4_OSXSAVE)?;
    }

    println!("caches");
    // SAFETY: memory outside the caches is not used. On a machine of its own INVD would lose
    // writes; a hypervisor cannot let it.
    unsafe { asm!("wbinvd", "invd", options(nostack, preserves_flags)) };
    Ok(())
}

fn xsetbv(register: u32, value: u64) -> Run {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: nothing here uses more than x87 and SSE state, whose bits are either kept or refused.
    unsafe { probe!(2, ["xsetbv"], in("ecx") register, in("eax") low, in("edx") high) }
}

/// XCR0, with CR4.OSXSAVE on for the time (SDM volume 1, "Enabling the XSAVE Feature Set and
/// XSAVE-Enabled Features").
fn extended_control() -> Result<(), Failure> {
    // SAFETY: only enables XSETBV and XGETBV, and the XSAVE instructions, which nothing here uses.
    unsafe {
        asm!("mov {0}, cr4", "or {0}, {1}", "mov cr4, {0}", out(reg) _, const CR4_OSXSAVE,
            options(nostack));
    }
    // SAFETY: CPUID leaf 1 must show what CR4 says.
    REFUSED.unless(cpu::cpuid(1).ecx & 1 << 27 != 0)?;
    // No x87 state, AVX without SSE, the reserved bit, and a register that does not exist.
    for (register, value) in [(0, 0), (0, 2), (0, 0b101), (0, 1 | 1 << 63), (1, 1)] {
        let run = xsetbv(register, value);
        if !run.caught.is_some_and(Exception::is_gp0) {
            println!("XCR{register} = {value:#x}: {:x?}", run.caught);
            return Err(TAKEN);
        }
    }
    for value in [1, 3, 1] {
        REFUSED.unless(xsetbv(0, value).caught.is_none())?;
        let (low, high): (u32, u32);
        // SAFETY: only reads.
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack));
        }
        NOT_READ_BACK.unless(u64::from(high) << 32 | u64::from(low) == value)?;
    }
    Ok(())
}

/// RFLAGS.RF suppresses a breakpoint on one instruction. IRET sets it for an IN, which exits and is
/// skipped by the hypervisor; the breakpoint on the next instruction must trap.
fn resume_flag() -> Result<(), Failure> {
    // Breakpoint 0, on execution; bit 10 is always 1.
    const DR7: u64 = 0x401;
    const DR7_OFF: u64 = 0x400;
    let breakpoint: u64;
    // SAFETY: IRET leads to the label behind it with the same stack; the #DB is caught.
    let run = unsafe {
        probe!(2, [
            "lea {at}, [rip + 5f]",
            "mov dr0, {at}",
            "mov dr7, {dr7}",
            "mov {stack}, rsp",
            "mov {other:e}, ss",
            "push {other}",
            "push {stack}",
            "pushfq",
            "or qword ptr [rsp], 0x10000",
            "mov {other:e}, cs",
            "push {other}",
            "lea {other}, [rip + 4f]",
            "push {other}",
            "iretq",
            "4: in al, 0x80",
            "5: nop",
        ], at = inout(reg) 0_u64 => breakpoint, dr7 = in(reg) DR7, stack = out(reg) _,
            other = out(reg) _, out("rax") _)
    };
    // SAFETY: no breakpoint is wanted any more.
    unsafe { asm!("mov dr7, {}", in(reg) DR7_OFF, options(nomem, nostack)) };
    let trapped =
        |exception: Exception| exception.vector == vector::DEBUG && exception.rip == breakpoint;
    RESUME_FLAG.unless(run.caught.is_some_and(trapped))
}
