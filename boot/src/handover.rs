//! The last step: from the loader's page tables to the kernel's.
//!
//! One page, mapped at its physical address in both, holds the few instructions that change CR3 and
//! the segment descriptors that stay loaded until the kernel brings its own.

use core::{
    arch::{asm, global_asm},
    slice,
};

use x86_64::{
    PhysAddr, VirtAddr,
    registers::{
        control::{Cr0, Cr0Flags, Cr4, Cr4Flags},
        model_specific::{Efer, EferFlags},
    },
};

// Position-independent, copied to where it runs. Takes the physical address of the page tables in
// RDI, the kernel's stack in RSI, its entry in RDX and its argument in RCX. The descriptors have
// their accessed bits set, as the page is not writable.
global_asm!(
    r#"
    .pushsection .rodata.boot_handover, "a"
    .balign 8
    .global boot_handover_start, boot_handover_end
boot_handover_start:
    mov cr3, rdi
    mov rsp, rsi
    mov rdi, rcx
    lea rax, [rip + 3f]
    push rax
    sub rsp, 8
    mov word ptr [rsp + 6], 3 * 8 - 1
    lgdt [rsp + 6]
    add rsp, 16
    push 8
    lea rax, [rip + 2f]
    push rax
    retfq
2:  mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    xor ebp, ebp
    push 0
    jmp rdx
    .balign 8
3:  .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
boot_handover_end:
    .popsection
    "#
);

unsafe extern "C" {
    static boot_handover_start: u8;
    static boot_handover_end: u8;
}

/// What stays of CR4: what cannot be changed here, and machine checks, which firmware may have set
/// up. All else is off for the kernel, whatever firmware uses: no page of the old tables outlives them
/// as a global one, and nothing checks accesses and jumps in a way that the kernel does not expect.
const KEPT: Cr4Flags = Cr4Flags::PHYSICAL_ADDRESS_EXTENSION
    .union(Cr4Flags::L5_PAGING)
    .union(Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS)
    .union(Cr4Flags::MACHINE_CHECK_EXCEPTION);

/// What of CR4 is on for the kernel besides: its code uses SSE.
const ADDED: Cr4Flags = Cr4Flags::OSFXSR.union(Cr4Flags::OSXMMEXCPT_ENABLE);

/// What must stand in the handover page.
pub fn code() -> &'static [u8] {
    let (start, end) = (&raw const boot_handover_start, &raw const boot_handover_end);
    // SAFETY: the symbols delimit constant bytes, in one section, start before end.
    unsafe { slice::from_raw_parts(start, end as usize - start as usize) }
}

/// A kernel in place, ready to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handover {
    /// The kernel's highest page table.
    pub root: PhysAddr,
    /// The page with [`code`], identity-mapped as executable.
    pub page: PhysAddr,
    /// One above the kernel's stack, a multiple of 16.
    pub stack_top: VirtAddr,
    /// The kernel's entry point.
    pub entry: VirtAddr,
    /// The boot information, the entry point's argument.
    pub boot_info: VirtAddr,
}

impl Handover {
    /// Starts the kernel, with interrupts disabled, as the function call that its entry point
    /// expects.
    ///
    /// # Safety
    ///
    /// 1. `self` is the result of [`crate::load::load`] with physical memory that is really there,
    ///    and that memory is as `load` left it.
    /// 2. The CPU is in 64-bit mode, privileged, in the paging mode that `load` was told of, and
    ///    supports execute-disable.
    /// 3. `self.page` is executable at its physical address in the present page tables.
    /// 4. Nothing that the loader has is needed any more.
    pub unsafe fn enter(&self) -> ! {
        // SAFETY: 1. These turn on checks that the page tables rely on. The tables in force set
        // execute-disable only if it is on already, and the loader writes to no read-only page (2).
        // 2. In CR4, nothing is turned off that 64-bit mode or the tables in force need, nor
        // anything on that a CPU lacks.
        unsafe {
            Efer::update(|efer| efer.insert(EferFlags::NO_EXECUTE_ENABLE));
            Cr0::update(|cr0| cr0.insert(Cr0Flags::WRITE_PROTECT));
            Cr4::write_raw(Cr4::read_raw() & KEPT.bits() | ADDED.bits());
        }
        // SAFETY: the page holds `code` (1), which runs here (3) and there, needs no stack before it
        // has loaded the kernel's, and never returns.
        unsafe {
            asm!(
                "cli",
                "jmp {page}",
                page = in(reg) self.page.as_u64(),
                in("rdi") self.root.as_u64(),
                in("rsi") self.stack_top.as_u64(),
                in("rdx") self.entry.as_u64(),
                in("rcx") self.boot_info.as_u64(),
                options(noreturn)
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE;

    #[test]
    fn code_fits_a_page_and_ends_with_accessed_descriptors() {
        let code = code();
        assert!(code.len() as u64 <= PAGE);
        let (_, descriptors) = code.as_rchunks::<8>();
        let [.., null, text, data] = descriptors else { panic!("no descriptors") };
        assert_eq!(u64::from_le_bytes(*null), 0);
        for descriptor in [text, data] {
            assert_eq!(descriptor[5] & 0x91, 0x91, "present, not a system segment, accessed");
        }
        assert_eq!(text[6] >> 5 & 1, 1, "64-bit code");
    }
}
