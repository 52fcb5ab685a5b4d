//! The IDT: entry stubs, the exception dump, and what is survived.

use alloc::boxed::Box;
use core::arch::{asm, naked_asm};

use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::tables::lidt;
use x86_64::registers::control::Cr2;
use x86_64::registers::segmentation::{CS, Segment, SegmentSelector};
use x86_64::structures::DescriptorTablePointer;

use super::apic::{self, LocalApic};
use super::segments::ist;
use super::{idle, mca, msr};
use crate::{panic, percpu};

/// What the stubs leave on the stack.
#[derive(Debug)]
#[repr(C)]
struct Frame {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rbp: u64,
    rdi: u64,
    rsi: u64,
    rdx: u64,
    rcx: u64,
    rbx: u64,
    rax: u64,
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

const _: () = assert!(size_of::<Frame>() == 22 * 8);

/// The part that all stubs share. On entry: error code (or 0) and vector on an IST stack, which
/// the CPU has aligned to 16 bytes. SSE registers are saved, because the handler is compiled with
/// SSE2 and an NMI or an expected #GP returns.
#[unsafe(naked)]
unsafe extern "C" fn common() {
    naked_asm!(
        "push rax", "push rbx", "push rcx", "push rdx", "push rsi", "push rdi", "push rbp",
        "push r8", "push r9", "push r10", "push r11", "push r12", "push r13", "push r14",
        "push r15",
        "mov rdi, rsp",
        "sub rsp, 512",
        "fxsave64 [rsp]",
        "cld",
        "call {handler}",
        "fxrstor64 [rsp]",
        "add rsp, 512",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop r11", "pop r10", "pop r9", "pop r8",
        "pop rbp", "pop rdi", "pop rsi", "pop rdx", "pop rcx", "pop rbx", "pop rax",
        "add rsp, 16",
        "iretq",
        handler = sym handle,
    )
}

/// A stub for a vector without and one with an error code.
#[unsafe(naked)]
unsafe extern "C" fn plain<const VECTOR: u8>() {
    naked_asm!("push 0", "push {}", "jmp {}", const VECTOR, sym common)
}
#[unsafe(naked)]
unsafe extern "C" fn with_error<const VECTOR: u8>() {
    naked_asm!("push {}", "jmp {}", const VECTOR, sym common)
}

/// Exceptions in the order of their vectors: SDM volume 3, section "Exception and Interrupt
/// Vectors".
const STUBS: [(unsafe extern "C" fn(), &str); 32] = [
    (plain::<0>, "#DE divide error"),
    (plain::<1>, "#DB debug"),
    (plain::<2>, "NMI"),
    (plain::<3>, "#BP breakpoint"),
    (plain::<4>, "#OF overflow"),
    (plain::<5>, "#BR bound range"),
    (plain::<6>, "#UD invalid opcode"),
    (plain::<7>, "#NM no math coprocessor"),
    (with_error::<8>, "#DF double fault"),
    (plain::<9>, "coprocessor segment overrun"),
    (with_error::<10>, "#TS invalid TSS"),
    (with_error::<11>, "#NP segment not present"),
    (with_error::<12>, "#SS stack-segment fault"),
    (with_error::<13>, "#GP general protection"),
    (with_error::<14>, "#PF page fault"),
    (plain::<15>, "reserved 15"),
    (plain::<16>, "#MF x87 error"),
    (with_error::<17>, "#AC alignment check"),
    (plain::<18>, "#MC machine check"),
    (plain::<19>, "#XM SIMD error"),
    (plain::<20>, "#VE virtualization"),
    (with_error::<21>, "#CP control protection"),
    (plain::<22>, "reserved 22"),
    (plain::<23>, "reserved 23"),
    (plain::<24>, "reserved 24"),
    (plain::<25>, "reserved 25"),
    (plain::<26>, "reserved 26"),
    (plain::<27>, "reserved 27"),
    (plain::<28>, "#HV hypervisor injection"),
    (with_error::<29>, "#VC VMM communication"),
    (with_error::<30>, "#SX security"),
    (plain::<31>, "reserved 31"),
];

/// A 64-bit interrupt gate: SDM volume 3, section "64-Bit Mode IDT".
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Gate {
    offset_low: u16,
    selector: u16,
    /// IST slot, from 1.
    ist: u8,
    kind: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<Gate>() == 16);

impl Gate {
    /// Present, DPL 0, 64-bit interrupt gate.
    const INTERRUPT: u8 = 0x8e;
    const ABSENT: Self = Self {
        offset_low: 0,
        selector: 0,
        ist: 0,
        kind: 0,
        offset_middle: 0,
        offset_high: 0,
        reserved: 0,
    };

    fn new(handler: unsafe extern "C" fn(), selector: SegmentSelector, stack: u16) -> Self {
        let address = handler as *const () as u64;
        Self {
            offset_low: address as u16,
            selector: selector.0,
            ist: stack as u8 + 1,
            kind: Self::INTERRUPT,
            offset_middle: (address >> 16) as u16,
            offset_high: (address >> 32) as u32,
            reserved: 0,
        }
    }
}

/// Loads an IDT for the time before there is memory: no stacks of its own, and what is not expected
/// is a panic. Nothing here uses the red zone, and what of `core` does calls nothing that may fault.
pub fn load_early() {
    static IDT: Once<[Gate; STUBS.len()]> = Once::new();
    let idt = IDT
        .call_once(|| STUBS.map(|(stub, _)| Gate { ist: 0, ..Gate::new(stub, CS::get_reg(), 0) }));
    let base = VirtAddr::from_ptr(idt);
    // SAFETY: the table lives for ever and its gates lead to the stubs; CS stays what it is until
    // the next table is loaded with another one.
    unsafe { lidt(&DescriptorTablePointer { limit: size_of_val(idt) as u16 - 1, base }) };
}

/// Loads the IDT, the same on all CPUs, and returns its linear address.
pub fn load(cs: SegmentSelector) -> u64 {
    static IDT: Once<&'static [Gate; 256]> = Once::new();
    let idt: &'static [Gate; 256] = IDT.call_once(|| Box::leak(table(cs)));
    let base = VirtAddr::from_ptr(idt);
    // SAFETY: the table lives for ever and its gates lead to stubs on stacks of their own.
    unsafe { lidt(&DescriptorTablePointer { limit: size_of_val(idt) as u16 - 1, base }) };
    base.as_u64()
}

/// All 256 gates, since a VM exit sets the table's limit to 64 KiB. The hypervisor takes interrupts
/// only while it sleeps, and expects its own timer's; what else comes, left over from the firmware, is
/// acknowledged too, and does nothing.
fn table(cs: SegmentSelector) -> Box<[Gate; 256]> {
    let mut idt = Box::new([Gate::ABSENT; 256]);
    for (vector, (gate, (stub, _))) in idt.iter_mut().zip(&STUBS).enumerate() {
        let stack = match vector {
            2 => ist::NMI,
            8 => ist::DOUBLE_FAULT,
            18 => ist::MACHINE_CHECK,
            _ => ist::EXCEPTION,
        };
        *gate = Gate::new(*stub, cs, stack);
    }
    let interrupt = plain::<{ apic::TIMER_VECTOR }>;
    idt[STUBS.len()..].fill(Gate::new(interrupt, cs, ist::EXCEPTION));
    let spurious = plain::<{ apic::SPURIOUS_VECTOR }>;
    idt[usize::from(apic::SPURIOUS_VECTOR)] = Gate::new(spurious, cs, ist::EXCEPTION);
    idt
}

/// Lets NMIs come again: a VM exit by NMI blocks them until the next IRET. SDM volume 3, section
/// "Handling of NMIs ... in VMX Operation" and "IRET".
pub fn unblock_nmis() {
    // SAFETY: an IRET to the next instruction with the present stack, flags and segments. The red
    // zone is not used by code compiled here.
    unsafe {
        asm!(
            "mov {stack}, rsp",
            "mov {selector:e}, ss",
            "push {selector}",
            "push {stack}",
            "pushfq",
            "mov {selector:e}, cs",
            "push {selector}",
            "lea {stack}, [rip + 2f]",
            "push {stack}",
            "iretq",
            "2:",
            stack = out(reg) _,
            selector = out(reg) _,
        );
    }
}

/// An NMI, wherever it was taken. Who sent it is not known here: [`percpu::PerCpu::on_nmi`] judges.
pub fn on_nmi() {
    if panic::is_panicking() {
        percpu::stop();
    }
    // Before a CPU has its data, nobody has anything for it.
    if let Some(cpu) = percpu::try_this() {
        cpu.on_nmi();
    }
}

extern "C" fn handle(frame: &mut Frame) {
    match frame.vector {
        2 => {
            on_nmi();
            frame.rip = idle::woken(frame.rip);
            return;
        }
        18 => {
            mca::in_hypervisor();
            return;
        }
        13 => {
            if let Some(resume) = msr::resume_address(frame.rip) {
                frame.rip = resume;
                return;
            }
        }
        _ => {}
    }
    if frame.vector == u64::from(apic::TIMER_VECTOR) {
        LocalApic::current().end_of_interrupt();
        // Should it come between STI and HLT, which it does on the reference machine at times.
        frame.rip = idle::woken(frame.rip);
        return;
    }
    if frame.vector == u64::from(apic::SPURIOUS_VECTOR) {
        return;
    }
    let name = STUBS.get(frame.vector as usize).map_or("unknown vector", |row| row.1);
    panic!(
        "{name} in the hypervisor, error {:#x}, CR2 {:#x}\n{frame:#x?}",
        frame.error,
        Cr2::read_raw()
    );
}
