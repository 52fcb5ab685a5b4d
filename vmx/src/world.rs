//! The world switch: VM entry and VM exit in assembly.

use core::arch::naked_asm;
use core::mem::offset_of;

/// Registers that neither VM entry nor VM exit touches, in the guest's values while the
/// hypervisor runs.
///
/// XMM registers are here because hypervisor code is compiled with SSE2 and may use any of them;
/// it uses no wider registers and no floating point, so that the upper halves, x87 state and MXCSR
/// stay the guest's until the vCPU is put.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct GuestState {
    /// In the order of instruction encoding: RAX, RCX, RDX, RBX, -, RBP, RSI, RDI, R8 to R15.
    /// The guest's RSP is in the VMCS; slot 4 remembers the host's, as the VMCS has it.
    pub registers: [u64; 16],
    xmm: [[u8; 16]; 16],
}

const _: () = assert!(offset_of!(GuestState, registers) == 0);
const _: () = assert!(offset_of!(GuestState, xmm) == 128 && align_of::<GuestState>() >= 16);

/// Indices into [`GuestState::registers`].
pub mod register {
    /// RAX.
    pub const RAX: usize = 0;
    /// RCX.
    pub const RCX: usize = 1;
    /// RDX.
    pub const RDX: usize = 2;
    /// RBX.
    pub const RBX: usize = 3;
    /// The slot of RSP, which is not the guest's.
    pub const RSP: usize = 4;
}

impl GuestState {
    /// All zero.
    pub const fn new() -> Self {
        Self { registers: [0; 16], xmm: [[0; 16]; 16] }
    }
}

impl Default for GuestState {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs the guest until its next VM exit. Returns 0 after an exit, 1 after VMfailInvalid, 2 after
/// VMfailValid.
///
/// Whether the VMCS has been launched is the CPU's to know: VMRESUME is tried first, and only if
/// it fails for that reason is it VMLAUNCH, once after each VMCLEAR.
///
/// # Safety
///
/// A VMCS whose host state is this CPU's and whose guest state belongs with `state` is current.
/// Interrupts are off.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn enter(state: *mut GuestState) -> u32 {
    naked_asm!(
        "push rbp", "push rbx", "push r12", "push r13", "push r14", "push r15",
        "push rdi",
        // The VMCS keeps the host's RSP; it changes only when the run loop sits elsewhere.
        "cmp [rdi + 32], rsp",
        "je 2f",
        "mov [rdi + 32], rsp",
        "mov eax, {host_rsp}",
        "vmwrite rax, rsp",
        "2:",
        "movaps xmm0, [rdi + 128]", "movaps xmm1, [rdi + 144]",
        "movaps xmm2, [rdi + 160]", "movaps xmm3, [rdi + 176]",
        "movaps xmm4, [rdi + 192]", "movaps xmm5, [rdi + 208]",
        "movaps xmm6, [rdi + 224]", "movaps xmm7, [rdi + 240]",
        "movaps xmm8, [rdi + 256]", "movaps xmm9, [rdi + 272]",
        "movaps xmm10, [rdi + 288]", "movaps xmm11, [rdi + 304]",
        "movaps xmm12, [rdi + 320]", "movaps xmm13, [rdi + 336]",
        "movaps xmm14, [rdi + 352]", "movaps xmm15, [rdi + 368]",
        "mov rax, [rdi]", "mov rcx, [rdi + 8]", "mov rdx, [rdi + 16]", "mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 40]", "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]", "mov r9, [rdi + 72]", "mov r10, [rdi + 80]", "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]", "mov r13, [rdi + 104]", "mov r14, [rdi + 112]",
        "mov r15, [rdi + 120]",
        "mov rdi, [rdi + 56]",
        "vmresume",
        // Still here: CF is VMfailInvalid, ZF is VMfailValid.
        "jc 4f",
        "mov rdi, [rsp]",
        "mov eax, {instruction_error}",
        "vmread rax, rax",
        "cmp eax, {not_launched}",
        "jne 3f",
        "mov rax, [rdi]",
        "mov rdi, [rdi + 56]",
        "vmlaunch",
        "jc 4f",
        "3: mov eax, 2",
        "jmp 5f",
        "4: mov eax, 1",
        "jmp 5f",
        ".global vmx_exit_entry",
        "vmx_exit_entry:",
        "push rdi",
        "mov rdi, [rsp + 8]",
        "mov [rdi], rax", "mov [rdi + 8], rcx", "mov [rdi + 16], rdx", "mov [rdi + 24], rbx",
        "mov [rdi + 40], rbp", "mov [rdi + 48], rsi",
        "mov [rdi + 64], r8", "mov [rdi + 72], r9", "mov [rdi + 80], r10", "mov [rdi + 88], r11",
        "mov [rdi + 96], r12", "mov [rdi + 104], r13", "mov [rdi + 112], r14",
        "mov [rdi + 120], r15",
        "pop qword ptr [rdi + 56]",
        "movaps [rdi + 128], xmm0", "movaps [rdi + 144], xmm1",
        "movaps [rdi + 160], xmm2", "movaps [rdi + 176], xmm3",
        "movaps [rdi + 192], xmm4", "movaps [rdi + 208], xmm5",
        "movaps [rdi + 224], xmm6", "movaps [rdi + 240], xmm7",
        "movaps [rdi + 256], xmm8", "movaps [rdi + 272], xmm9",
        "movaps [rdi + 288], xmm10", "movaps [rdi + 304], xmm11",
        "movaps [rdi + 320], xmm12", "movaps [rdi + 336], xmm13",
        "movaps [rdi + 352], xmm14", "movaps [rdi + 368], xmm15",
        "xor eax, eax",
        "5: pop rdi",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbx", "pop rbp",
        "ret",
        host_rsp = const crate::fields::HOST_RSP.encoding(),
        instruction_error = const crate::fields::INSTRUCTION_ERROR.encoding(),
        not_launched = const crate::instruction::RESUME_NOT_LAUNCHED,
    )
}

unsafe extern "C" {
    /// Where VM exits arrive, inside [`enter`].
    pub(crate) fn vmx_exit_entry();
}
