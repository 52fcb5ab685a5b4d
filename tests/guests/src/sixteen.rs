//! The two 16-bit modes: real mode, and virtual-8086 mode, which is CPL 3 of protected mode. Long
//! mode is left and entered again for each instruction.
//!
//! In low memory, which the loader does not need any more once the guest runs:
//!
//! | address | |
//! |---|---|
//! | 0 | the interrupt vector table of real mode |
//! | 0x6000 | the stack |
//! | 0x7000 | the 16-bit code, copied from the image |
//! | 0x7400 | the instruction's operands and what became of it |
//! | 0x8000 | two pages with the operand |

use core::arch::{global_asm, naked_asm};
use core::mem::offset_of;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpu::EFLAGS_AC;
use crate::segments::{self, CODE16, CODE32, DATA16, GDT, Stack, TSS32, Table};
use crate::split::{Execution, Executor, Instruction};
use crate::trap::{self, Exception, Run};

/// Executes in real mode. [`Instruction::LockAdd`] and [`Instruction::Xchg`] only.
pub const REAL: Executor = Executor { arena: || ARENA as *mut u8, execute: real };

/// Executes in virtual-8086 mode, with IOPL 3. [`Instruction::LockAdd`] and [`Instruction::Xchg`]
/// only.
pub const VM86: Executor = Executor { arena: || ARENA as *mut u8, execute: vm86 };

/// Address of the code, and the top of the stack below it.
const CODE: u32 = 0x7000;
const MAIL: u32 = 0x7400;
const ARENA: u32 = 0x8000;

/// What goes to the 16-bit code and comes back.
#[repr(C)]
#[derive(Clone, Copy)]
struct Mail {
    /// Address of the operand.
    operand: u32,
    /// The register operand, there and back.
    register: u32,
    /// EFLAGS for the instruction, and behind it.
    eflags: u32,
    /// 1: XCHG, 0: LOCK ADD.
    xchg: u32,
    /// 1 if the instruction behind ran.
    continued: u32,
    /// Vector of the exception plus one; 0: none.
    caught: u32,
    error: u32,
    ip: u32,
    cs: u32,
}

const _: () = assert!(size_of::<Mail>() == 36);

fn real(instruction: Instruction, operand: *mut u8, register: &mut u32, rflags: u64) -> Execution {
    for vector in 0..32 {
        // SAFETY: the vector table of real mode, 4 bytes each: offset, segment 0.
        unsafe {
            let stub = low(&raw const vectors16) + 8 * vector;
            ptr::without_provenance_mut::<u32>(4 * vector as usize).write_volatile(stub);
        }
    }
    let mut execution = execute(&raw const real32, instruction, operand, register, rflags, 0);
    // Delivery clears AC, and the 16-bit image of the flags has no bit to restore it from.
    if execution.run.caught.is_some() {
        execution.run.rflags |= rflags & EFLAGS_AC;
    }
    execution
}

fn vm86(instruction: Instruction, operand: *mut u8, register: &mut u32, rflags: u64) -> Execution {
    const INTERRUPT_GATE: u64 = 0x8E << 40;
    for (vector, entry) in (0..).zip(&IDT32.0) {
        let stub = &raw const vectors32 as u64 + 16 * vector;
        let gate = stub & 0xFFFF | u64::from(CODE32) << 16 | INTERRUPT_GATE | stub >> 16 << 48;
        entry.store(gate, Ordering::Relaxed);
    }
    // ESP and SS of ring 0; the other fields are for task switches. No I/O map.
    const TSS_BYTES: usize = size_of_val(&TASK_STATE32.0);
    TASK_STATE32.0[0].store(STACK32.top() << 32, Ordering::Relaxed);
    TASK_STATE32.0[1].store(u64::from(segments::data(0)), Ordering::Relaxed);
    TASK_STATE32.0[12].store((TSS_BYTES as u64) << 48, Ordering::Relaxed);
    let descriptor = segments::tss_descriptor(&raw const TASK_STATE32 as u64, TSS_BYTES);
    GDT.0[usize::from(TSS32 / 8)].store(descriptor, Ordering::Relaxed);
    execute(&raw const vm86_32, instruction, operand, register, rflags, 3)
}

static IDT32: Table<32> = Table([const { AtomicU64::new(0) }; 32]);
static TASK_STATE32: Table<13> = Table([const { AtomicU64::new(0) }; 13]);
static STACK32: Stack<0x1000> = Stack::new();

/// Copies the code down, runs `entry`, 32-bit code that runs the 16-bit code, and reads the mail.
fn execute(
    entry: *const u8,
    instruction: Instruction,
    operand: *mut u8,
    register: &mut u32,
    rflags: u64,
    cpl: u8,
) -> Execution {
    let xchg = match instruction {
        Instruction::LockAdd => 0,
        Instruction::Xchg => 1,
        Instruction::Add | Instruction::Store => unimplemented!("{instruction:?} in 16-bit code"),
    };
    let mut mail = Mail {
        operand: operand as u32,
        register: *register,
        eflags: rflags as u32,
        xchg,
        continued: 0,
        caught: 0,
        error: 0,
        ip: 0,
        cs: 0,
    };
    let at = MAIL as *mut Mail;
    // SAFETY: (1) low memory is the guest's, and nothing else uses these parts of it; (2) the code
    // fits, as the assembler checks; (3) `entry` is one of the two entries below, which come back.
    unsafe {
        let code = &raw const code16;
        let bytes = (&raw const code16_end) as usize - code as usize;
        ptr::copy_nonoverlapping(code, CODE as *mut u8, bytes);
        at.write_volatile(mail);
        in_protected_mode(entry as u32);
        mail = at.read_volatile();
    }
    // Both the IDT and the task register are those of the other mode now.
    segments::load_tss();
    trap::load_idt();
    *register = mail.register;
    let caught = mail.caught.checked_sub(1).map(|vector| Exception {
        vector: vector as u8,
        error: u64::from(mail.error),
        rip: u64::from(mail.cs << 4) + u64::from(mail.ip),
        cpl,
        address: 0,
    });
    let at = low(if xchg == 1 { &raw const xchg16 } else { &raw const add16 });
    let run = Run { at: u64::from(at), rflags: u64::from(mail.eflags), caught };
    Execution { run, continued: u64::from(mail.continued) }
}

/// Where a label of the 16-bit code is once copied.
fn low(label: *const u8) -> u32 {
    (label as usize - &raw const code16 as usize) as u32 + CODE
}

/// RSP of long mode while another mode runs.
static HOME: AtomicU64 = AtomicU64::new(0);

/// Calls `entry` in 32-bit protected mode without paging: flat segments, interrupts off. It may
/// change every register but ESP, and what it likes of the IDT and TR.
#[unsafe(naked)]
unsafe extern "C" fn in_protected_mode(entry: u32) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rip + {home}], rsp",
        // Since an outer ring ran SS may be null, which only 64-bit mode bears.
        "mov eax, {data}",
        "mov ss, eax",
        "push {code32}",
        "lea rax, [rip + 2f]",
        "push rax",
        "retfq",

        ".code32",
        "2:",
        "mov eax, {data}",
        "mov ds, eax",
        "mov es, eax",
        "mov eax, cr0",
        "and eax, 0x7FFFFFFF",
        "mov cr0, eax",
        "mov ecx, 0xC0000080",
        "rdmsr",
        "and eax, ~0x100",
        "wrmsr",
        "call edi",
        "mov ecx, 0xC0000080",
        "rdmsr",
        "or eax, 0x100",
        "wrmsr",
        "mov eax, cr0",
        "or eax, 0x80000000",
        "mov cr0, eax",
        "push {code64}",
        "call 3f",
        // The return address is that of label 4, so this far return goes there.
        "4:",
        ".code64",
        "mov rsp, [rip + {home}]",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        ".code32",
        "3:",
        "retf",
        ".code64",
        home = sym HOME,
        data = const segments::data(0),
        code32 = const CODE32,
        code64 = const segments::code(0),
    )
}

unsafe extern "C" {
    /// Start and end of the 16-bit code in the image.
    safe static code16: u8;
    safe static code16_end: u8;
    /// The two instructions.
    safe static add16: u8;
    safe static xchg16: u8;
    /// Stubs of real mode's vectors, 8 bytes each.
    safe static vectors16: u8;
    /// Stubs of protected mode's vectors, under virtual-8086 mode, 16 bytes each.
    safe static vectors32: u8;
    /// 32-bit code for [`in_protected_mode`]: runs the 16-bit code in real mode.
    safe static real32: u8;
    /// The same in virtual-8086 mode.
    safe static vm86_32: u8;
}

global_asm!(
    r#"
    .pushsection .text.sixteen, "ax"

    // ---- 16-bit code, to be copied to {code}; DS = SS = 0 ----
    .balign 16
    .code16
    .global code16, code16_end, add16, xchg16, vectors16, real32, vm86_32, vectors32
code16:

// Executes the instruction: to be called, in either mode.
execute16:
    mov bx, [{mail} + {operand}]
    mov eax, [{mail} + {register}]
    xor ecx, ecx
    cmp byte ptr [{mail} + {xchg}], 0
    push dword ptr [{mail} + {eflags}]
    jne 2f
    popfd
add16:
    lock add dword ptr [bx], eax
    lea ecx, [ecx + 1]
    jmp executed16
2:  popfd
xchg16:
    xchg dword ptr [bx], eax
    lea ecx, [ecx + 1]

// Behind it, and where exceptions go on.
executed16:
    pushfd
    pop dword ptr [{mail} + {eflags}]
    mov [{mail} + {register}], eax
    mov [{mail} + {continued}], ecx
    // AC off again; two pushes of 16 bits.
    push 0
    push 2
    popfd
    ret

// Virtual-8086 mode starts here, and ends with the #GP of HLT.
vm86_16:
    call execute16
vm86_16_end:
    hlt

// The way to real mode: 16-bit protected mode first, for the segments' limits (SDM volume 3,
// "Switching Back to Real-Address Mode").
real16:
    mov ax, {data16}
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov fs, ax
    mov gs, ax
    mov eax, cr0
    and eax, 0xFFFFFFFE
    mov cr0, eax
    // Far jump to the next instruction, CS = 0.
    .byte 0xEA
    .word low_real16_far, 0
real16_far:
    xor eax, eax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov fs, ax
    mov gs, ax
    mov sp, {code}
    call execute16
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    // Far jump with a 32-bit offset.
    .byte 0x66, 0xEA
    .long real32_back
    .word {code32}

// An exception in real mode: no error code; the stack holds vector, IP, CS, FLAGS. Goes on behind
// the instruction without using that IP, so that a stack with an error code on it does no harm but
// is seen.
exception16:
    push bp
    mov bp, sp
    push eax
    movzx eax, word ptr [bp + 2]
    inc eax
    mov [{mail} + {caught}], eax
    movzx eax, word ptr [bp + 4]
    mov [{mail} + {ip}], eax
    movzx eax, word ptr [bp + 6]
    mov [{mail} + {cs}], eax
    push word ptr [bp + 8]
    popf
    pop eax
    // As it was in execute16: the return address, which takes 4 bytes.
    mov sp, {code} - 4
    jmp executed16

    .balign 8
vectors16:
    .set vector, 0
    .rept 32
    .balign 8
    .byte 0x6A, vector
    jmp exception16
    .set vector, vector + 1
    .endr
code16_end:
    // An error if the code does not fit.
    .org code16 + {mail} - {code}

    // Where it is once copied.
    .set low_executed16, executed16 - code16 + {code}
    .set low_vm86_16, vm86_16 - code16 + {code}
    .set low_vm86_16_end, vm86_16_end - code16 + {code}
    .set low_real16, real16 - code16 + {code}
    .set low_real16_far, real16_far - code16 + {code}

    // ---- 32-bit code, where it is linked ----
    .code32
real32:
    mov [home32], esp
    lidt [real_idt]
    .byte 0xEA
    .long low_real16
    .word {code16_selector}
real32_back:
    mov eax, {data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, [home32]
    ret

vm86_32:
    mov [home32], esp
    lidt [vm86_idt]
    mov eax, {tss32}
    ltr ax
    // GS, FS, DS, ES, SS, ESP, EFLAGS with VM and IOPL 3, CS, EIP.
    push 0
    push 0
    push 0
    push 0
    push 0
    push {code}
    push 0x23002
    push 0
    mov eax, offset low_vm86_16
    push eax
    iretd

// An exception from virtual-8086 mode: vector, error code, EIP, CS, EFLAGS on the stack. The #GP of
// the last HLT ends it, and so does one that comes from elsewhere.
exception32:
    push eax
    mov eax, {data}
    mov ds, eax
    cmp dword ptr [esp + 4], 13
    jne 2f
    cmp dword ptr [esp + 12], offset low_vm86_16_end
    je 3f
2:  mov eax, [esp + 4]
    inc eax
    mov [{mail} + {caught}], eax
    mov eax, [esp + 8]
    mov [{mail} + {error}], eax
    mov eax, [esp + 12]
    mov [{mail} + {ip}], eax
    mov eax, [esp + 16]
    mov [{mail} + {cs}], eax
    test dword ptr [esp + 20], 0x20000
    jz 3f
    mov dword ptr [esp + 12], offset low_executed16
    pop eax
    add esp, 8
    iretd
3:  mov eax, {data}
    mov es, eax
    mov esp, [home32]
    ret

    .balign 16
vectors32:
    .set vector, 0
    .rept 32
    .balign 16
    .if ((0x60227D00 >> vector) & 1) == 0
    push 0
    .endif
    .byte 0x6A, vector
    jmp exception32
    .set vector, vector + 1
    .endr

real_idt:
    .word 32 * 4 - 1
    .long 0
vm86_idt:
    .word 32 * 8 - 1
    .long {idt32}
    .code64
    .popsection

    .pushsection .bss.sixteen, "aw", @nobits
home32:
    .zero 4
    .popsection
    "#,
    code = const CODE,
    mail = const MAIL,
    operand = const offset_of!(Mail, operand),
    register = const offset_of!(Mail, register),
    eflags = const offset_of!(Mail, eflags),
    xchg = const offset_of!(Mail, xchg),
    continued = const offset_of!(Mail, continued),
    caught = const offset_of!(Mail, caught),
    error = const offset_of!(Mail, error),
    ip = const offset_of!(Mail, ip),
    cs = const offset_of!(Mail, cs),
    data = const segments::data(0),
    data16 = const DATA16,
    code32 = const CODE32,
    code16_selector = const CODE16,
    tss32 = const TSS32,
    idt32 = sym IDT32,
);
