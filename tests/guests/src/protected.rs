//! Ring 3 of 32-bit protected mode without paging, where the processor does not align the stack
//! that it delivers an event on, as it does in long mode.

use core::arch::naked_asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpu::{CR0_AM, EFLAGS_AC};
use crate::segments::{self, CODE32, GDT, Stack, TSS32, Table, TablePointer};

/// Vectors that have a place in the IDT: up to that of INT 0x80.
const VECTORS: usize = 0x81;

/// A gate of the IDT: an interrupt gate that INT may use from ring 3.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    /// At most 0x80.
    pub vector: u8,
    /// 32-bit code. In ring 0 it finds its stack in the TSS.
    pub handler: unsafe extern "C" fn(),
    /// The ring that it runs in: 0 or 3.
    pub ring: u16,
}

/// The 32-bit TSS (SDM volume 3, "Task-State Segment (TSS)"), in double words.
struct TaskState(UnsafeCell<[u32; 26]>);
// SAFETY: written before it is loaded, by the only processor.
unsafe impl Sync for TaskState {}

static TASK_STATE: TaskState = TaskState(UnsafeCell::new([0; 26]));
static IDT: Table<VECTORS> = Table([const { AtomicU64::new(0) }; VECTORS]);
static RING0_STACK: Stack<0x1000> = Stack::new();
static RING3_STACK: Stack<0x1000> = Stack::new();

/// Enters `code` in ring 3, with CR0.AM and EFLAGS.AC set, interrupts off, all ports open, DS and
/// ES flat, and ESP at the aligned end of a stack. There is no way back: it ends the machine.
///
/// # Safety
///
/// `code` and the handlers are 32-bit code.
pub unsafe fn run(code: unsafe extern "C" fn(), gates: &[Gate]) -> ! {
    const GATE: u64 = 0xEE00 << 32;
    const CODE32_RING3: u64 = 0x00CF_FB00_0000_FFFF;
    for Gate { vector, handler, ring } in gates {
        let selector = if *ring == 0 { CODE32 } else { segments::code(3) };
        let handler = *handler as *const () as u64;
        let gate =
            handler & 0xFFFF | u64::from(selector) << 16 | GATE | (handler >> 16 & 0xFFFF) << 48;
        IDT.0[usize::from(*vector)].store(gate, Ordering::Relaxed);
    }
    GDT.0[usize::from(segments::code(3) / 8)].store(CODE32_RING3, Ordering::Relaxed);
    let state = TASK_STATE.0.get();
    // SAFETY: nothing else has a reference to it.
    unsafe {
        (*state)[1] = RING0_STACK.top() as u32;
        (*state)[2] = segments::data(0).into();
    }
    let descriptor = segments::tss_descriptor(state as u64, size_of::<[u32; 26]>());
    GDT.0[usize::from(TSS32 / 8)].store(descriptor, Ordering::Relaxed);
    let idt = TablePointer::to(&IDT);
    // SAFETY: tables and stacks are in place; the caller vouches for the code.
    unsafe { enter(code, RING3_STACK.top(), &raw const idt) }
}

/// Leaves long mode (SDM volume 3, "Switching Out of IA-32e Mode Operation") for ring 3.
#[unsafe(naked)]
unsafe extern "C" fn enter(
    code: unsafe extern "C" fn(),
    stack: u64,
    idt: *const TablePointer,
) -> ! {
    naked_asm!(
        r#"
        mov ebx, edx
        mov eax, {data0}
        mov ss, eax
        push {code32}
        lea rax, [rip + 2f]
        push rax
        retfq
        .code32
    2:  mov eax, cr0
        and eax, 0x7FFFFFFF
        or eax, {am}
        mov cr0, eax
        mov ecx, 0xC0000080
        rdmsr
        and eax, ~0x100
        wrmsr
        lidt [ebx]
        mov eax, {tss}
        ltr ax
        mov eax, {data3}
        mov ds, eax
        mov es, eax
        push eax
        push esi
        push {flags}
        push {code3}
        push edi
        iretd
        .code64
        "#,
        data0 = const segments::data(0),
        code32 = const CODE32,
        am = const CR0_AM,
        tss = const TSS32,
        data3 = const segments::data(3),
        code3 = const segments::code(3),
        flags = const EFLAGS_AC | 3 << 12 | 2,
    )
}
