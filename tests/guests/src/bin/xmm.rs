//! Fills XMM0 to XMM15 and MXCSR, then does things that leave the guest, again and again: CPUID,
//! ports, registers that exist and one that does not, whose #GP comes back through the guest's own
//! handler. Nothing of that may change them.
//!
//! Exit codes: success; 0x30 to 0x33, see the constants.

#![no_std]
#![no_main]

use core::arch::asm;

use guests::cpu;
use guests::exit::Failure;
use guests::trap::{self, Exception};
use guests::{Boot, guest, println};

guest!(main);

const XMM: Failure = Failure::new(0x30, "an XMM register changed");
const MXCSR: Failure = Failure::new(0x31, "MXCSR changed");
const GENERAL: Failure = Failure::new(0x32, "a general register changed");
const NO_EXCEPTION: Failure = Failure::new(0x33, "reading MSR 0xCF gave no #GP(0)");

/// Round towards zero, flush to zero, all exceptions masked: unlike the value after reset.
const CONTROL: u32 = 0xFF80;
const ROUNDS: u64 = 64;

/// An operand of FXSAVE and FXRSTOR (SDM volume 1, "Programming with Intel SSE", "Layout of the
/// FXSAVE area").
#[repr(C, align(16))]
#[derive(Clone, Copy)]
struct Area {
    control: u16,
    status: u16,
    tags: u16,
    opcode: u16,
    pointers: [u64; 2],
    mxcsr: u32,
    mxcsr_mask: u32,
    x87: [u128; 8],
    xmm: [u128; 16],
    reserved: [u128; 6],
}

const _: () = assert!(size_of::<Area>() == 512);

fn main(_: &Boot) -> Result<(), Failure> {
    println!("XMM registers and MXCSR across exits");
    let mut before = Area {
        control: 0x37F,
        status: 0,
        tags: 0,
        opcode: 0,
        pointers: [0; 2],
        mxcsr: CONTROL,
        mxcsr_mask: 0,
        x87: [0; 8],
        xmm: [0; 16],
        reserved: [0; 6],
    };
    for (index, register) in before.xmm.iter_mut().enumerate() {
        *register = 0x0123_4567_89AB_CDEF_FEDC_BA98_7654_3210_u128.rotate_left(8 * index as u32);
    }
    let mut after = Area { mxcsr: 0, xmm: [0; 16], ..before };
    let mut left = ROUNDS;
    let mut marks = [0x1111_u64, 0x2222, 0x3333];
    let [r12, r13, r14] = &mut marks;

    // SAFETY: (1) the areas are aligned and as large as the instructions want; (2) the ports are
    // the UART's scratch register and one that no device answers to; (3) EFER is only read; (4) the
    // exception of the last RDMSR goes on at label 3; (5) RBX, which CPUID changes, is kept.
    unsafe {
        asm!(
            "fxrstor64 [{before}]",
            "2:",
            "xor eax, eax",
            "xor ecx, ecx",
            "push rbx",
            "cpuid",
            "pop rbx",
            "mov dx, 0x3FF",
            "mov al, 0x5A",
            "out dx, al",
            "in al, dx",
            "mov dx, 0x4F0",
            "in eax, dx",
            "mov ecx, 0xC0000080",
            "rdmsr",
            "lea rax, [rip + 3f]",
            "mov [rip + {recovery}], rax",
            "mov ecx, 0xCF",
            "rdmsr",
            "mov qword ptr [rip + {recovery}], 0",
            "3:",
            "dec {left}",
            "jnz 2b",
            "fxsave64 [{after}]",
            before = in(reg) &raw const before,
            after = in(reg) &raw mut after,
            left = inout(reg) left,
            recovery = sym trap::RECOVERY,
            inout("r12") *r12, inout("r13") *r13, inout("r14") *r14,
            out("rax") _, out("rcx") _, out("rdx") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
        );
        asm!("ldmxcsr [{}]", in(reg) &0x1F80_u32, options(nostack));
    }

    for (index, (before, after)) in before.xmm.iter().zip(&after.xmm).enumerate() {
        if before != after {
            println!("XMM{index}: {before:#034x} became {after:#034x}");
            return Err(XMM);
        }
    }
    MXCSR.unless(after.mxcsr == CONTROL)?;
    GENERAL.unless(marks == [0x1111, 0x2222, 0x3333] && left == 0)?;
    // Every round caught it, the last one included, if this does.
    NO_EXCEPTION.unless(trap::take().is_some_and(Exception::is_gp0))?;
    NO_EXCEPTION.unless(cpu::rdmsr(0xCF).is_err_and(Exception::is_gp0))
}
