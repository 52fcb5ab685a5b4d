// Where a CPU starts after SIPI: copied to a page below 1 MiB, which CS names. The fields at its end
// are filled in for each CPU. Straight from real to 64-bit mode, as SDM volume 3, section
// "Initializing IA-32e Mode", allows.

.section .rodata.startup, "a"
.global startup_begin, startup_end
.global startup_root, startup_cr4, startup_far, startup_gdt_pointer, startup_gdt, startup_long
.global startup_stack, startup_entry, startup_argument

.set CR0_PE, 1 << 0
.set CR0_MP, 1 << 1
.set CR0_ET, 1 << 4
.set CR0_NE, 1 << 5
.set CR0_WP, 1 << 16
.set CR0_PG, 1 << 31
.set CR4_PAE, 1 << 5
.set CR4_OSFXSR, 1 << 9
.set CR4_OSXMMEXCPT, 1 << 10
.set MISC_ENABLE, 0x1a0
.set MISC_XD_DISABLE, 1 << 2
.set CPUID_NX, 1 << 20
.set EFER, 0xc0000080
.set EFER_LME, 1 << 8
.set EFER_NXE, 1 << 11
.set CODE64, 8
.set DATA, 16

.balign 16
.code16
startup_begin:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl startup_gdt_pointer - startup_begin
    // Firmware can take "no execute" away, by bit 34 of IA32_MISC_ENABLE, for each CPU by itself. The
    // MSR is there if it did.
    movl $0x80000001, %eax
    cpuid
    testl $CPUID_NX, %edx
    jnz 1f
    movl $MISC_ENABLE, %ecx
    rdmsr
    andl $~MISC_XD_DISABLE, %edx
    wrmsr
1:
    // Four or five levels of page tables, as on the boot CPU.
    movl startup_cr4 - startup_begin, %eax
    orl $CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT, %eax
    movl %eax, %cr4
    movl startup_root - startup_begin, %eax
    movl %eax, %cr3
    movl $EFER, %ecx
    rdmsr
    orl $EFER_LME | EFER_NXE, %eax
    wrmsr
    movl $CR0_PG | CR0_WP | CR0_NE | CR0_ET | CR0_MP | CR0_PE, %eax
    movl %eax, %cr0
    ljmpl *startup_far - startup_begin
.code64
startup_long:
    movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    // Whoever takes the stack goes on. A CPU that comes when nobody waits for it any more gets none.
    xorl %eax, %eax
    xchgq %rax, startup_stack(%rip)
    testq %rax, %rax
    jz 1f
    movq %rax, %rsp
    movq startup_argument(%rip), %rdi
    pushq $0
    jmp *startup_entry(%rip)
1:  hlt
    jmp 1b

.balign 8
startup_gdt:          .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
startup_gdt_pointer:  .word 23
                      .long 0
.balign 8
startup_far:          .long 0
                      .word CODE64
.balign 8
startup_root:         .long 0
startup_cr4:          .long 0
.balign 8
startup_stack:        .quad 0
startup_entry:        .quad 0
startup_argument:     .quad 0
startup_end:
