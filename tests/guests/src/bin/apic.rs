//! The local APIC: what it is enumerated as, its registers, interrupts to itself, what holds them
//! back, NMIs, its timer, and HLT until one of them comes.
//!
//! Interrupts are off but where they are due: most checks open a window of two instructions and look
//! at what came through it. The handlers only record; EOI is up to the checks.
//!
//! Exit codes: success; 0x30 to 0x4F, see the constants.

#![no_std]
#![no_main]

use core::arch::asm;
use core::arch::naked_asm;
use core::arch::x86_64::_rdtsc;
use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

use guests::cpu::{self, CR0_AM, EFLAGS_AC, cpuid, rdmsr, wrmsr};
use guests::exit::Failure;
use guests::ring::{Ring, in_ring};
use guests::trap::{Exception, vector, with_handler};
use guests::{Boot, guest, println, probe};

guest!(main);

const NOT_ENUMERATED: Failure =
    Failure::new(0x30, "CPUID lacks the APIC, x2APIC mode or the TSC deadline");
const BASE: Failure = Failure::new(0x31, "IA32_APIC_BASE is not what it must be");
const BASE_TAKEN: Failure = Failure::new(0x32, "IA32_APIC_BASE takes another value");
const RESET: Failure = Failure::new(0x33, "a register does not hold what it holds after RESET");
const RESERVED: Failure = Failure::new(0x34, "a reserved bit or register does not raise #GP(0)");
const REGISTER: Failure = Failure::new(0x35, "a register does not hold what was written");
const LOST: Failure = Failure::new(0x36, "an interrupt that can be taken does not arrive");
const TOO_MUCH: Failure = Failure::new(0x37, "an interrupt arrives that is not due");
const IRR: Failure = Failure::new(0x38, "the IRR does not show an interrupt that waits");
const SHADOW: Failure =
    Failure::new(0x39, "an interrupt does not arrive right behind STI's shadow");
const ORDER: Failure = Failure::new(0x3A, "interrupts do not arrive by priority");
const HELD: Failure = Failure::new(0x3B, "an interrupt of lower priority is not held back");
const PPR: Failure = Failure::new(0x3C, "the processor priority is wrong");
const ISR: Failure = Failure::new(0x3D, "the ISR does not show an interrupt in service");
const CR8: Failure = Failure::new(0x3E, "CR8 and TPR differ");
const CR8_LATE: Failure = Failure::new(0x3F, "lowering CR8 does not let the interrupt in at once");
const ICR: Failure = Failure::new(0x40, "an IPI by ICR does not arrive as it is addressed");
const NMI: Failure = Failure::new(0x41, "an NMI does not arrive at once, and once");
const NMI_NESTED: Failure = Failure::new(0x42, "an NMI arrives in the handler of another");
const NMI_LOST: Failure =
    Failure::new(0x43, "an NMI does not arrive behind the handler of another");
const COUNT: Failure = Failure::new(0x44, "the current count does not follow the time");
const EARLY: Failure = Failure::new(0x45, "the timer fires too early");
const NEVER: Failure = Failure::new(0x46, "the timer does not fire");
const AGAIN: Failure = Failure::new(0x47, "the timer fires again, or although it is off");
const DEADLINE: Failure = Failure::new(0x48, "IA32_TSC_DEADLINE is wrong");
const HLT_TIMER: Failure = Failure::new(0x49, "the timer does not end HLT");
const HLT_IPI: Failure = Failure::new(0x4A, "a pending interrupt does not end HLT");
const HLT_RETURN: Failure = Failure::new(0x4B, "what ends HLT does not return behind it");
const NO_AC: Failure = Failure::new(0x4C, "no #AC where it is due");
const LOST_BY_AC: Failure =
    Failure::new(0x4D, "an interrupt does not arrive behind an #AC's handler");

/// IA32_APIC_BASE, and the only value it takes: x2APIC mode, bootstrap processor.
const APIC_BASE: u32 = 0x1B;
const X2APIC: u64 = 0xFEE0_0D00;
/// IA32_TSC_DEADLINE.
const TSC_DEADLINE: u32 = 0x6E0;

/// The x2APIC MSRs.
mod msr {
    pub const ID: u32 = 0x802;
    pub const TPR: u32 = 0x808;
    pub const PPR: u32 = 0x80A;
    pub const EOI: u32 = 0x80B;
    pub const LDR: u32 = 0x80D;
    pub const SVR: u32 = 0x80F;
    pub const ISR: u32 = 0x810;
    pub const IRR: u32 = 0x820;
    pub const ESR: u32 = 0x828;
    pub const ICR: u32 = 0x830;
    pub const LVT_TIMER: u32 = 0x832;
    pub const LVT_LINT0: u32 = 0x835;
    pub const INITIAL_COUNT: u32 = 0x838;
    pub const CURRENT_COUNT: u32 = 0x839;
    pub const DIVIDE: u32 = 0x83E;
    pub const SELF_IPI: u32 = 0x83F;
}

/// SVR: enabled by software, spurious vector 0xFF.
const ENABLED: u64 = 0x1FF;
/// LVT: masked.
const MASKED: u64 = 1 << 16;
/// LVT timer: modes.
const ONE_SHOT: u64 = 0;
const PERIODIC: u64 = 1 << 17;
const BY_DEADLINE: u64 = 2 << 17;
/// Divide configuration: by 1, by 16.
const BY_1: u64 = 0xB;
const BY_16: u64 = 0x3;
/// ICR: fixed and NMI, the destination by shorthand.
const TO_SELF: u64 = 1 << 18;
const TO_ALL: u64 = 2 << 18;
const TO_OTHERS: u64 = 3 << 18;
const DELIVER_NMI: u64 = 4 << 8;
const LOGICAL: u64 = 1 << 11;

/// Vectors of the interrupts: two of one class, one below, one above, the timer's.
const LOW: u8 = 0x31;
const MIDDLE: u8 = 0x51;
const MIDDLE_UPPER: u8 = 0x5F;
const HIGH: u8 = 0x61;
const TIMER: u8 = 0x41;

/// Ticks of the time-stamp counter until the timer fires, at least.
const LEAST_TIME: u64 = 30_000;
static TIME: AtomicU64 = AtomicU64::new(LEAST_TIME);
/// After as many ticks what has not come will not come.
const PATIENCE: u64 = 200_000_000;
/// By as much as two readings of the time may be off.
const SLACK: u64 = 200;

/// Interrupts that arrived, each with its vector and the address that it returns to.
const LOG: usize = 16;
static VECTORS: [AtomicU64; LOG] = [const { AtomicU64::new(0) }; LOG];
static ADDRESSES: [AtomicU64; LOG] = [const { AtomicU64::new(0) }; LOG];
static ARRIVED: AtomicU64 = AtomicU64::new(0);
/// [`ARRIVED`] when the first NMI's handler ended.
static AT_END: AtomicU64 = AtomicU64::new(0);

/// Records an interrupt; no EOI.
#[unsafe(naked)]
unsafe extern "C" fn record<const VECTOR: u8>() {
    naked_asm!(
        "push rax",
        "push rcx",
        "mov rax, [rip + {arrived}]",
        "and eax, {log} - 1",
        "lea rcx, [rip + {vectors}]",
        "mov qword ptr [rcx + 8 * rax], {vector}",
        "lea rcx, [rip + {addresses}]",
        "lea rcx, [rcx + 8 * rax]",
        "mov rax, [rsp + 16]",
        "mov [rcx], rax",
        "inc qword ptr [rip + {arrived}]",
        "pop rcx",
        "pop rax",
        "iretq",
        arrived = sym ARRIVED,
        vectors = sym VECTORS,
        addresses = sym ADDRESSES,
        log = const LOG,
        vector = const VECTOR,
    )
}

/// Handles an NMI: the first one sends two more, which become one.
#[unsafe(naked)]
unsafe extern "C" fn nested() {
    naked_asm!(
        "push rax",
        "push rbx",
        "push rcx",
        "push rdx",
        "inc qword ptr [rip + {arrived}]",
        "cmp qword ptr [rip + {arrived}], 1",
        "jne 2f",
        "mov ecx, {icr}",
        "mov eax, {nmi}",
        "xor edx, edx",
        "wrmsr",
        "wrmsr",
        "xor eax, eax",
        "cpuid",
        "mov rax, [rip + {arrived}]",
        "mov [rip + {at_end}], rax",
        "2:",
        "pop rdx",
        "pop rcx",
        "pop rbx",
        "pop rax",
        "iretq",
        arrived = sym ARRIVED,
        at_end = sym AT_END,
        icr = const msr::ICR,
        nmi = const TO_SELF | DELIVER_NMI,
    )
}

fn now() -> u64 {
    // SAFETY: RDTSC only reads, at CPL 0 whatever CR4.TSD says.
    unsafe { _rdtsc() }
}

fn read(register: u32) -> Result<u64, Failure> {
    rdmsr(register).map_err(|_| REGISTER)
}

fn write(register: u32, value: u64) -> Result<(), Failure> {
    // SAFETY: interrupts are off, and every vector that is used has its handler.
    unsafe { wrmsr(register, value) }.map_err(|_| REGISTER)
}

/// Sends an interrupt to this CPU.
fn raise(vector: u8) -> Result<(), Failure> {
    write(msr::SELF_IPI, vector.into())
}

fn eoi() -> Result<(), Failure> {
    write(msr::EOI, 0)
}

/// Whether the vector's bit is set in these eight registers.
fn is_set(registers: u32, vector: u8) -> Result<bool, Failure> {
    Ok(read(registers + u32::from(vector / 32))? & 1 << (vector % 32) != 0)
}

/// Opens a window for interrupts. `$line`s stand in it, and `$instruction` behind them; gives the
/// address of that instruction.
macro_rules! window {
    ([$($line:literal),*], $instruction:literal $(, $($operands:tt)*)?) => {{
        let behind: u64;
        // SAFETY: the interrupts that arrive have handlers, which keep all registers.
        unsafe {
            asm!(
                "lea {behind}, [rip + 2f]",
                $($line,)*
                "2:",
                $instruction,
                "cli",
                behind = out(reg) behind,
                $($($operands)*,)?
            );
        }
        behind
    }};
}

fn open() {
    window!(["sti", "nop"], "nop");
}

/// What arrived since the last time: the vectors, in order.
fn arrived() -> impl Iterator<Item = u8> + Clone {
    let count = ARRIVED.swap(0, Ordering::Relaxed) as usize;
    (0..count).map(|index| VECTORS[index % LOG].load(Ordering::Relaxed) as u8)
}

/// `failure` unless exactly these arrived since the last time.
fn came(expected: &[u8], failure: Failure) -> Result<(), Failure> {
    let arrived = arrived();
    if arrived.clone().eq(expected.iter().copied()) {
        return Ok(());
    }
    for vector in arrived {
        println!("arrived: {vector:#x}");
    }
    println!("due: {expected:x?}");
    Err(failure)
}

/// Opens windows until something has arrived; gives the time then.
fn wait() -> Result<u64, Failure> {
    let start = now();
    while ARRIVED.load(Ordering::Relaxed) == 0 {
        NEVER.unless(now().wrapping_sub(start) < PATIENCE)?;
        open();
    }
    Ok(now())
}

/// Opens windows for so many ticks.
fn open_for(ticks: u64) {
    let start = now();
    while now().wrapping_sub(start) < ticks {
        open();
    }
}

fn enumeration() -> Result<(), Failure> {
    let leaf = cpuid(1);
    let all = leaf.edx & 1 << 9 != 0 && leaf.ecx & 1 << 21 != 0 && leaf.ecx & 1 << 24 != 0;
    NOT_ENUMERATED.unless(all)?;
    BASE.unless(rdmsr(APIC_BASE) == Ok(X2APIC))?;
    BASE.unless(write(APIC_BASE, X2APIC).is_ok())?;
    // Off, xAPIC mode, x2APIC mode without the APIC, elsewhere, not the bootstrap processor,
    // reserved bits.
    let others = [
        0,
        0xFEE0_0100,
        0xFEE0_0900,
        0xFEE0_0500,
        0xFED0_0D00,
        0xFEE0_0C00,
        X2APIC | 1,
        X2APIC | 1 << 9,
        X2APIC | 1 << 52,
    ];
    for value in others {
        BASE_TAKEN.unless(is_gp0(APIC_BASE, value))?;
    }
    BASE.unless(rdmsr(APIC_BASE) == Ok(X2APIC))
}

fn is_gp0(register: u32, value: u64) -> bool {
    // SAFETY: if the register takes it the guest ends.
    unsafe { wrmsr(register, value) }.is_err_and(Exception::is_gp0)
}

fn registers() -> Result<(), Failure> {
    use msr::*;
    let after_reset = [
        (TPR, 0),
        (PPR, 0),
        (SVR, 0xFF),
        (ESR, 0),
        (ICR, 0),
        (LVT_TIMER, MASKED),
        (LVT_LINT0, MASKED),
        (INITIAL_COUNT, 0),
        (CURRENT_COUNT, 0),
        (DIVIDE, 0),
    ];
    let vectors = (ISR..ESR).map(|register| (register, 0));
    for (register, value) in after_reset.into_iter().chain(vectors) {
        RESET.unless(rdmsr(register) == Ok(value))?;
    }
    RESET.unless(read(ID)? == u64::from(cpuid(1).ebx >> 24))?;

    // Nobody is told of anything while the APIC is not enabled.
    raise(LOW)?;
    open();
    came(&[], TOO_MUCH)?;
    // The LVT is masked as long.
    let timer = u64::from(TIMER);
    for (register, value, expected) in [
        (LVT_TIMER, timer, MASKED | timer),
        (SVR, ENABLED, MASKED | timer),
        (LVT_TIMER, timer, timer),
        (SVR, 0xFF, MASKED | timer),
        (LVT_TIMER, MASKED, MASKED),
        (SVR, ENABLED, MASKED),
    ] {
        write(register, value)?;
        REGISTER.unless(read(LVT_TIMER)? == expected)?;
    }
    REGISTER.unless(read(SVR)? == ENABLED)?;

    let reserved = [
        (TPR, 1 << 8),
        (EOI, 1),
        (SVR, ENABLED | 1 << 10),
        (SVR, ENABLED | 1 << 32),
        (ESR, 1),
        (ICR, TO_SELF | 1 << 12 | LOW as u64),
        (ICR, TO_SELF | 1 << 13 | LOW as u64),
        (ICR, TO_SELF | 1 << 16 | LOW as u64),
        (ICR, TO_SELF | 1 << 20 | LOW as u64),
        (LVT_TIMER, MASKED | 1 << 8),
        (LVT_TIMER, MASKED | 1 << 19),
        (LVT_TIMER, MASKED | 1 << 63),
        (LVT_LINT0, MASKED | 1 << 17),
        (INITIAL_COUNT, 1 << 32),
        (DIVIDE, 1 << 2),
        (DIVIDE, 1 << 4),
        (SELF_IPI, LOW as u64 | 1 << 8),
        (SELF_IPI, LOW as u64 | 1 << 32),
    ];
    let read_only = [ID, 0x803, PPR, LDR, ISR, 0x818, IRR, CURRENT_COUNT].map(|msr| (msr, 0));
    for (register, value) in reserved.into_iter().chain(read_only) {
        if !is_gp0(register, value) {
            println!("{register:#x} takes {value:#x}");
            return Err(RESERVED);
        }
    }
    // The ones that are write-only, and those that there are not: APR, DFR, the upper half of ICR.
    let none = [0x800, 0x801, 0x809, 0x80C, 0x80E, 0x831, 0x83A, 0x83D];
    for register in none.into_iter().chain([EOI, SELF_IPI]) {
        RESERVED.unless(rdmsr(register).is_err_and(Exception::is_gp0))?;
    }
    for register in none {
        RESERVED.unless(is_gp0(register, 0))?;
    }
    open();
    came(&[], TOO_MUCH)?;
    REGISTER.unless(read(SVR)? == ENABLED && read(LVT_TIMER)? == MASKED && read(ICR)? == 0)
}

/// Interrupts that wait for nothing, for IF, and for the end of STI's shadow.
fn self_ipi() -> Result<(), Failure> {
    window!(["sti", "nop", "wrmsr"], "nop",
        in("ecx") msr::SELF_IPI, in("eax") u32::from(LOW), in("edx") 0);
    came(&[LOW], LOST)?;
    IRR.unless(!is_set(msr::IRR, LOW)?)?;
    eoi()?;
    open();
    came(&[], TOO_MUCH)?;

    raise(LOW)?;
    raise(LOW)?;
    cpuid(0);
    came(&[], TOO_MUCH)?;
    IRR.unless(is_set(msr::IRR, LOW)?)?;
    let mut ran = 0_u64;
    let behind = window!(["sti", "inc {ran}"], "inc {ran}", ran = inout(reg) ran);
    came(&[LOW], LOST)?;
    SHADOW.unless(ran == 2 && ADDRESSES[0].load(Ordering::Relaxed) == behind)?;
    eoi()?;
    open();
    came(&[], TOO_MUCH)?;

    // The same where the instruction in the shadow leaves the guest.
    raise(LOW)?;
    let behind = window!(["push rbx", "sti", "cpuid"], "pop rbx",
        inout("eax") 0 => _, out("ecx") _, out("edx") _);
    came(&[LOW], LOST)?;
    SHADOW.unless(ADDRESSES[0].load(Ordering::Relaxed) == behind)?;
    eoi()
}

fn priorities() -> Result<(), Failure> {
    let ppr = |expected: u8| PPR.unless(read(msr::PPR)? == u64::from(expected));
    raise(LOW)?;
    raise(MIDDLE)?;
    IRR.unless(is_set(msr::IRR, LOW)? && is_set(msr::IRR, MIDDLE)?)?;
    open();
    came(&[MIDDLE], ORDER)?;
    ISR.unless(is_set(msr::ISR, MIDDLE)? && !is_set(msr::ISR, LOW)?)?;
    ppr(0x50)?;
    // The same class waits, a higher one does not.
    raise(MIDDLE_UPPER)?;
    open();
    came(&[], HELD)?;
    raise(HIGH)?;
    open();
    came(&[HIGH], LOST)?;
    ppr(0x60)?;
    ISR.unless(is_set(msr::ISR, MIDDLE)? && is_set(msr::ISR, HIGH)?)?;
    eoi()?;
    ppr(0x50)?;
    open();
    came(&[], HELD)?;
    for (next, priority) in [(MIDDLE_UPPER, 0x50), (LOW, 0x30)] {
        eoi()?;
        open();
        came(&[next], ORDER)?;
        ppr(priority)?;
    }
    // EOI with interrupts on lets the next one in.
    raise(HIGH)?;
    raise(LOW)?;
    open();
    came(&[HIGH], ORDER)?;
    eoi()?;
    window!(["sti", "nop", "wrmsr"], "nop", in("ecx") msr::EOI, in("eax") 0, in("edx") 0);
    came(&[LOW], LOST)?;
    eoi()?;
    ppr(0)?;

    for (tpr, held) in [(0x50, true), (0x5F, true), (0x4F, false), (0x60, true), (0, false)] {
        write(msr::TPR, tpr)?;
        CR8.unless(cr8() == tpr >> 4)?;
        PPR.unless(read(msr::PPR)? == tpr)?;
        raise(MIDDLE)?;
        open();
        if held {
            came(&[], HELD)?;
        } else {
            came(&[MIDDLE], LOST)?;
            eoi()?;
        }
    }
    for value in 0..16_u64 {
        window!(["mov cr8, {cr8}"], "nop", cr8 = in(reg) value);
        CR8.unless(cr8() == value && read(msr::TPR)? == value << 4)?;
    }
    // SAFETY: if CR8 takes it the guest ends.
    let run = unsafe { probe!(2, ["mov cr8, {}"], in(reg) 16_u64) };
    CR8.unless(run.caught.is_some_and(Exception::is_gp0) && cr8() == 15)?;
    raise(MIDDLE)?;
    open();
    came(&[], HELD)?;
    let behind = window!(["sti", "nop", "mov cr8, {cr8}"], "nop", cr8 = in(reg) 4_u64);
    came(&[MIDDLE], CR8_LATE)?;
    CR8_LATE.unless(ADDRESSES[0].load(Ordering::Relaxed) == behind)?;
    eoi()?;
    write(msr::TPR, 0)
}

fn cr8() -> u64 {
    let value;
    // SAFETY: reading CR8 at CPL 0 has no effect.
    unsafe { asm!("mov {}, cr8", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

fn commands() -> Result<(), Failure> {
    let (id, ldr) = (read(msr::ID)?, read(msr::LDR)?);
    ICR.unless(ldr == (id >> 4) << 16 | 1 << (id & 15))?;
    let addressed = [
        (TO_SELF, true),
        (TO_ALL, true),
        (TO_OTHERS, false),
        (id << 32, true),
        ((id + 1) << 32, false),
        (0xFFFF_FFFF << 32, true),
        (ldr << 32 | LOGICAL, true),
        ((ldr ^ 3) << 32 | LOGICAL, false),
    ];
    for (address, reaches) in addressed {
        let command = address | u64::from(MIDDLE);
        write(msr::ICR, command)?;
        REGISTER.unless(read(msr::ICR)? == command)?;
        came(&[], TOO_MUCH)?;
        open();
        if reaches {
            came(&[MIDDLE], ICR)?;
            eoi()?;
        } else {
            came(&[], ICR)?;
        }
    }
    Ok(())
}

/// NMIs arrive with interrupts off.
fn nmis() -> Result<(), Failure> {
    // SAFETY: the handlers keep all registers.
    unsafe {
        with_handler(vector::NMI, record::<{ vector::NMI }>, || {
            write(msr::ICR, TO_SELF | DELIVER_NMI)?;
            came(&[vector::NMI], NMI)?;
            open();
            cpuid(0);
            came(&[], NMI)
        })?;
        with_handler(vector::NMI, nested, || {
            write(msr::ICR, TO_SELF | DELIVER_NMI)?;
            NMI_NESTED.unless(AT_END.load(Ordering::Relaxed) == 1)?;
            NMI_LOST.unless(ARRIVED.load(Ordering::Relaxed) == 2)?;
            open();
            cpuid(0);
            NMI.unless(ARRIVED.swap(0, Ordering::Relaxed) == 2)
        })
    }
}

fn time() -> u64 {
    TIME.load(Ordering::Relaxed)
}

/// Where each instruction takes long, the timer takes longer.
fn take_time() -> Result<(), Failure> {
    let start = now();
    for _ in 0..4 {
        write(msr::DIVIDE, BY_1)?;
    }
    TIME.store(LEAST_TIME.max(8 * (now() - start)), Ordering::Relaxed);
    Ok(())
}

fn timer() -> Result<(), Failure> {
    take_time()?;
    // Counts with the time-stamp counter, divided.
    for (divide, by) in [(BY_1, 1), (BY_16, 16)] {
        write(msr::DIVIDE, divide)?;
        write(msr::LVT_TIMER, ONE_SHOT | MASKED | u64::from(TIMER))?;
        let initial = 0xF000_0000;
        write(msr::INITIAL_COUNT, initial)?;
        let mut previous = initial;
        for _ in 0..10 {
            let before = now();
            let first = read(msr::CURRENT_COUNT)?;
            let start = now();
            while now().wrapping_sub(start) < 1000 {}
            let end = now();
            let second = read(msr::CURRENT_COUNT)?;
            let after = now();
            COUNT.unless(previous >= first && first > second)?;
            let ticks = (first - second) * by;
            COUNT.unless(ticks + SLACK >= end - start && ticks <= after - before + SLACK)?;
            previous = second;
        }
        REGISTER.unless(read(msr::INITIAL_COUNT)? == initial)?;
        write(msr::INITIAL_COUNT, 0)?;
        COUNT.unless(read(msr::CURRENT_COUNT)? == 0)?;
    }

    for (divide, by) in [(BY_1, 1), (BY_16, 16)] {
        write(msr::DIVIDE, divide)?;
        write(msr::LVT_TIMER, ONE_SHOT | u64::from(TIMER))?;
        let start = now();
        write(msr::INITIAL_COUNT, time() / by)?;
        let end = wait()?;
        came(&[TIMER], TOO_MUCH)?;
        EARLY.unless(end - start + SLACK >= time())?;
        COUNT.unless(read(msr::CURRENT_COUNT)? == 0)?;
        eoi()?;
        open_for(2 * time());
        came(&[], AGAIN)?;
    }
    // Masked, it fires at nobody; not enabled, not at all.
    write(msr::DIVIDE, BY_1)?;
    write(msr::LVT_TIMER, ONE_SHOT | MASKED | u64::from(TIMER))?;
    write(msr::INITIAL_COUNT, time())?;
    open_for(2 * time());
    write(msr::LVT_TIMER, ONE_SHOT | u64::from(TIMER))?;
    write(msr::INITIAL_COUNT, time())?;
    write(msr::INITIAL_COUNT, 0)?;
    open_for(2 * time());
    came(&[], AGAIN)?;

    // Masked and unmasked, it goes on.
    write(msr::INITIAL_COUNT, time())?;
    write(msr::LVT_TIMER, ONE_SHOT | MASKED | u64::from(TIMER))?;
    COUNT.unless(read(msr::CURRENT_COUNT)? != 0)?;
    write(msr::LVT_TIMER, ONE_SHOT | u64::from(TIMER))?;
    wait()?;
    came(&[TIMER], TOO_MUCH)?;
    eoi()?;

    write(msr::LVT_TIMER, PERIODIC | u64::from(TIMER))?;
    let start = now();
    write(msr::INITIAL_COUNT, time())?;
    for ticks in 1..=3 {
        let end = wait()?;
        came(&[TIMER], TOO_MUCH)?;
        EARLY.unless(end - start + SLACK >= ticks * time())?;
        eoi()?;
    }
    write(msr::INITIAL_COUNT, 0)?;
    // One may have come due meanwhile.
    open();
    if ARRIVED.swap(0, Ordering::Relaxed) > 0 {
        eoi()?;
    }
    open_for(2 * time());
    came(&[], AGAIN)?;

    // Not in this mode.
    write(TSC_DEADLINE, 1)?;
    DEADLINE.unless(read(TSC_DEADLINE)? == 0)?;
    write(msr::LVT_TIMER, BY_DEADLINE | u64::from(TIMER))?;
    open_for(time());
    came(&[], AGAIN)?;
    let far = now() + 1000 * PATIENCE;
    write(TSC_DEADLINE, far)?;
    DEADLINE.unless(read(TSC_DEADLINE)? == far && read(msr::CURRENT_COUNT)? == 0)?;
    for ticks in [time(), 1] {
        let deadline = now() + ticks;
        write(TSC_DEADLINE, deadline)?;
        let end = wait()?;
        came(&[TIMER], TOO_MUCH)?;
        EARLY.unless(end >= deadline)?;
        DEADLINE.unless(read(TSC_DEADLINE)? == 0)?;
        eoi()?;
    }
    write(TSC_DEADLINE, now() + time())?;
    write(TSC_DEADLINE, 0)?;
    open_for(2 * time());
    came(&[], AGAIN)
}

fn halts() -> Result<(), Failure> {
    let halt = || window!(["sti", "hlt"], "nop");
    let woken = |behind: u64, vector: u8, failure: Failure| {
        came(&[vector], failure)?;
        HLT_RETURN.unless(ADDRESSES[0].load(Ordering::Relaxed) == behind)?;
        eoi()
    };
    let deadline = now() + time();
    write(TSC_DEADLINE, deadline)?;
    woken(halt(), TIMER, HLT_TIMER)?;
    EARLY.unless(now() >= deadline)?;

    write(msr::LVT_TIMER, ONE_SHOT | u64::from(TIMER))?;
    let start = now();
    write(msr::INITIAL_COUNT, time())?;
    woken(halt(), TIMER, HLT_TIMER)?;
    EARLY.unless(now() - start + SLACK >= time())?;

    write(msr::LVT_TIMER, PERIODIC | u64::from(TIMER))?;
    write(msr::INITIAL_COUNT, time())?;
    for _ in 0..3 {
        woken(halt(), TIMER, HLT_TIMER)?;
    }
    write(msr::INITIAL_COUNT, 0)?;
    write(msr::LVT_TIMER, MASKED)?;
    open();
    if ARRIVED.swap(0, Ordering::Relaxed) > 0 {
        eoi()?;
    }

    raise(LOW)?;
    woken(halt(), LOW, HLT_IPI)
}

/// An interrupt is pending when legacy alignment checking raises #AC, in STI's shadow: it arrives
/// when #AC's handler returns.
fn behind_alignment_check() -> Result<(), Failure> {
    let operand = [0_u64; 2];
    let misaligned = ptr::from_ref(&operand).cast::<u8>().wrapping_add(1);
    // SAFETY: AM counts only where EFLAGS.AC is set.
    unsafe { cpu::set_cr0(cpu::cr0() | CR0_AM) };
    raise(LOW)?;
    let (run, behind) = in_ring(Ring::Three, || {
        let behind: u64;
        // SAFETY: reads the operand; IOPL is 3, and stays so.
        let run = unsafe {
            probe!(
                3 << 12 | EFLAGS_AC | 2,
                ["lea {behind}, [rip + 93f]", "sti", "mov {value:e}, [{operand}]"],
                operand = in(reg) misaligned,
                value = out(reg) _,
                behind = out(reg) behind
            )
        };
        (run, behind)
    });
    let is_ac = |exception: Exception| exception.vector == vector::ALIGNMENT_CHECK;
    NO_AC.unless(run.caught.is_some_and(is_ac))?;
    came(&[LOW], LOST_BY_AC)?;
    LOST_BY_AC.unless(ADDRESSES[0].load(Ordering::Relaxed) == behind)?;
    eoi()
}

type Handler = unsafe extern "C" fn();

/// Runs `f` with these handlers.
///
/// # Safety
///
/// As [`with_handler`].
unsafe fn with_handlers<R>(handlers: &[(u8, Handler)], f: &mut dyn FnMut() -> R) -> R {
    match handlers {
        [] => f(),
        [(vector, handler), others @ ..] => {
            // SAFETY: the caller vouches for them.
            unsafe { with_handler(*vector, *handler, || with_handlers(others, f)) }
        }
    }
}

fn main(_: &Boot) -> Result<(), Failure> {
    println!("the local APIC");
    let handlers: [(u8, Handler); 5] = [
        (LOW, record::<LOW>),
        (MIDDLE, record::<MIDDLE>),
        (MIDDLE_UPPER, record::<MIDDLE_UPPER>),
        (HIGH, record::<HIGH>),
        (TIMER, record::<TIMER>),
    ];
    // SAFETY: there is no error code, and they keep all registers.
    unsafe {
        with_handlers(&handlers, &mut || {
            enumeration()?;
            registers()?;
            self_ipi()?;
            priorities()?;
            commands()?;
            nmis()?;
            timer()?;
            halts()?;
            behind_alignment_check()
        })
    }
}
