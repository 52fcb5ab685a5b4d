// Firmware for a PC whose only purpose is to start Linux: the processor begins here, in real mode. Reads a table from
// the disk's first sector, then what that names, enters long mode and goes to the kernel, as Linux wants it
// (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
//
// The table, 32-bit numbers: page tables' address, kernel's entry, address of its boot parameters, 0; then, for each run of sectors,
// its address in memory and their number, up to a number of 0. The runs stand one behind the other from sector 1.

.section .rodata.linux_rom, "a"
.global linux_rom, linux_rom_end

// Address of the ROM's last 64 KiB, where this stands at the start.
.set ROM, 0xffff0000
.set TABLE, 0x7000
.set ENTRIES, TABLE + 16
.set ATA, 0x1f0
// The most sectors that one command reads; its count is then 0.
.set CHUNK, 256

linux_rom:
.code16
    cli
    cld
    lgdtl %cs:(gdt_pointer - linux_rom)
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmpl $0x08, $(ROM + protected - linux_rom)

.code32
protected:
    movw $0x18, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $TABLE, %esp

    xorl %ebx, %ebx
    movl $1, %ebp
    movl $TABLE, %edi
    call read
    movl $ENTRIES, %esi
1:  movl (%esi), %edi
    movl 4(%esi), %ebp
    addl $8, %esi
    testl %ebp, %ebp
    jz 2f
    call read
    jmp 1b
2:
    // Memory types: all write-back (IA32_MTRR_DEF_TYPE: E, type 6).
    movl $0x2ff, %ecx
    movl $0x806, %eax
    xorl %edx, %edx
    wrmsr
    // CR4.PAE, EFER.LME; then CR0.PG, with the caches on.
    movl $0x20, %eax
    movl %eax, %cr4
    movl TABLE, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80000033, %eax
    movl %eax, %cr0
    ljmpl $0x10, $(ROM + long - linux_rom)

.code64
long:
    movl TABLE + 4, %eax
    movl TABLE + 8, %esi
    jmp *%rax

.code32
// Reads EBP sectors from number EBX to EDI; moves on EBX and EDI.
read:
    pushl %esi
next:
    testl %ebp, %ebp
    jz done
    movl $CHUNK, %esi
    cmpl %esi, %ebp
    jae 1f
    movl %ebp, %esi
1:  movl $ATA + 7, %edx
2:  inb %dx, %al
    testb $0x80, %al
    jnz 2b
    // Device 0, and the number of 28 bits; count; READ SECTORS.
    movl %ebx, %eax
    shrl $24, %eax
    orb $0xe0, %al
    movl $ATA + 6, %edx
    outb %al, %dx
    movl %esi, %eax
    movl $ATA + 2, %edx
    outb %al, %dx
    movl %ebx, %eax
    incl %edx
    outb %al, %dx
    shrl $8, %eax
    incl %edx
    outb %al, %dx
    shrl $8, %eax
    incl %edx
    outb %al, %dx
    movb $0x20, %al
    movl $ATA + 7, %edx
    outb %al, %dx
3:  movl $ATA + 7, %edx
4:  inb %dx, %al
    testb $0x80, %al
    jnz 4b
    testb $0x21, %al
    jnz failed
    testb $0x08, %al
    jz 4b
    movl $ATA, %edx
    movl $128, %ecx
    rep insl
    incl %ebx
    decl %ebp
    decl %esi
    jnz 3b
    jmp next
done:
    popl %esi
    ret

// The disk does not read: off, which nobody takes for a run of Linux.
failed:
    movl $ROM + word - linux_rom, %esi
    movl $8, %ecx
    movl $0x8900, %edx
    rep outsb
5:  hlt
    jmp 5b
word:
    .ascii "Shutdown"

.balign 8
// Flat: code of 32 bits, code of 64 bits, data.
gdt:
    .quad 0, 0x00cf9a000000ffff, 0x00af9a000000ffff, 0x00cf92000000ffff
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long ROM + gdt - linux_rom
linux_rom_end:
