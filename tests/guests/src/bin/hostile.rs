//! What a guest does that wants more of the CPUs than its share, and another that measures what is
//! left for it.
//!
//! One word of the command line says what it does:
//!
//! | word | |
//! |---|---|
//! | `victim` | computes for `ticks=N` ticks of the time-stamp counter; also without any word |
//! | `sleeper` | halts for `sleep=N` ticks, then does as the victim |
//! | `hole` | an instruction faults for want of memory, and is another one when it is run again |
//! | `storm-ipi` | interrupts from each CPU to each, itself included |
//! | `storm-nmi` | NMIs from each CPU to each, itself included |
//! | `storm-init` | each CPU resets and starts all others but the first |
//! | `storm-absent` | all CPUs read memory that is not there |
//! | `storm-console` | all CPUs print |
//! | `storm-events` | all CPUs turn split-lock detection on and off |
//! | `storm-halt` | all CPUs halt for a moment, again and again |
//!
//! The last eight go on for ever; the hypervisor ends them. `hole` needs two CPUs and 16 MiB.
//!
//! Who computes prints a line at its end: `longest pause N at N, ran N of N ticks`. All are ticks, `at`
//! counts from the start; it ran while from one look at the counter to the next only few passed.
//!
//! Exit codes: success; that the subject is not there, for `storm-events` where detection is not
//! offered; 0x30 to 0x32, see the constants.

#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};
use core::hint;
use core::sync::atomic::{AtomicU64, Ordering};

use guests::cpu::{self, SPLIT_LOCK_DETECT, TEST_CTRL, enable_interrupts, halt, now};
use guests::exit::{self, Failure};
use guests::smp::{self, Entry, Ipi, START_PAGES, To, cpus, msr, others, send, write};
use guests::{Boot, guest, image_end, println, trap};

guest!(main);

const FEW: Failure = Failure::new(0x30, "there is only one CPU");
const SMALL: Failure = Failure::new(0x31, "there is too little memory");
const NO_MEMORY_MAP: Failure = Failure::new(0x32, "no memory map: nothing says where memory ends");

/// Vectors.
const WAKE: u8 = 0x40;
const TIMER: u8 = 0x41;

/// LVT timer: TSC-deadline mode.
const BY_DEADLINE: u64 = 2 << 17;
/// Divide configuration: by 1.
const BY_1: u64 = 0xB;
/// End of interrupt.
const EOI: u32 = 0x80B;

/// Writes an APIC register.
fn program(register: u32, value: u64) {
    // SAFETY: all interrupts have handlers.
    unsafe { write(register, value) };
}

/// Halts until that time, interrupts off before and after.
fn sleep_until(time: u64) {
    while now() < time {
        program(msr::TSC_DEADLINE, time);
        halt();
    }
}

// ---- victim and sleeper ----

/// Computes for so many ticks, and prints how that went.
fn compute(ticks: u64) {
    /// From one look at the counter to the next fewer pass, unless the hypervisor is at work.
    const FEW_TICKS: u64 = 2000;
    let start = now();
    let (mut last, mut longest, mut at, mut ran) = (start, 0, 0, 0);
    while last - start < ticks {
        let time = now();
        let passed = time - last;
        if passed > longest {
            (longest, at) = (passed, last - start);
        }
        if passed < FEW_TICKS {
            ran += passed;
        }
        last = time;
    }
    println!("longest pause {longest} at {at}, ran {ran} of {} ticks", last - start);
}

fn sleep(ticks: u64) {
    smp::enable_apic();
    program(msr::LVT_TIMER, BY_DEADLINE | u64::from(TIMER));
    let end = now() + ticks;
    sleep_until(end);
    println!("woke up {} ticks late", now() - end);
}

// ---- hole ----

/// `mov al, [rsi]` and CPUID, as they stand in memory.
const LOAD: u16 = 0x068A;
const CPUID: u16 = 0xA20F;

/// A frame of 2 MiB full of CPUID, but for its first instruction, which changes.
const FRAME: u64 = 8 << 20;
const FRAME_BYTES: u64 = 2 << 20;
/// Where it is mapped again and again, to the end of the lower half of the address space: whoever
/// runs along there finds no end of CPUID.
const ROW: u64 = 512 << 30;
/// Where no memory is.
const NOWHERE: u64 = 0xC000_0000;
/// Ticks after which the first CPU tries again.
const TRY: u32 = 20_000;

/// A table of the page tables.
#[repr(C, align(4096))]
struct Table([AtomicU64; 512]);

static LEVEL_3: Table = Table([const { AtomicU64::new(0) }; 512]);
static LEVEL_2: Table = Table([const { AtomicU64::new(0) }; 512]);

/// The first CPU runs into the row, where the load needs a page that is not there. What the
/// hypervisor does for the one instruction is to end with it, also if it has become CPUID by then.
fn hole(boot: &Boot) -> Result<(), Failure> {
    FEW.unless(cpus() > 1)?;
    let fits = image_end() <= FRAME && FRAME + FRAME_BYTES <= boot.memory_end;
    SMALL.unless(fits && boot.memory_end <= NOWHERE)?;
    map_row();
    smp::enable_apic();
    program(msr::LVT_TIMER, TIMER.into());
    program(msr::DIVIDE, BY_1);
    // SAFETY: the handler goes on at a place of its own, with no use for what it interrupts.
    unsafe { trap::set_handler(TIMER, try_again) };
    smp::start_others(change)?;
    enable_interrupts();
    // SAFETY: it does not come back, and nothing else runs on this CPU.
    unsafe { asm!("jmp {}", sym run_row, options(noreturn)) };
}

fn map_row() {
    const TABLE: u64 = 0b111;
    const LARGE_PAGE: u64 = 1 << 7 | TABLE;
    const CPUIDS: u64 = CPUID as u64 * 0x1_0001_0001_0001;
    for word in (FRAME..FRAME + FRAME_BYTES).step_by(8) {
        // SAFETY: the guest's own memory, behind its image.
        unsafe { (word as *mut u64).write_volatile(CPUIDS) };
    }
    let root: u64;
    // SAFETY: (1) reading CR3 has no effect; (2) the runtime's tables are mapped one to one, and
    // their entries may be shared; (3) what is not present so far may be present from now on.
    let level_4 = unsafe {
        asm!("mov {}, cr3", out(reg) root, options(nomem, nostack, preserves_flags));
        &*(root as *const Table)
    };
    let fill = |entries: &[AtomicU64], value| {
        entries.iter().for_each(|entry| entry.store(value, Ordering::Release));
    };
    fill(&LEVEL_2.0, FRAME | LARGE_PAGE);
    fill(&LEVEL_3.0, &raw const LEVEL_2 as u64 | TABLE);
    fill(&level_4.0[1..256], &raw const LEVEL_3 as u64 | TABLE);
}

/// Changes the instruction for ever.
extern "C" fn change(_: usize) {
    loop {
        for instruction in [LOAD, CPUID] {
            // SAFETY: either is an instruction.
            unsafe { (FRAME as *mut u16).write_volatile(instruction) };
            (0..50).for_each(|_| hint::spin_loop());
        }
    }
}

/// Sets the timer and runs into the row.
#[unsafe(naked)]
unsafe extern "C" fn run_row() {
    naked_asm!(
        "mov ecx, {initial_count}",
        "mov eax, {ticks}",
        "xor edx, edx",
        "wrmsr",
        "mov esi, {nowhere}",
        "mov rax, {row}",
        "jmp rax",
        initial_count = const msr::INITIAL_COUNT,
        ticks = const TRY,
        nowhere = const NOWHERE,
        row = const ROW,
    )
}

/// Takes the timer's interrupt and returns to the start of [`run_row`].
#[unsafe(naked)]
unsafe extern "C" fn try_again() {
    naked_asm!(
        "mov ecx, {eoi}",
        "xor eax, eax",
        "xor edx, edx",
        "wrmsr",
        "lea rax, [rip + {run_row}]",
        "mov [rsp], rax",
        "iretq",
        eoi = const EOI,
        run_row = sym run_row,
    )
}

// ---- storms ----

/// Where no memory is, by the memory map.
static ABSENT_AT: AtomicU64 = AtomicU64::new(0);

extern "C" fn storm_ipi(_: usize) {
    smp::enable_apic();
    enable_interrupts();
    loop {
        (0..cpus()).for_each(|cpu| send(To::Cpu(cpu), Ipi::Fixed(WAKE)));
        send(To::All, Ipi::Fixed(WAKE));
    }
}

extern "C" fn storm_nmi(_: usize) {
    smp::enable_apic();
    loop {
        (0..cpus()).for_each(|cpu| send(To::Cpu(cpu), Ipi::Nmi));
        send(To::Others, Ipi::Nmi);
    }
}

extern "C" fn storm_init(own: usize) {
    smp::x2apic_mode();
    loop {
        for cpu in others(own).filter(|cpu| *cpu != 0) {
            send(To::Cpu(cpu), Ipi::Init);
            send(To::Cpu(cpu), Ipi::Startup(START_PAGES[0]));
        }
    }
}

extern "C" fn storm_absent(_: usize) {
    let at = ABSENT_AT.load(Ordering::Relaxed) as *const u64;
    loop {
        // SAFETY: mapped one to one, and nothing that a read could disturb is there.
        unsafe { at.read_volatile() };
    }
}

extern "C" fn storm_console(cpu: usize) {
    for number in 0_u64.. {
        println!("line {number} of CPU {cpu}, of which there is no last one");
    }
}

extern "C" fn storm_events(_: usize) {
    loop {
        for value in [SPLIT_LOCK_DETECT, 0] {
            // SAFETY: this guest splits no lock.
            unsafe { write(TEST_CTRL, value) };
        }
    }
}

extern "C" fn storm_halt(_: usize) {
    /// Ticks for which it halts at most.
    const MOMENT: u64 = 1000;
    smp::enable_apic();
    program(msr::LVT_TIMER, BY_DEADLINE | u64::from(TIMER));
    loop {
        sleep_until(now() + MOMENT);
    }
}

const STORMS: [(&str, Entry); 7] = [
    ("storm-ipi", storm_ipi),
    ("storm-nmi", storm_nmi),
    ("storm-init", storm_init),
    ("storm-absent", storm_absent),
    ("storm-console", storm_console),
    ("storm-events", storm_events),
    ("storm-halt", storm_halt),
];

/// Runs a storm on all CPUs.
fn storm(boot: &Boot, word: &str, entry: Entry) -> Result<(), Failure> {
    NO_MEMORY_MAP.unless(boot.memory_end != 0)?;
    ABSENT_AT.store(boot.memory_end.next_multiple_of(1 << 30), Ordering::Relaxed);
    if word == "storm-events" && cpu::offers_split_lock_detection() != Ok(true) {
        exit::exit(exit::NOT_OFFERED);
    }
    smp::start_others(entry)?;
    entry(0);
    Ok(())
}

fn main(boot: &Boot) -> Result<(), Failure> {
    /// Ticks where none are given.
    const TICKS: u64 = 3_000_000;
    if let Some((word, entry)) = STORMS.iter().find(|(word, _)| boot.has(word)) {
        return storm(boot, word, *entry);
    }
    if boot.has("hole") {
        return hole(boot);
    }
    if boot.has("sleeper") {
        sleep(boot.number("sleep").unwrap_or(TICKS));
    }
    compute(boot.number("ticks").unwrap_or(TICKS));
    Ok(())
}
