//! What leaving a guest costs: times single instructions that exit, each between two RDTSC, and
//! prints the least and the median. On an emulator whose time-stamp counter counts instructions the
//! numbers are exact; on silicon they are ticks of its counter.
//!
//! A row is one line, `bench NAME min TICKS median TICKS n EXECUTIONS`, or `bench NAME none (WHY)`
//! where its subject is not there. The ticks are those of the instruction itself and of whatever
//! it brings about; what the two RDTSC and loading the operands take is measured by the same code
//! without the instruction, and subtracted.
//!
//! Each row's instruction stands in a function of its own, `timed` in a module of the row's name: a
//! profiler outside knows by the guest's RIP which row an exit belongs to.
//!
//! Command line: `n=` executions of a row (100, at most 1000). `spin=`: instead of all this, read
//! the time-stamp counter until it has advanced by so much, for a machine with several such guests
//! to show what switching between them costs. `policy=` `step`, `emulate` or `warn`: instead of all
//! this, split locks in a VM that has this policy.
//!
//! Exit codes: success; 0x30 to 0x33, see the constants.

#![no_std]
#![no_main]

use core::arch::naked_asm;
use core::arch::x86_64::_rdtsc;

use guests::cpu::{self, CR0_AM, EFLAGS_AC, SPLIT_LOCK_DETECT, TEST_CTRL};
use guests::exit::Failure;
use guests::ring::{Ring, in_ring};
use guests::split::{self, HERE, Instruction, Place};
use guests::trap::{vector, with_handler};
use guests::{Boot, guest, image_end, println};

guest!(main);

const COUNT: Failure = Failure::new(0x30, "the number of executions is not 1 to 1000");
const REGISTER: Failure = Failure::new(0x31, "bit 29 of MSR 0x33 cannot be set and cleared");
const INTERRUPTS: Failure = Failure::new(0x32, "the local APIC takes no self IPI or no EOI");
const POLICY: Failure = Failure::new(0x33, "nothing is measured of this policy");

/// Executions before those that count.
const WARM_UP: usize = 10;
const MAX_EXECUTIONS: usize = 1000;

/// IA32_MISC_ENABLE, which every hypervisor has to answer for.
const MISC_ENABLE: u32 = 0x1A0;
/// No MSR.
const NO_MSR: u32 = 0x32;
/// The local APIC's registers in x2APIC mode: EOI, spurious interrupt vector, self IPI.
const APIC_EOI: u32 = 0x80B;
const APIC_SPURIOUS: u32 = 0x80F;
const APIC_SELF_IPI: u32 = 0x83F;
/// Spurious interrupt vector register: enabled.
const APIC_ENABLED: u64 = 0x1FF;
/// Vector of the interrupt that ends HLT.
const INTERRUPT: u8 = 0x40;
/// The UART's transmitter holding, line status and scratch registers.
const UART_DATA: u16 = 0x3F8;
const UART_LINE_STATUS: u16 = 0x3FD;
const UART_SCRATCH: u16 = 0x3FF;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// A port at which a PC has nothing.
const NO_PORT: u16 = 0xED;
/// What goes out while output is timed.
const HEADING: &str =
    "ticks of the time-stamp counter for an instruction and all that it brings about";

const SMALL_PAGE: u64 = 4 << 10;
const LARGE_PAGE: u64 = 2 << 20;
/// Memory is touched up to here, where no PC has a hole for its devices.
const TOUCH_END: u64 = 2 << 30;

/// A row: its name, and the functions that execute its instruction, or none, between two RDTSC.
/// They get up to two operands and return the ticks.
struct Row {
    name: &'static str,
    timed: unsafe extern "C" fn(u64, u64) -> u64,
    empty: unsafe extern "C" fn(u64, u64) -> u64,
}

/// Makes a module with a row of its name. Operands come in RDI and RSI; `outside` goes around the
/// two RDTSC.
///
/// LFENCE holds RDTSC back until all before it is done (SDM volume 2, "RDTSC—Read Time-Stamp
/// Counter"). The jumps are for Bochs, whose counter stands still from one jump to the next: behind
/// them it is exact.
macro_rules! row {
    ($name:ident, [$($operand:literal),*], $instruction:literal
        $(, outside [$($before:literal),*], [$($after:literal),*])?) => {
        mod $name {
            pub const ROW: super::Row = super::Row { name: stringify!($name), timed, empty };
            row!(@timed, [$($operand,)* $instruction], [$($($before),*)?], [$($($after),*)?]);
            row!(@empty, [$($operand),*], [$($($before),*)?], [$($($after),*)?]);
        }
    };
    (@$name:ident, [$($line:literal),*], [$($before:literal),*], [$($after:literal),*]) => {
        #[unsafe(naked)]
        unsafe extern "C" fn $name(_: u64, _: u64) -> u64 {
            core::arch::naked_asm!(
                "push rbx",
                $($before,)*
                "jmp 2f",
                "2:",
                "lfence",
                "rdtsc",
                "mov r8d, eax",
                "mov r9d, edx",
                $($line,)*
                "jmp 3f",
                "3:",
                "lfence",
                "rdtsc",
                $($after,)*
                "shl r9, 32",
                "or r8, r9",
                "shl rdx, 32",
                "or rax, rdx",
                "sub rax, r8",
                "pop rbx",
                "ret",
            )
        }
    };
}

row!(uart_data, ["mov edx, edi", "mov eax, esi"], "out dx, al");
row!(uart_scratch, ["mov edx, edi", "mov eax, esi"], "out dx, al");
row!(exception, [], "ud2");
row!(cpuid, ["mov eax, edi", "xor ecx, ecx"], "cpuid");
row!(rdmsr, ["mov ecx, edi"], "rdmsr");
row!(wrmsr, ["mov ecx, edi", "mov eax, esi", "mov rdx, rsi", "shr rdx, 32"], "wrmsr");
row!(rdmsr_gp, ["mov ecx, edi"], "rdmsr");
row!(wrmsr_gp, ["mov ecx, edi", "mov eax, esi", "xor edx, edx"], "wrmsr");
row!(rdmsr_0x33, ["mov ecx, edi"], "rdmsr");
row!(wrmsr_0x33_same, ["mov ecx, edi", "mov eax, esi", "xor edx, edx"], "wrmsr");
row!(wrmsr_0x33_other, ["mov ecx, edi", "mov eax, esi", "xor edx, edx"], "wrmsr");
row!(out_nobody, ["mov edx, edi", "mov eax, esi"], "out dx, al");
row!(in_nobody, ["mov edx, edi"], "in al, dx");
row!(ept_fill_4k, [], "mov [rdi], edi");
row!(ept_fill_2m, [], "mov [rdi], edi");
// EFLAGS.AC is set here alone: compiled code need not be aligned.
row!(ac_legacy, [], "mov [rdi], esi",
    outside ["pushfq", "or dword ptr [rsp], 0x40000", "popfq"],
    ["pushfq", "and dword ptr [rsp], ~0x40000", "popfq"]);
row!(ac_split_lock, [], "xchg [rdi], esi");
row!(ac_step, [], "lock add [rdi], esi");
row!(ac_emulate, [], "lock add [rdi], esi");
row!(ac_emulate_page, [], "lock add [rdi], esi");
row!(ac_emulate_8b, [], "lock cmpxchg8b [rdi]");
row!(ac_warn, [], "lock add [rdi], esi");
row!(hlt_pending, [], "sti; hlt", outside [], ["cli"]);

/// Handles an exception without error code: goes on behind the two bytes of what raised it.
#[unsafe(naked)]
unsafe extern "C" fn skip() {
    naked_asm!("add qword ptr [rsp], 2", "iretq")
}

/// Handles an exception with error code likewise.
#[unsafe(naked)]
unsafe extern "C" fn skip_with_error_code() {
    naked_asm!("add rsp, 8", "add qword ptr [rsp], 2", "iretq")
}

/// Handles an interrupt.
#[unsafe(naked)]
unsafe extern "C" fn come_back() {
    naked_asm!("iretq")
}

/// Memory with places across two cache lines and across two pages.
#[repr(C, align(4096))]
struct Pages([u8; 8192]);

/// Executes rows and prints them.
struct Bench {
    executions: usize,
    samples: [u64; MAX_EXECUTIONS],
}

impl Bench {
    /// Times a row, the instruction of execution `i` with the operands `operands(i)`, and returns the
    /// least.
    ///
    /// # Safety
    ///
    /// The guest must survive the instruction.
    unsafe fn time(&mut self, row: Row, mut operands: impl FnMut(usize) -> (u64, u64)) -> u64 {
        let overhead = self.overhead(&row);
        for index in 0..WARM_UP + self.executions {
            let (first, second) = operands(index);
            // SAFETY: the caller vouches for the instruction.
            let ticks = unsafe { (row.timed)(first, second) };
            if let Some(index) = index.checked_sub(WARM_UP) {
                self.samples[index] = ticks.saturating_sub(overhead);
            }
        }
        self.print(row.name, self.executions)
    }

    /// The least that a row takes without its instruction.
    fn overhead(&self, row: &Row) -> u64 {
        // SAFETY: without its instruction a row does nothing.
        let ticks = |_| unsafe { (row.empty)(0, 0) };
        (0..WARM_UP + self.executions).map(ticks).min().unwrap_or(0)
    }

    /// Prints a row of the first `count` samples, one at least, and returns the least of them.
    fn print(&mut self, name: &str, count: usize) -> u64 {
        let samples = &mut self.samples[..count];
        samples.sort_unstable();
        let (least, median) = (samples[0], samples[count / 2]);
        println!("bench {name} min {least} median {median} n {count}");
        least
    }

    /// Output through the console's UART.
    fn console(&mut self) {
        let overhead = self.overhead(&uart_data::ROW);
        for (sample, byte) in self.samples.iter_mut().zip(HEADING.bytes()) {
            // SAFETY: reading the line status has no effect that matters; the console takes the text.
            *sample = unsafe {
                while cpu::in8(UART_LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
                (uart_data::ROW.timed)(UART_DATA.into(), byte.into()).saturating_sub(overhead)
            };
        }
        println!();
        self.print(uart_data::ROW.name, HEADING.len());
    }

    /// Model-specific registers.
    fn registers(&mut self) {
        let time = |bench: &mut Self, row: Row, register: u32, value: Result<u64, _>| match value {
            Ok(value) => {
                // SAFETY: the register gets the value that it has.
                unsafe { bench.time(row, |_| (register.into(), value)) };
            }
            Err(_) => println!("bench {} none (#GP)", row.name),
        };
        let value = cpu::rdmsr(MISC_ENABLE);
        time(self, rdmsr::ROW, MISC_ENABLE, value);
        time(self, wrmsr::ROW, MISC_ENABLE, value);
        let value = cpu::rdmsr(TEST_CTRL);
        time(self, rdmsr_0x33::ROW, TEST_CTRL, value);
        time(self, wrmsr_0x33_same::ROW, TEST_CTRL, value);
        if cpu::offers_split_lock_detection() == Ok(true) {
            let bit = |index| if index % 2 == 0 { SPLIT_LOCK_DETECT } else { 0 };
            // SAFETY: this guest's locks are aligned.
            unsafe { self.time(wrmsr_0x33_other::ROW, |index| (TEST_CTRL.into(), bit(index))) };
        } else {
            println!("bench {} none (not offered)", wrmsr_0x33_other::ROW.name);
        }
        if cpu::rdmsr(NO_MSR).is_ok() {
            println!("bench {} none (no #GP)", rdmsr_gp::ROW.name);
            println!("bench {} none (no #GP)", wrmsr_gp::ROW.name);
            return;
        }
        // SAFETY: the handler skips the two bytes of RDMSR and WRMSR.
        unsafe {
            with_handler(vector::GENERAL_PROTECTION, skip_with_error_code, || {
                self.time(rdmsr_gp::ROW, |_| (NO_MSR.into(), 0));
                self.time(wrmsr_gp::ROW, |_| (NO_MSR.into(), 0));
            });
        }
    }

    /// Pages that nothing has touched: the small ones of the first large page behind the image, then
    /// all further large ones up to `end`.
    fn memory(&mut self, end: u64, cpuid: u64) {
        let first = image_end().next_multiple_of(LARGE_PAGE);
        let second = first + LARGE_PAGE;
        if second > end {
            println!("bench {} none (too little memory)", ept_fill_4k::ROW.name);
            println!("bench {} none (too little memory)", ept_fill_2m::ROW.name);
            return;
        }
        // The first one may bring tables with it.
        // SAFETY: all pages are free memory, mapped one to one.
        unsafe {
            (ept_fill_4k::ROW.timed)(first, 0);
            let small = (first + SMALL_PAGE..second).step_by(SMALL_PAGE as usize);
            self.fill(ept_fill_4k::ROW, small, cpuid);
            let large = (second..end).step_by(LARGE_PAGE as usize);
            self.fill(ept_fill_2m::ROW, large, cpuid);
        }
    }

    /// Touches pages. Only those touches count that took at least half of what CPUID takes: the
    /// others did not leave the guest.
    ///
    /// # Safety
    ///
    /// The pages must be free memory.
    unsafe fn fill(&mut self, row: Row, pages: impl Iterator<Item = u64>, cpuid: u64) {
        let overhead = self.overhead(&row);
        let (mut touched, mut filled) = (0, 0);
        for page in pages.take(self.executions) {
            touched += 1;
            // SAFETY: the caller vouches for the page.
            let ticks = unsafe { (row.timed)(page, 0) }.saturating_sub(overhead);
            if ticks >= cpuid / 2 {
                self.samples[filled] = ticks;
                filled += 1;
            }
        }
        if filled == 0 {
            println!("bench {} none (no exit by {touched} first touches)", row.name);
        } else {
            self.print(row.name, filled);
        }
    }

    /// HLT that an interrupt ends at once. It is sent, and acknowledged, outside what is timed.
    fn halt(&mut self) -> Result<(), Failure> {
        // SAFETY: interrupts are off, and nothing sends any.
        if unsafe { cpu::wrmsr(APIC_SPURIOUS, APIC_ENABLED) }.is_err() {
            println!("bench {} none (no x2APIC)", hlt_pending::ROW.name);
            return Ok(());
        }
        let mut written = true;
        let mut write = |register, value: u8| {
            // SAFETY: interrupts are off, and the handler is there while one is pending.
            written &= unsafe { cpu::wrmsr(register, value.into()) }.is_ok();
        };
        // SAFETY: the handler comes back behind HLT.
        unsafe {
            with_handler(INTERRUPT, come_back, || {
                self.time(hlt_pending::ROW, |_| {
                    write(APIC_EOI, 0);
                    write(APIC_SELF_IPI, INTERRUPT);
                    (0, 0)
                });
            });
        }
        write(APIC_EOI, 0);
        INTERRUPTS.unless(written)
    }

    /// #AC of the guest's own: legacy alignment checking, and split-lock detection if it is offered.
    fn alignment_checks(&mut self) -> Result<(), Failure> {
        // SAFETY: AM counts only where EFLAGS.AC is set.
        unsafe { cpu::set_cr0(cpu::cr0() | CR0_AM) };
        in_ring(Ring::Three, || {
            let store = split::faults_by(&HERE, Instruction::Store, Place::AcrossLines, EFLAGS_AC);
            self.alignment_check(ac_legacy::ROW, store.is_ok());
        });
        if cpu::offers_split_lock_detection() != Ok(true) {
            println!("bench {} none (not offered)", ac_split_lock::ROW.name);
            return Ok(());
        }
        // SAFETY: from here on the only split locks are those that are to raise #AC.
        REGISTER.unless(unsafe { cpu::wrmsr(TEST_CTRL, SPLIT_LOCK_DETECT) }.is_ok())?;
        let exchange = split::faults(Instruction::Xchg, Place::AcrossLines);
        self.alignment_check(ac_split_lock::ROW, exchange.is_ok());
        // SAFETY: as it was.
        REGISTER.unless(unsafe { cpu::wrmsr(TEST_CTRL, 0) }.is_ok())
    }

    /// Split locks of a guest that does not know of detection, under this policy.
    fn policy(&mut self, policy: &str) -> Result<(), Failure> {
        let mut pages = Pages([0; 8192]);
        let [across_lines, across_pages] =
            [&raw mut pages.0[62] as u64, &raw mut pages.0[4094] as u64];
        // SAFETY: the operands are this function's memory.
        unsafe {
            match policy {
                "step" => {
                    self.time(ac_step::ROW, |_| (across_lines, 1));
                }
                "emulate" => {
                    self.time(ac_emulate::ROW, |_| (across_lines, 1));
                    self.time(ac_emulate_page::ROW, |_| (across_pages, 1));
                    self.time(ac_emulate_8b::ROW, |_| (across_lines, 0));
                }
                "warn" => {
                    let overhead = self.overhead(&ac_warn::ROW);
                    let ticks = (ac_warn::ROW.timed)(across_lines, 1);
                    // The first one alone is seen.
                    self.samples[0] = ticks.saturating_sub(overhead);
                    self.print(ac_warn::ROW.name, 1);
                }
                _ => return Err(POLICY),
            }
        }
        Ok(())
    }

    /// Times a row whose access across two cache lines raises #AC, if it does.
    fn alignment_check(&mut self, row: Row, raised: bool) {
        let mut pages = Pages([0; 8192]);
        let across = &raw mut pages.0[62];

        if !raised {
            println!("bench {} none (no #AC)", row.name);
            return;
        }
        // SAFETY: the handler skips the two bytes of MOV and XCHG.
        unsafe {
            with_handler(vector::ALIGNMENT_CHECK, skip_with_error_code, || {
                self.time(row, |_| (across as u64, 0));
            });
        }
    }
}

fn main(boot: &Boot) -> Result<(), Failure> {
    if let Some(ticks) = boot.number("spin") {
        spin(ticks);
        return Ok(());
    }
    let executions = boot.number("n").unwrap_or(100) as usize;
    COUNT.unless((1..=MAX_EXECUTIONS).contains(&executions))?;
    let mut bench = Bench { executions, samples: [0; MAX_EXECUTIONS] };
    if let Some(policy) = boot.value("policy") {
        return bench.policy(policy);
    }

    bench.console();
    // SAFETY: (1) the UART's scratch register is nobody's; (2) the handler skips the two bytes of
    // UD2; (3) CPUID leaf 0 exists everywhere.
    let cpuid = unsafe {
        bench.time(uart_scratch::ROW, |_| (UART_SCRATCH.into(), 0x5A));
        with_handler(vector::INVALID_OPCODE, skip, || bench.time(exception::ROW, |_| (0, 0)));
        bench.time(cpuid::ROW, |_| (0, 0))
    };
    bench.registers();
    // SAFETY: nothing is there.
    unsafe {
        bench.time(out_nobody::ROW, |_| (NO_PORT.into(), 0));
        bench.time(in_nobody::ROW, |_| (NO_PORT.into(), 0));
    }
    bench.memory(boot.memory_end.min(TOUCH_END), cpuid);
    bench.alignment_checks()?;
    bench.halt()
}

/// Reads the time-stamp counter until it has advanced by `ticks`.
#[inline(never)]
fn spin(ticks: u64) {
    // SAFETY: RDTSC only reads, at CPL 0 whatever CR4.TSD says.
    let now = || unsafe { _rdtsc() };
    let start = now();
    while now().wrapping_sub(start) < ticks {}
}
