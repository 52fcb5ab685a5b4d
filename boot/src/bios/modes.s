// Between real mode, where the BIOS lives, and 64-bit mode, where the loader does.

.section .real, "awx"
.global bios_call, bios_registers, bios_target, idt_pointer

.set NULL, 0
.set CODE64, 8
.set DATA, 16
.set CODE16, 24
.set DATA16, 32

.set TABLES, 0x6a000
.set REAL_STACK, 0x7c00

.set CR0_PE, 1 << 0
.set CR0_MP, 1 << 1
.set CR0_EM, 1 << 2
.set CR0_TS, 1 << 3
.set CR0_PG, 1 << 31
.set CR4_PAE, 1 << 5
.set CR4_OSFXSR, 1 << 9
.set CR4_OSXMMEXCPT, 1 << 10
.set EFER, 0xc0000080
.set EFER_LME, 1 << 8
.set EFLAGS_ID, 1 << 21
.set CPUID_LM, 1 << 29
.set CPUID_NX, 1 << 20

// From the boot record: DS, ES and SS are 0 and 16-bit code can go on.
.code16
.global real_start
real_start:
    // CPUID exists if the ID flag can be changed.
    movw $no_long_mode, %si
    pushfl
    popl %eax
    movl %eax, %ecx
    xorl $EFLAGS_ID, %eax
    pushl %eax
    popfl
    pushfl
    popl %eax
    cmpl %eax, %ecx
    je refuse
    movl $0x80000000, %eax
    cpuid
    cmpl $0x80000001, %eax
    jb refuse
    movl $0x80000001, %eax
    cpuid
    testl $CPUID_LM, %edx
    jz refuse
    movw $no_execute_disable, %si
    testl $CPUID_NX, %edx
    jz refuse

    // Page tables: the first 4 GiB at their physical addresses, in pages of 2 MiB. One table of the
    // highest level, one of the second, four of the third.
    movw $TABLES >> 4, %ax
    movw %ax, %es
    xorw %di, %di
    movw $2 * 4096 / 4, %cx
    xorl %eax, %eax
    rep stosl
    movl $TABLES + 0x1000 + 3, %es:0
    movl $TABLES + 0x2000 + 3, %es:0x1000
    movl $TABLES + 0x3000 + 3, %es:0x1008
    movl $TABLES + 0x4000 + 3, %es:0x1010
    movl $TABLES + 0x5000 + 3, %es:0x1018
    movl $0x83, %eax
    movw $2048, %cx
1:  stosl
    movl $0, %es:(%di)
    addw $4, %di
    addl $0x200000, %eax
    loop 1b
    cli
    jmp enter_long_mode

refuse:
    pushw %si
    movw $refusal, %si
    call print
    popw %si
    call print
    jmp halt

refusal:            .asciz "boot: this CPU has no "
no_long_mode:       .asciz "64-bit mode"
no_execute_disable: .asciz "execute-disable (it may be switched off in the BIOS setup)"

// Straight from real to 64-bit mode (Intel SDM volume 3, "Initializing IA-32e Mode"), and on at
// long_resume. SSE is usable from there on, as compiled code needs it.
enter_long_mode:
    lgdtl gdt_pointer
    movl %cr4, %eax
    orl $CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT, %eax
    movl %eax, %cr4
    movl $TABLES, %eax
    movl %eax, %cr3
    movl $EFER, %ecx
    rdmsr
    orl $EFER_LME, %eax
    wrmsr
    movl %cr0, %eax
    andl $~(CR0_EM | CR0_TS), %eax
    orl $CR0_PG | CR0_MP | CR0_PE, %eax
    movl %eax, %cr0
    ljmpl $CODE64, $1f
.code64
1:  movl $DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    lidt idt_pointer
    movq long_stack, %rsp
    jmp *long_resume

// The first time: clears what the disk image does not hold, and calls the loader.
long_start:
    movl $bss_start, %edi
    movl $bss_end, %ecx
    subl %edi, %ecx
    xorl %eax, %eax
    rep stosb
    xorl %ebp, %ebp
    call loader_main
    ud2

// extern "sysv64" fn(): calls the BIOS at bios_target with bios_registers, and stores there what
// it returns. Interrupts are on meanwhile, as the BIOS expects.
bios_call:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, long_stack
    movq $long_return, long_resume
    pushq $CODE16
    pushq $1f
    lretq
// Compatibility mode: paging off leaves 64-bit mode, and segments as real mode wants them.
.code16
1:  movw $DATA16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %fs
    movw %ax, %gs
    movw %ax, %ss
    movl %cr0, %eax
    andl $~CR0_PG, %eax
    movl %eax, %cr0
    movl $EFER, %ecx
    rdmsr
    andl $~EFER_LME, %eax
    wrmsr
    movl %cr0, %eax
    andl $~CR0_PE, %eax
    movl %eax, %cr0
    ljmp $0, $2f
2:  xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %fs
    movw %ax, %gs
    movw %ax, %ss
    movw $REAL_STACK, %sp
    lidtl real_idt_pointer
    movl register_eax, %eax
    movl register_ebx, %ebx
    movl register_ecx, %ecx
    movl register_edx, %edx
    movl register_esi, %esi
    movl register_edi, %edi
    movl register_ebp, %ebp
    movw register_es, %es
    pushw register_ds
    popw %ds
    // As INT does it: flags with interrupts on, to return to; off for the handler.
    sti
    pushfw
    cli
    lcallw *%cs:bios_target
    pushfw
    pushw %ds
    pushw $0
    popw %ds
    popw register_ds
    popw register_flags
    movw %es, register_es
    movl %eax, register_eax
    movl %ebx, register_ebx
    movl %ecx, register_ecx
    movl %edx, register_edx
    movl %esi, register_esi
    movl %edi, register_edi
    movl %ebp, register_ebp
    cli
    cld
    jmp enter_long_mode

// What bios_target can point to instead of a handler of the BIOS: prints AL.
.global put_handler
put_handler:
    call put
    iretw

.code64
long_return:
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    retq

// Exceptions of the loader itself, which are faults in it: vector and error code (0 if the CPU
// pushes none) in one frame for all, 16 bytes of code for each vector.
.global exception_entries
.balign 16
exception_entries:
.set vector, 0
.rept 32
    .balign 16
    .if !((0x60227d00 >> vector) & 1)
    pushq $0
    .endif
    pushq $vector
    jmp exception_common
    .set vector, vector + 1
.endr
exception_common:
    movq %rsp, %rdi
    andq $-16, %rsp
    cld
    call loader_exception
    ud2

.balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00009b000000ffff
    .quad 0x000093000000ffff
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
real_idt_pointer:
    .word 0x3ff
    .long 0
.balign 8
idt_pointer:
    .word 0
    .quad 0
.balign 8
long_stack:  .quad stack_top
long_resume: .quad long_start

bios_registers:
register_eax:   .long 0
register_ebx:   .long 0
register_ecx:   .long 0
register_edx:   .long 0
register_esi:   .long 0
register_edi:   .long 0
register_ebp:   .long 0
register_ds:    .word 0
register_es:    .word 0
register_flags: .word 0
                .word 0
bios_target:    .long 0
