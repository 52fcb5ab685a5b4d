// The master boot record, in real mode: reads the rest of the loader from the boot disk to the
// addresses after itself, checks its sum and goes on there. Says on the screen and on the first
// serial port why it cannot.

.section .mbr, "awx"
.code16
.global boot_record, boot_drive, print, put, halt

.set RETRIES, 3
// The most that every BIOS reads at once without crossing a 64 KiB boundary.
.set CHUNK, 64
.set COM1, 0x3f8

boot_record:
    cli
    cld
    ljmp $0, $1f
1:  xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $boot_record, %sp
    sti
    movb %dl, boot_drive

    // 115200 baud, eight data bits, no parity, one stop bit.
    movw $COM1 + 3, %dx
    movb $0x80, %al
    outb %al, %dx
    movb $COM1 & 0xff, %dl
    movb $1, %al
    outb %al, %dx
    incw %dx
    movb $0, %al
    outb %al, %dx
    movb $(COM1 + 3) & 0xff, %dl
    movb $3, %al
    outb %al, %dx

    // Does the BIOS read by block number (enhanced disk drive specification, INT 13h function 41h)?
    movw $no_extensions, %si
    movw $0x55aa, %bx
    movb $0x41, %ah
    movb boot_drive, %dl
    int $0x13
    jc fail
    cmpw $0xaa55, %bx
    jne fail
    testb $1, %cl
    jz fail

    movw $loader_sectors, %bp
read:
    movw $CHUNK, %ax
    cmpw %ax, %bp
    jae 1f
    movw %bp, %ax
1:  movw $RETRIES, %di
    // The BIOS replaces the count by what it has read, which is less if it failed.
2:  movw %ax, packet_count
    pushaw
    movw $packet, %si
    movb $0x42, %ah
    movb boot_drive, %dl
    int $0x13
    movb %ah, status
    popaw
    jnc 3f
    movw $unreadable, %si
    decw %di
    jz fail
    pushaw
    movb $0, %ah
    movb boot_drive, %dl
    int $0x13
    popaw
    jmp 2b
3:  movzwl %ax, %eax
    addl %eax, packet_block
    subw %ax, %bp
    shlw $5, %ax
    addw %ax, packet_segment
    testw %bp, %bp
    jnz read

    // The sum of all words read, segment by segment.
    movw $loader_sectors, %cx
    movw $0x7e0, %bx
    xorl %edx, %edx
4:  movw %bx, %ds
    xorw %si, %si
5:  lodsl
    addl %eax, %edx
    testw $0x1ff, %si
    jnz 5b
    addw $0x20, %bx
    loop 4b
    movw %cx, %ds
    movw $damaged, %si
    cmpl loader_sum, %edx
    je real_start

fail:
    movw $prefix, %di
    xchgw %si, %di
    call print
    xchgw %si, %di
    call print
    // The BIOS's status in hexadecimal; zero where it reported none.
    movb status, %bl
    movw $2, %cx
6:  rolb $4, %bl
    movb %bl, %al
    andb $15, %al
    cmpb $10, %al
    sbbb $0x69, %al
    das
    call put
    loop 6b
// The message stays until a key is pressed; the machine then starts anew.
halt:
    movw $stopped, %si
    call print
    movb $0, %ah
    int $0x16
    ljmp $0xffff, $0

// Prints the zero-terminated text at SI.
print:
    lodsb
    testb %al, %al
    jz 8f
    call put
    jmp print
8:  ret

// Prints AL.
put:
    pushaw
    movb $0x0e, %ah
    movw $7, %bx
    pushw %ax
    int $0x10
    // Wait for the transmitter, but not for ever: there may be no serial port.
    movw $COM1 + 5, %dx
    xorw %cx, %cx
9:  inb %dx, %al
    testb $0x20, %al
    loopz 9b
    popw %ax
    movb $COM1 & 0xff, %dl
    outb %al, %dx
    popaw
    ret

prefix:        .asciz "boot: "
no_extensions: .asciz "the BIOS cannot read disks by LBA; status "
unreadable:    .asciz "cannot read the loader; status "
damaged:       .asciz "the loader is damaged; status "
stopped:       .asciz "\r\nboot: stopped\r\n"

boot_drive:    .byte 0
status:        .byte 0

// Filled in by the image builder: the block and the sum. The partition table follows.
.org 0x1a4
packet:         .byte 16, 0
packet_count:   .word 0
                .word 0
packet_segment: .word 0x7e0
packet_block:   .quad 0
loader_sum:     .long 0
.org 0x1fe
                .word 0xaa55

// Filled in by the image builder.
.section .table, "aw"
.global disk_table
disk_table:
.skip 512
