//! VT-x is not offered to guests: CPUID does not show it, CR4.VMXE cannot be set, and its
//! instructions raise #UD like anything undefined. All of them leave the guest whatever the
//! hypervisor wants, so it must know each.
//!
//! Exit codes: success; 0x30 to 0x33, see the constants.

#![no_std]
#![no_main]

use guests::exit::Failure;
use guests::trap::{Exception, Run, vector};
use guests::{Boot, cpu, guest, println, probe};

guest!(main);

const OFFERED: Failure = Failure::new(0x30, "CPUID offers VMX");
const ENABLED: Failure = Failure::new(0x31, "CR4.VMXE reads as set");
const ENABLE_TAKEN: Failure = Failure::new(0x32, "setting CR4.VMXE gave no #GP(0)");
const NOT_UNDEFINED: Failure = Failure::new(0x33, "an instruction of VMX gave no #UD");

const CR4_VMXE: u64 = 1 << 13;

fn main(_: &Boot) -> Result<(), Failure> {
    println!("VT-x is hidden");
    OFFERED.unless(cpu::cpuid(1).ecx & 1 << 5 == 0)?;
    let cr4: u64;
    // SAFETY: only reads.
    unsafe {
        core::arch::asm!("mov {}, cr4", out(reg) cr4, options(nomem, nostack, preserves_flags))
    };
    ENABLED.unless(cr4 & CR4_VMXE == 0)?;
    // SAFETY: should it be taken, nothing follows from it.
    let run = unsafe { probe!(2, ["mov cr4, {value}"], value = in(reg) cr4 | CR4_VMXE) };
    ENABLE_TAKEN.unless(run.caught.is_some_and(Exception::is_gp0))?;

    let mut operand = [0_u64; 2];
    let undefined = |name: &str, run: Run| {
        let right = run.caught.is_some_and(|exception| {
            exception.vector == vector::INVALID_OPCODE && exception.rip == run.at
        });
        if !right {
            println!("{name}: {:x?}", run.caught);
        }
        NOT_UNDEFINED.unless(right)
    };
    macro_rules! undefined {
        ($($instruction:literal)+) => {
            $(
                // SAFETY: outside VMX operation each of them faults, and that is caught.
                undefined($instruction, unsafe {
                    probe!(
                        2,
                        [$instruction],
                        in("rax") 0_u64,
                        in("rcx") 0_u64,
                        in("rdi") &raw mut operand
                    )
                })?;
            )+
        };
    }
    undefined!(
        "vmlaunch" "vmresume" "vmxoff" "vmxon [rdi]" "vmclear [rdi]" "vmptrld [rdi]" "vmptrst [rdi]"
        "vmread rax, rcx" "vmwrite rcx, rax" "invept rax, [rdi]" "invvpid rax, [rdi]" "vmfunc"
        "getsec"
    );
    Ok(())
}
