//! #AC while an event is being delivered: in ring 3 of protected mode, with alignment checking on
//! and ESP misaligned, an INT 0x80, an INT3, a #UD and an external interrupt whose gates stay in
//! ring 3 push what they push. The handler of #AC aligns ESP, and each of them has to arrive then,
//! once.
//!
//! Exit codes: success; 0x30 to 0x35, see the constants.

#![no_std]
#![no_main]

use core::arch::naked_asm;
use core::sync::atomic::AtomicU32;

use guests::cpu::wrmsr;
use guests::exit::{self, Failure};
use guests::protected::{self, Gate};
use guests::trap::vector;
use guests::{Boot, guest, println};

guest!(main);

/// ESP, after the event was delivered, is not the aligned one.
const WRONG_STACK: u8 = 0x30;
/// An #AC with an error code, from elsewhere, or with another return address.
const WRONG_AC: u8 = 0x31;
/// Not as many #AC as deliveries on a misaligned stack.
const WRONG_ACS: u8 = 0x32;
/// Not as many deliveries as events.
const WRONG_EVENTS: u8 = 0x33;
/// An #AC of a delivery on an aligned stack.
const ALIGNED: u8 = 0x34;

/// The local APIC, in x2APIC mode, takes no interrupt to itself.
const NO_INTERRUPT: Failure = Failure::new(0x35, "the local APIC takes no self IPI");

/// Three misalignments of three events, and one of the interrupt.
const MISALIGNED: u32 = 10;

/// The interrupt's vector.
const INTERRUPT: u8 = 0x40;
/// x2APIC MSRs: spurious interrupt vector, to enable the APIC; self IPI.
const SPURIOUS: (u32, u64) = (0x80F, 0x1FF);
const SELF_IPI: (u32, u64) = (0x83F, INTERRUPT as u64);

/// #AC that were taken.
static ACS: AtomicU32 = AtomicU32::new(0);
/// Events that were delivered.
static EVENTS: AtomicU32 = AtomicU32::new(0);
/// The instruction whose event comes next.
static AT: AtomicU32 = AtomicU32::new(0);

/// Executes the instructions, in ring 3.
#[unsafe(naked)]
unsafe extern "C" fn events() {
    naked_asm!(
        r#"
        .code32
        mov ebp, esp
        int 0x80
        cmp dword ptr [{acs}], 0
        mov al, {aligned}
        jne 9f

        .irpc misalignment, 123
        lea eax, [2f]
        mov [{at}], eax
        lea esp, [ebp - 64 - \misalignment]
    2:  int 0x80
        lea eax, [ebp - 68]
        cmp eax, esp
        mov al, {stack}
        jne 9f

        lea eax, [2f]
        mov [{at}], eax
        lea esp, [ebp - 64 - \misalignment]
    2:  int3
        lea eax, [ebp - 68]
        cmp eax, esp
        mov al, {stack}
        jne 9f

        lea eax, [2f]
        mov [{at}], eax
        lea esp, [ebp - 64 - \misalignment]
    2:  ud2
        lea eax, [ebp - 68]
        cmp eax, esp
        mov al, {stack}
        jne 9f
        .endr

        lea eax, [2f]
        mov [{at}], eax
        lea esp, [ebp - 64 - 2]
        sti
        nop
    2:  nop
        cli
        lea eax, [ebp - 68]
        cmp eax, esp
        mov al, {stack}
        jne 9f

        cmp dword ptr [{acs}], {misaligned}
        mov al, {wrong_acs}
        jne 9f
        cmp dword ptr [{events}], {misaligned} + 1
        mov al, {wrong_events}
        jne 9f
        mov al, {success}
    9:  out 0xF4, al
        jmp 9b
        .code64
        "#,
        acs = sym ACS,
        events = sym EVENTS,
        at = sym AT,
        misaligned = const MISALIGNED,
        aligned = const ALIGNED,
        stack = const WRONG_STACK,
        wrong_acs = const WRONG_ACS,
        wrong_events = const WRONG_EVENTS,
        success = const exit::SUCCESS,
    )
}

/// INT 0x80, INT3 and the interrupt, in ring 3.
#[unsafe(naked)]
unsafe extern "C" fn on_trap() {
    naked_asm!(".code32", "inc dword ptr [{events}]", "iretd", ".code64", events = sym EVENTS)
}

/// #UD, in ring 3.
#[unsafe(naked)]
unsafe extern "C" fn on_invalid_opcode() {
    naked_asm!(
        ".code32",
        "inc dword ptr [{events}]",
        "add dword ptr [esp], 2",
        "iretd",
        ".code64",
        events = sym EVENTS
    )
}

/// #AC, in ring 0: error code, EIP, CS, EFLAGS, ESP, SS on the stack.
#[unsafe(naked)]
unsafe extern "C" fn on_alignment_check() {
    naked_asm!(
        r#"
        .code32
        push eax
        cmp dword ptr [esp + 4], 0
        jne 2f
        mov eax, [esp + 8]
        cmp eax, [{at}]
        jne 2f
        test dword ptr [esp + 20], 3
        jz 2f
        inc dword ptr [{acs}]
        and dword ptr [esp + 20], ~3
        pop eax
        add esp, 4
        iretd
    2:  mov al, {wrong}
        out 0xF4, al
        jmp 2b
        .code64
        "#,
        at = sym AT,
        acs = sym ACS,
        wrong = const WRONG_AC,
    )
}

fn main(_: &Boot) -> Result<(), Failure> {
    println!("#AC while events are delivered");
    let gate = |vector, handler, ring| Gate { vector, handler, ring };
    let gates = [
        gate(0x80, on_trap, 3),
        gate(vector::BREAKPOINT, on_trap, 3),
        gate(INTERRUPT, on_trap, 3),
        gate(vector::INVALID_OPCODE, on_invalid_opcode, 3),
        gate(vector::ALIGNMENT_CHECK, on_alignment_check, 0),
    ];
    for (register, value) in [SPURIOUS, SELF_IPI] {
        // SAFETY: interrupts are off until the handler is there.
        NO_INTERRUPT.unless(unsafe { wrmsr(register, value) }.is_ok())?;
    }
    // SAFETY: all of it is 32-bit code.
    unsafe { protected::run(events, &gates) }
}
