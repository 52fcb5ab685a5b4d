//! Exceptions and interrupts: the IDT, what an exception was, and instructions that are allowed to
//! raise one.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::{fmt, mem};

use crate::area::{local, this_cpu};
use crate::segments::{self, IST_DOUBLE_FAULT, IST_EXCEPTION, IST_NMI, Table, TablePointer};
use crate::{cpu, exit, println, ring};

/// Vectors that the guests speak of (SDM volume 3, "Exceptions and Interrupts Reference").
pub mod vector {
    /// #DB
    pub const DEBUG: u8 = 1;
    /// NMI
    pub const NMI: u8 = 2;
    /// #BP
    pub const BREAKPOINT: u8 = 3;
    /// #UD
    pub const INVALID_OPCODE: u8 = 6;
    /// #DF
    pub const DOUBLE_FAULT: u8 = 8;
    /// #GP
    pub const GENERAL_PROTECTION: u8 = 13;
    /// #PF
    pub const PAGE_FAULT: u8 = 14;
    /// #AC
    pub const ALIGNMENT_CHECK: u8 = 17;
    /// The way back from an outer ring.
    pub(crate) const RETURN: u8 = 0x80;
}

/// An exception as it arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// 0..=31.
    pub vector: u8,
    /// The error code; 0 for vectors without one.
    pub error: u64,
    /// Address of the instruction that it returns to.
    pub rip: u64,
    /// The privilege level that was left.
    pub cpl: u8,
    /// CR2, if it is a page fault, else 0.
    pub address: u64,
}

impl Exception {
    /// Whether it is #GP with error code 0, what most forbidden instructions raise.
    pub fn is_gp0(self) -> bool {
        self.vector == vector::GENERAL_PROTECTION && self.error == 0
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { vector, error, rip, cpl, address } = self;
        write!(f, "exception {vector} error {error:#x} rip {rip:#x} cpl {cpl} address {address:#x}")
    }
}

/// What became of the instructions of a [`probe!`](crate::probe).
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Address of the first of them.
    pub at: u64,
    /// RFLAGS behind the last, or as they were when the exception arrived.
    pub rflags: u64,
    /// The exception that ended them.
    pub caught: Option<Exception>,
}

/// Runs instructions (Intel syntax, as in `asm!`) with RFLAGS set to `flags` and returns the
/// [`Run`].
///
/// An exception in them ends them; execution goes on behind them at the same CPL, RFLAGS restored
/// in either case. Outputs then hold what the instructions before the exception left there: make
/// them `inout`. The instructions leave RSP alone.
///
/// ```ignore
/// let run = unsafe { probe!(2, ["mov {}, [{}]"], inout(reg) 0_u64 => value, in(reg) address) };
/// ```
#[macro_export]
macro_rules! probe {
    ($flags:expr, [$($line:expr),+ $(,)?] $(, $($operands:tt)*)?) => {{
        let mut rflags: u64 = $flags;
        let at: u64;
        core::arch::asm!(
            "pushfq",
            "push {probe_rflags}",
            "popfq",
            "lea {probe_at}, [rip + 93f]",
            "mov qword ptr [{probe_recovery}], {probe_at}",
            "lea {probe_at}, [rip + 92f]",
            "92:",
            $($line,)+
            "mov qword ptr [{probe_recovery}], 0",
            "93:",
            "pushfq",
            "pop {probe_rflags}",
            "popfq",
            $($($operands)*,)?
            probe_rflags = inout(reg) rflags,
            probe_at = out(reg) at,
            probe_recovery = in(reg) $crate::trap::recovery(),
        );
        $crate::trap::Run { at, rflags, caught: $crate::trap::take() }
    }};
}

/// Where this CPU's probes say where they want to go on after an exception.
#[doc(hidden)]
pub fn recovery() -> *mut u64 {
    local().recovery.as_ptr()
}

/// The exception that this CPU's last probe caught, once.
#[doc(hidden)]
pub fn take() -> Option<Exception> {
    let caught = &local().caught;
    let [vector, error, rip, cpl, address] =
        [0, 1, 2, 3, 4].map(|index| caught[index].load(Ordering::Relaxed));
    caught[0].store(0, Ordering::Relaxed);
    let vector = vector.checked_sub(1)? as u8;
    Some(Exception { vector, error, rip, cpl: cpl as u8, address })
}

/// Ends the guest because of an exception that nothing asked for.
pub fn unexpected(exception: Exception) -> ! {
    match this_cpu() {
        0 => println!("unexpected {exception}"),
        cpu => println!("unexpected {exception} on CPU {cpu}"),
    }
    exit::exit(exit::UNEXPECTED_EXCEPTION)
}

/// What the stubs and the processor leave on the stack.
#[repr(C)]
struct Frame {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

extern "C" fn dispatch(frame: &mut Frame) {
    let vector = frame.vector as u8;
    if vector >= FIRST_INTERRUPT || vector == vector::NMI && INTERRUPTS.load(Ordering::Relaxed) {
        return interrupt(vector);
    }
    let address = if vector == vector::PAGE_FAULT { cpu::cr2() } else { 0 };
    let cpl = (frame.cs & 3) as u8;
    let exception = Exception { vector, error: frame.error, rip: frame.rip, cpl, address };
    let local = local();
    let recovery = local.recovery.swap(0, Ordering::Relaxed);
    if recovery == 0 {
        unexpected(exception);
    }
    let fields =
        [u64::from(vector) + 1, exception.error, exception.rip, u64::from(cpl), exception.address];
    for (slot, field) in local.caught.iter().zip(fields) {
        slot.store(field, Ordering::Relaxed);
    }
    frame.rip = recovery;
}

/// The first vector that is not an exception's.
pub const FIRST_INTERRUPT: u8 = 32;
/// One behind the last vector that has a stub.
const STUBS: u8 = 0x80;

/// Whether interrupts are taken.
static INTERRUPTS: AtomicBool = AtomicBool::new(false);
/// What is called when an interrupt arrives: a `fn()`, or 0.
static ACTIONS: [AtomicU64; STUBS as usize] = [const { AtomicU64::new(0) }; STUBS as usize];

/// Takes interrupts (32..=0x7F) and NMIs from now on: each counts at the CPU where it arrives, and
/// the interrupts get their EOI, by x2APIC.
pub fn take_interrupts() {
    INTERRUPTS.store(true, Ordering::Relaxed);
    (FIRST_INTERRUPT..STUBS).for_each(set_runtime_gate);
}

/// Calls `action` each time this interrupt (at most 0x7F) or NMI arrives, before it counts.
///
/// `action` runs with interrupts off, in the middle of whatever: it does not use
/// [`probe!`](crate::probe), nor what is made of it.
pub fn on_interrupt(vector: u8, action: fn()) {
    ACTIONS[usize::from(vector)].store(action as usize as u64, Ordering::Relaxed);
}

fn interrupt(vector: u8) {
    const EOI: u32 = 0x80B;
    let action = ACTIONS[usize::from(vector)].load(Ordering::Relaxed);
    if action != 0 {
        // SAFETY: stored as a `fn()`.
        unsafe { mem::transmute::<usize, fn()>(action as usize)() };
    }
    // Only this CPU writes it. Release: who sees the count sees what `action` did.
    let count = &local().arrived[usize::from(vector)];
    count.store(count.load(Ordering::Relaxed) + 1, Ordering::Release);
    if vector != vector::NMI {
        // SAFETY: EOI of an interrupt, at its end.
        unsafe { asm!("wrmsr", in("ecx") EOI, in("eax") 0, in("edx") 0, options(nostack)) };
    }
}

// One stub of 16 bytes per vector: it pushes a zero where the processor pushes no error code (those
// that do: 8, 10-14, 17, 21, 29, 30), then the vector. The common part keeps all registers that
// compiled code may change, XMM included. Stack: the processor aligns it to 16 and pushes 40 bytes;
// error code, vector and nine registers make it 16 n again.
global_asm!(
    r#"
    .pushsection .text.exceptions, "ax"
    .balign 16
exception_stubs:
    .set vector, 0
    .rept {stubs}
    .balign 16
    .if vector >= 32 || ((0x60227D00 >> (vector & 31)) & 1) == 0
    push 0
    .endif
    .byte 0x6A, vector
    jmp exception_common
    .set vector, vector + 1
    .endr

exception_common:
    push rax
    push rcx
    push rdx
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    lea rdi, [rsp + 72]
    sub rsp, 512
    fxsave64 [rsp]
    cld
    call {dispatch}
    fxrstor64 [rsp]
    add rsp, 512
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq
    .popsection
    "#,
    dispatch = sym dispatch,
    stubs = const STUBS,
);

unsafe extern "C" {
    /// Stubs of 16 bytes.
    safe static exception_stubs: u8;
}

/// Two words for each vector up to [`vector::RETURN`]. Those of interrupts, from 32 on, are not
/// present unless something below makes them so.
static IDT: Table<{ 2 * (vector::RETURN as usize + 1) }> =
    Table([const { AtomicU64::new(0) }; 2 * (vector::RETURN as usize + 1)]);

/// Points a vector at `handler`, on an IST stack, callable by INT from rings up to `privilege`.
fn set_gate(vector: u8, handler: u64, stack: u64, privilege: u64) {
    const PRESENT_INTERRUPT_GATE: u64 = 0x8E << 40;
    let low = handler & 0xFFFF
        | u64::from(segments::code(0)) << 16
        | stack << 32
        | PRESENT_INTERRUPT_GATE
        | privilege << 45
        | (handler >> 16 & 0xFFFF) << 48;
    IDT.0[2 * usize::from(vector)].store(low, Ordering::Relaxed);
    IDT.0[2 * usize::from(vector) + 1].store(handler >> 32, Ordering::Relaxed);
}

/// Fills and loads the IDT.
pub(crate) fn init() {
    (0..32).for_each(set_runtime_gate);
    set_gate(vector::RETURN, ring::return_gate as *const () as u64, IST_EXCEPTION, 3);
    load_idt();
}

/// Runs `f` while `handler` takes the exceptions or interrupts of this vector (0..=0x7F), instead of
/// the runtime or of nobody.
///
/// # Safety
///
/// `handler` stands in the IDT itself: it finds the exception's stack frame, with an error code on
/// top where the vector has one, and has to leave by IRET with all registers as they were.
pub unsafe fn with_handler<R>(
    vector: u8,
    handler: unsafe extern "C" fn(),
    f: impl FnOnce() -> R,
) -> R {
    let gate = [0, 1].map(|word| &IDT.0[2 * usize::from(vector) + word]);
    let before = gate.map(|word| word.load(Ordering::Relaxed));
    // SAFETY: the caller vouches for the handler.
    unsafe { set_handler(vector, handler) };
    let result = f();
    for (word, before) in gate.iter().zip(before) {
        word.store(before, Ordering::Relaxed);
    }
    result
}

/// Lets `handler` take the exceptions or interrupts of this vector (0..=0x7F), on every CPU.
///
/// # Safety
///
/// As [`with_handler`].
pub unsafe fn set_handler(vector: u8, handler: unsafe extern "C" fn()) {
    set_gate(vector, handler as *const () as u64, stack_of(vector), 0);
}

/// Points a vector at its stub.
fn set_runtime_gate(vector: u8) {
    let stub = &raw const exception_stubs as u64 + 16 * u64::from(vector);
    set_gate(vector, stub, stack_of(vector), 0);
}

/// Index of the IST stack of a vector.
fn stack_of(vector: u8) -> u64 {
    match vector {
        vector::NMI => IST_NMI,
        vector::DOUBLE_FAULT => IST_DOUBLE_FAULT,
        _ => IST_EXCEPTION,
    }
}

/// Loads the IDT.
pub(crate) fn load_idt() {
    let pointer = TablePointer::to(&IDT);
    // SAFETY: the table lives for ever and its gates lead to the stubs.
    unsafe { asm!("lidt [{}]", in(reg) &pointer, options(nostack, preserves_flags)) };
}
