//! Code at an outer ring, and back.

use core::arch::naked_asm;
use core::ffi::c_void;
use core::mem::MaybeUninit;

use crate::area::{self, AREA_MASK, HOME};
use crate::segments;
use crate::trap::vector;

/// RFLAGS of an outer ring: IOPL 3, so that it can print and exit; interrupts off.
const RFLAGS: u64 = 3 << 12 | 2;

/// A privilege level outside ring 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Ring {
    /// CPL 1
    One = 1,
    /// CPL 2
    Two = 2,
    /// CPL 3
    Three = 3,
}

/// Runs `f` at `ring`, in 64-bit mode, and returns its result. Called at CPL 0; does not nest.
///
/// Ring 0's memory is open to it, its ports too; privileged instructions are not.
pub fn in_ring<F: FnOnce() -> R, R>(ring: Ring, f: F) -> R {
    struct Call<F, R> {
        f: Option<F>,
        result: MaybeUninit<R>,
    }

    extern "C" fn run<F: FnOnce() -> R, R>(call: *mut c_void) {
        // SAFETY: `call` is the one below, which lives until this returns.
        let call = unsafe { &mut *call.cast::<Call<F, R>>() };
        if let Some(f) = call.f.take() {
            call.result.write(f());
        }
    }

    let mut call = Call { f: Some(f), result: MaybeUninit::uninit() };
    let ring = ring as u16;
    // SAFETY: (1) the selectors are those of 64-bit segments of that ring; (2) nothing else uses
    // its stack, as calls do not nest; (3) `run` gets the data of its own type.
    unsafe {
        enter(
            run::<F, R>,
            (&raw mut call).cast(),
            u64::from(segments::code(ring)),
            u64::from(segments::data(ring)),
            area::area().outer.top(),
        );
        call.result.assume_init()
    }
}

/// Keeps the callee-saved registers and leaves for the outer ring; [`return_gate`] comes back to
/// the caller.
#[unsafe(naked)]
unsafe extern "C" fn enter(
    f: extern "C" fn(*mut c_void),
    data: *mut c_void,
    cs: u64,
    ss: u64,
    stack: u64,
) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov rax, rsp",
        "and rax, {area}",
        "mov [rax + {home}], rsp",
        "push rcx",
        "push r8",
        "push {rflags}",
        "push rdx",
        "lea rax, [rip + 2f]",
        "push rax",
        "iretq",
        "2:",
        "mov rax, rdi",
        "mov rdi, rsi",
        "call rax",
        "int {gate}",
        "ud2",
        area = const AREA_MASK,
        home = const HOME,
        rflags = const RFLAGS,
        gate = const vector::RETURN,
    )
}

/// Where the INT of an outer ring arrives: drops that ring and returns from [`enter`].
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn return_gate() {
    naked_asm!(
        "cld",
        "and rsp, {area}",
        "mov rsp, [rsp + {home}]",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        area = const AREA_MASK,
        home = const HOME,
    )
}
