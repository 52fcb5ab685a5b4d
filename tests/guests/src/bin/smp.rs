//! Several vCPUs: how they start, IPIs and NMIs between them, halting and being woken, timers, INIT
//! and SIPI while they run, memory that is not there, and stale translations.
//!
//! Words of the command line say which tests run; without any all do, in this order:
//!
//! | word | |
//! |---|---|
//! | `start` | all CPUs start as they must, and lose no locked addition |
//! | `ipi` | interrupts from each CPU to each other, to itself, to many |
//! | `nmi` | NMIs from each CPU to each other, also to one that halts with interrupts off |
//! | `halt` | CPUs halt and wake each other: no wake-up is lost |
//! | `timer` | each CPU halts until its own timer fires |
//! | `init` | INIT stops CPUs in the middle of what they do, SIPI starts them elsewhere |
//! | `stop` | all CPUs use memory that is not there while they work with memory that is |
//! | `shootdown` | a CPU changes mappings, the others forget them when it tells them to |
//! | `end` | one CPU ends the guest while the others spin, halt, and exit all the time |
//! | `spin` | only alone: all CPUs count for ever, without exits |
//! | `contend` | only alone: all CPUs change one number that crosses cache lines, and its neighbours |
//!
//! `count=N`: that many rounds of each test.
//!
//! Exit codes: success; 0x30 to 0x47, see the constants.

#![no_std]
#![no_main]

use core::arch::asm;
use core::array;
use core::hint;
use core::sync::atomic::{AtomicU64, Ordering};

use guests::cpu::{
    self, SPLIT_LOCK_DETECT, TEST_CTRL, cpuid, cpuid_count, disable_interrupts, enable_interrupts,
    halt, now,
};
use guests::exit::{self, Failure};
use guests::random::Random;
use guests::smp::{
    self, Ipi, Job, MAX_CPUS, PATIENCE, START_PAGES, STUCK, StartState, To, arrived, cpus, meet,
    msr, others, read, send, start_state, starts, together, wait, wait_for, work, write,
};
use guests::trap::{on_interrupt, vector};
use guests::{Boot, guest, paging, println};

guest!(main);

const FEW: Failure = Failure::new(0x30, "there is only one CPU");
const NUMBER: Failure = Failure::new(0x31, "CPUID or the local APIC tells another CPU's number");
const APIC_BASE: Failure = Failure::new(0x32, "IA32_APIC_BASE is not what it must be");
const STATE: Failure = Failure::new(0x33, "a CPU does not start as it must after INIT");
const SUM: Failure = Failure::new(0x34, "locked additions are lost or double");
const IPI_LOST: Failure = Failure::new(0x35, "an IPI does not arrive");
const IPI_EXTRA: Failure = Failure::new(0x36, "an IPI arrives twice, or where it is not addressed");
const NMI_LOST: Failure = Failure::new(0x37, "an NMI does not arrive");
const NMI_EXTRA: Failure = Failure::new(0x38, "an NMI arrives twice, or where it is not addressed");
const WAKE_LOST: Failure = Failure::new(0x39, "a halted CPU is not woken");
const WAKE_EXTRA: Failure = Failure::new(0x3A, "HLT ends though nothing has arrived");
const TIMER_EARLY: Failure = Failure::new(0x3B, "a timer fires too early");
const TIMER_EXTRA: Failure = Failure::new(0x3C, "a timer fires more than once");
const INIT_IGNORED: Failure = Failure::new(0x3D, "a CPU runs on after INIT");
const INIT_REGISTERS: Failure = Failure::new(0x3E, "INIT does not reset the local APIC");
const INIT_DETECTION: Failure = Failure::new(0x3F, "MSR 0x33 is not 0 after INIT");
const NOT_SET: Failure = Failure::new(0x40, "bit 29 of MSR 0x33 cannot be set");
const RESTARTED: Failure = Failure::new(0x41, "a SIPI starts a CPU that runs");
const ABSENT: Failure = Failure::new(0x42, "memory that is not there does not read as ones");
const MEMORY: Failure = Failure::new(0x43, "memory does not hold what was written");
const STALE: Failure = Failure::new(0x44, "a CPU uses a translation that it has forgotten");
const IDLE: Failure = Failure::new(0x45, "a CPU that runs does not get on");
const NO_MEMORY_MAP: Failure = Failure::new(0x46, "no memory map: nothing says where memory ends");
const NEIGHBOUR: Failure = Failure::new(0x47, "a number beside a split one is wrong");

/// Vectors. From this one on: IPIs, by their sender.
const FROM: u8 = 0x40;
/// From this one on: one for each way to address an IPI.
const ADDRESSED: u8 = 0x50;
const WAKE: u8 = 0x60;
const TIMER: u8 = 0x61;
const CHANGED: u8 = 0x62;

/// LVT timer: masked, periodic, TSC-deadline mode.
const MASKED: u64 = 1 << 16;
const PERIODIC: u64 = 1 << 17;
const BY_DEADLINE: u64 = 2 << 17;
/// Divide configuration: by 1.
const BY_1: u64 = 0xB;

/// Rounds of the running test.
static ROUNDS: AtomicU64 = AtomicU64::new(0);

fn rounds() -> u64 {
    ROUNDS.load(Ordering::Relaxed)
}

/// One number for each CPU.
type PerCpu = [AtomicU64; MAX_CPUS];

const fn zeros() -> PerCpu {
    [const { AtomicU64::new(0) }; MAX_CPUS]
}

/// Each CPU's own counter, for others to look at.
static COUNTERS: PerCpu = zeros();

fn get(of: &PerCpu, cpu: usize) -> u64 {
    of[cpu].load(Ordering::Acquire)
}

/// Only the CPU that writes a number, or one that knows that it is not written, sets it.
fn set(of: &PerCpu, cpu: usize, value: u64) {
    of[cpu].store(value, Ordering::Release);
}

fn count(cpu: usize) {
    set(&COUNTERS, cpu, get(&COUNTERS, cpu) + 1);
}

/// Lets so many ticks pass.
fn pass(ticks: u64) {
    wait_for(ticks, || false);
}

/// Writes an APIC register.
fn program(register: u32, value: u64) {
    // SAFETY: all interrupts have handlers.
    unsafe { write(register, value) };
}

// ---- start ----

static TOTAL: AtomicU64 = AtomicU64::new(0);

/// CPU `cpu` is told its number everywhere.
fn check_number(cpu: usize) -> Result<(), Failure> {
    const BOOTSTRAP: u64 = 1 << 8;
    const X2APIC: u64 = 0xFEE0_0C00;
    let topology = cpuid_count(0xB, 1);
    let told = [cpuid(1).ebx >> 24, cpuid_count(0xB, 0).edx, topology.edx];
    NUMBER.unless(told.iter().all(|id| *id as usize == cpu) && read(msr::ID) == cpu as u64)?;
    NUMBER.unless(smp::this_cpu() == cpu && topology.ebx as usize == cpus())?;
    let bootstrap = if cpu == 0 { BOOTSTRAP } else { 0 };
    APIC_BASE.unless(read(msr::APIC_BASE) == X2APIC | bootstrap)
}

fn check_state(cpu: usize, page: u8) -> Result<(), Failure> {
    /// CR0: CD and NW, which INIT does not change, and ET.
    const CACHE: u64 = 0x6000_0000;
    const ET: u64 = 1 << 4;
    let state = start_state(cpu);
    let right = StartState { code_base: u64::from(page) << 12, cr0: ET, cr4: 0, efer: 0 };
    if right != (StartState { cr0: state.cr0 & !CACHE, ..state }) {
        println!("CPU {cpu}: {state:x?}");
        return Err(STATE);
    }
    Ok(())
}

fn start(_: &Boot) -> Result<(), Failure> {
    for cpu in others(0) {
        check_state(cpu, START_PAGES[0])?;
        NUMBER.unless(starts(cpu) == 1)?;
    }
    TOTAL.store(0, Ordering::Relaxed);
    together(add)?;
    SUM.unless(TOTAL.load(Ordering::Relaxed) == rounds() * cpus() as u64)
}

fn add(cpu: usize) -> Result<(), Failure> {
    check_number(cpu)?;
    meet()?;
    for _ in 0..rounds() {
        TOTAL.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

// ---- ipi ----

/// A way to address an IPI, and whom it reaches: (CPU, sender).
type Address = (fn(usize) -> To, fn(usize, usize) -> bool);

fn logical(cpu: usize) -> u32 {
    1 << cpu
}

const ADDRESSES: [Address; 11] = [
    (|_| To::Others, |cpu, sender| cpu != sender),
    (|_| To::All, |_, _| true),
    (|_| To::Own, |cpu, sender| cpu == sender),
    (To::Cpu, |cpu, sender| cpu == sender),
    // To everybody.
    (|_| To::Cpu(0xFFFF_FFFF), |_, _| true),
    (|_| To::Logical(0xFFFF_FFFF), |_, _| true),
    // To nobody.
    (|_| To::Cpu(0x77), |_, _| false),
    (|_| To::Logical(0x7_FFFF), |_, _| false),
    (|_| To::Logical(0xFFFF), |_, _| true),
    (|_| To::Logical(0x5555), |cpu, _| cpu % 2 == 0),
    (|sender| To::Logical(logical(sender) | 1), |cpu, sender| cpu == sender || cpu == 0),
];

fn ipi(cpu: usize) -> Result<(), Failure> {
    let from = |sender: usize| FROM + sender as u8;
    let before: [u64; MAX_CPUS] = array::from_fn(|sender| arrived(cpu, from(sender)));
    let addressed_before: [u64; ADDRESSES.len()] =
        array::from_fn(|index| arrived(cpu, ADDRESSED + index as u8));
    NUMBER.unless(read(msr::LDR) == u64::from(logical(cpu)))?;
    enable_interrupts();
    meet()?;
    // All to all, at the same time.
    for _ in 0..rounds() {
        for target in others(cpu) {
            let seen = arrived(target, from(cpu));
            send(To::Cpu(target), Ipi::Fixed(from(cpu)));
            IPI_LOST.unless(wait(|| arrived(target, from(cpu)) != seen))?;
        }
    }
    meet()?;
    for (sender, before) in before.iter().enumerate() {
        let due = if sender < cpus() && sender != cpu { rounds() } else { 0 };
        IPI_EXTRA.unless(arrived(cpu, from(sender)) - before == due)?;
    }
    // One after the other, in every way.
    for sender in 0..cpus() {
        meet()?;
        if sender == cpu {
            address_all(cpu)?;
        }
    }
    meet()?;
    disable_interrupts();
    for (index, (_, reaches)) in ADDRESSES.iter().enumerate() {
        let due = (0..cpus()).filter(|sender| reaches(cpu, *sender)).count() as u64;
        let found = arrived(cpu, ADDRESSED + index as u8) - addressed_before[index];
        if found != due {
            println!("address {index} reaches CPU {cpu} {found} times instead of {due}");
            return Err(IPI_EXTRA);
        }
    }
    Ok(())
}

fn address_all(sender: usize) -> Result<(), Failure> {
    for (index, (to, reaches)) in ADDRESSES.iter().enumerate() {
        let vector = ADDRESSED + index as u8;
        let seen: [u64; MAX_CPUS] = array::from_fn(|cpu| arrived(cpu, vector));
        send(to(sender), Ipi::Fixed(vector));
        let reached =
            || (0..cpus()).all(|cpu| !reaches(cpu, sender) || arrived(cpu, vector) > seen[cpu]);
        if !wait(reached) {
            println!("address {index}, sender {sender}");
            return Err(IPI_LOST);
        }
    }
    let seen = arrived(sender, FROM + sender as u8);
    program(msr::SELF_IPI, (FROM + sender as u8).into());
    IPI_LOST.unless(wait(|| arrived(sender, FROM + sender as u8) == seen + 1))
}

// ---- nmi ----

fn nmi(cpu: usize) -> Result<(), Failure> {
    let of = |cpu| arrived(cpu, vector::NMI);
    let before = of(cpu);
    for sender in 0..cpus() {
        meet()?;
        if sender != cpu {
            continue;
        }
        for _ in 0..rounds() {
            for target in others(cpu) {
                let seen = of(target);
                send(To::Cpu(target), Ipi::Nmi);
                NMI_LOST.unless(wait(|| of(target) != seen))?;
            }
        }
        let seen: [u64; MAX_CPUS] = array::from_fn(of);
        send(To::Others, Ipi::Nmi);
        NMI_LOST.unless(wait(|| others(cpu).all(|target| of(target) != seen[target])))?;
        send(To::Own, Ipi::Nmi);
        NMI_LOST.unless(wait(|| of(cpu) != seen[cpu]))?;
    }
    meet()?;
    let due = rounds() * (cpus() as u64 - 1) + cpus() as u64;
    NMI_EXTRA.unless(of(cpu) - before == due)?;
    nmi_wakes(cpu)
}

/// Who is about to halt, and who goes on.
static READY: PerCpu = zeros();
static AWAKE: PerCpu = zeros();

/// CPUs that halt with interrupts off, and the first one, which wakes them by NMI. It goes on until it
/// hits: nothing keeps an NMI from arriving right before HLT.
fn nmi_wakes(cpu: usize) -> Result<(), Failure> {
    /// Ticks between two NMIs.
    const BETWEEN: u64 = 100_000;
    let before: [u64; MAX_CPUS] = array::from_fn(|cpu| get(&AWAKE, cpu));
    meet()?;
    let mut random = Random::new(1, 0);
    for round in 1..=rounds() {
        if cpu != 0 {
            set(&READY, cpu, before[cpu] + round);
            // SAFETY: NMIs have a handler.
            unsafe { asm!("hlt", options(nostack)) };
            set(&AWAKE, cpu, before[cpu] + round);
            continue;
        }
        for target in others(0) {
            let next = before[target] + round;
            WAKE_LOST.unless(wait(|| get(&READY, target) >= next))?;
            pass(random.below(3000));
            let woken = || get(&AWAKE, target) >= next;
            WAKE_LOST.unless(wait(|| {
                send(To::Cpu(target), Ipi::Nmi);
                wait_for(BETWEEN, woken)
            }))?;
        }
    }
    meet()
}

// ---- halt ----

/// The first CPU wakes the others, then they wake each other.
fn halts(cpu: usize) -> Result<(), Failure> {
    let before: [u64; MAX_CPUS] = array::from_fn(|cpu| arrived(cpu, WAKE));
    meet()?;
    if cpu == 0 {
        wake_all(&before)?;
    } else {
        sleep(cpu, before[cpu], |_| ())?;
    }
    meet()?;

    let before: [u64; MAX_CPUS] = array::from_fn(|cpu| arrived(cpu, WAKE));
    meet()?;
    match partner(cpu) {
        Some(partner) => {
            let starts = cpu < partner;
            let wake = || send(To::Cpu(partner), Ipi::Fixed(WAKE));
            if starts {
                wake();
            }
            sleep(cpu, before[cpu], |round| {
                if !starts || round < rounds() {
                    wake();
                }
            })?;
        }
        // Nobody who has a partner could tell.
        None => {
            let mut sleepers = (0..cpus()).filter(|cpu| partner(*cpu).is_some());
            let done = |cpu: usize| arrived(cpu, WAKE) == before[cpu] + rounds();
            WAKE_LOST.unless(sleepers.all(|cpu| wait(|| done(cpu))))?;
        }
    }
    meet()
}

/// Whom a CPU wakes, and is woken by. The first one has a partner only if there are two.
fn partner(cpu: usize) -> Option<usize> {
    let partner = match (cpus(), cpu) {
        (2, _) => 1 - cpu,
        (_, 0) => return None,
        (_, odd) if odd % 2 == 1 => odd + 1,
        (_, even) => even - 1,
    };
    (partner < cpus()).then_some(partner)
}

/// Halts as often as there are rounds, each time until an IPI has arrived, and calls `then`.
fn sleep(cpu: usize, before: u64, then: impl Fn(u64)) -> Result<(), Failure> {
    for round in 1..=rounds() {
        set(&READY, cpu, before + round);
        // Interrupts are off: what arrives from here on ends HLT.
        if arrived(cpu, WAKE) < before + round {
            halt();
        }
        WAKE_EXTRA.unless(arrived(cpu, WAKE) == before + round)?;
        then(round);
    }
    Ok(())
}

fn wake_all(before: &[u64; MAX_CPUS]) -> Result<(), Failure> {
    let mut random = Random::new(2, 0);
    for round in 1..=rounds() {
        for target in others(0) {
            WAKE_LOST.unless(wait(|| get(&READY, target) == before[target] + round))?;
            pass(random.below(1000));
            send(To::Cpu(target), Ipi::Fixed(WAKE));
        }
    }
    WAKE_LOST.unless(wait(|| others(0).all(|cpu| arrived(cpu, WAKE) == before[cpu] + rounds())))
}

// ---- timer ----

/// Ticks until a timer fires, about.
const TIME: u64 = 20_000;

fn timer(cpu: usize) -> Result<(), Failure> {
    const DEADLINE_OFFERED: u32 = 1 << 24;
    let by_deadline = cpuid(1).ecx & DEADLINE_OFFERED != 0;
    let mut random = Random::new(3, cpu as u64);
    program(msr::DIVIDE, BY_1);
    meet()?;
    for round in 0..2 * rounds() {
        let before = arrived(cpu, TIMER);
        let ticks = TIME + random.below(TIME);
        let start = now();
        if by_deadline && round % 2 == 0 {
            program(msr::LVT_TIMER, BY_DEADLINE | u64::from(TIMER));
            program(msr::TSC_DEADLINE, start + ticks);
        } else {
            program(msr::LVT_TIMER, TIMER.into());
            program(msr::INITIAL_COUNT, ticks);
        }
        halt();
        let end = now();
        TIMER_EXTRA.unless(arrived(cpu, TIMER) == before + 1)?;
        // Who has no deadline has a count that runs at a rate of its own.
        TIMER_EARLY.unless(!by_deadline || end - start >= ticks)?;
    }
    program(msr::LVT_TIMER, MASKED);
    let before = arrived(cpu, TIMER);
    enable_interrupts();
    pass(2 * TIME);
    disable_interrupts();
    TIMER_EXTRA.unless(arrived(cpu, TIMER) == before)
}

// ---- init ----

/// What a CPU does when INIT stops it.
static DOES: PerCpu = zeros();
const WAYS: u64 = 5;
const HALTS_FOR_GOOD: u64 = 2;

fn init(boot: &Boot) -> Result<(), Failure> {
    /// Ticks for which a stopped CPU is watched.
    const STILL: u64 = 50_000;
    ABSENT_AT.store(absent(boot)?, Ordering::Relaxed);
    let mut random = Random::new(4, 0);
    for round in 0..rounds() {
        for target in others(0) {
            set(&DOES, target, round % WAYS);
            let [page, other_page] = [0, 1].map(|index| START_PAGES[(round as usize + index) % 2]);
            let counted = get(&COUNTERS, target);
            smp::start(target, page, counts)?;
            check_state(target, page)?;
            let started = starts(target);
            IDLE.unless(wait(|| get(&COUNTERS, target) > counted + 1))?;
            send(To::Cpu(target), Ipi::Startup(other_page));
            let counted = get(&COUNTERS, target);
            let goes_on = || get(&COUNTERS, target) > counted;
            IDLE.unless(round % WAYS == HALTS_FOR_GOOD || wait(goes_on))?;
            pass(random.below(10_000));

            send(To::Cpu(target), Ipi::Init);
            let mut counted = get(&COUNTERS, target);
            INIT_IGNORED.unless(wait(|| {
                let before = counted;
                pass(STILL);
                counted = get(&COUNTERS, target);
                counted == before
            }))?;
            pass(2 * STILL);
            INIT_IGNORED.unless(get(&COUNTERS, target) == counted)?;
            RESTARTED.unless(starts(target) == started)?;
        }
    }
    smp::start_others(work)
}

/// Where there is no memory.
static ABSENT_AT: AtomicU64 = AtomicU64::new(0);

/// Reads eight bytes.
fn load(address: u64) -> u64 {
    // SAFETY: all addresses below 4 GiB and the small pages are mapped, and any bytes are a number.
    unsafe { (address as *const u64).read_volatile() }
}

/// What a CPU that was stopped by INIT runs: checks that it was reset, and counts.
extern "C" fn counts(cpu: usize) {
    if let Err(failure) = check_reset() {
        exit::fail(failure);
    }
    // Something that must not arrive after the next INIT.
    program(msr::DIVIDE, BY_1);
    program(msr::LVT_TIMER, TIMER.into());
    program(msr::INITIAL_COUNT, 3 * TIME);
    send(To::Own, Ipi::Fixed(WAKE));
    let way = get(&DOES, cpu);
    loop {
        count(cpu);
        match way {
            0 => (),
            1 => {
                cpuid(0);
            }
            HALTS_FOR_GOOD => {
                // Interrupts stay pending and do not end HLT. Only the first one is for nothing.
                let counted = get(&COUNTERS, cpu);
                while get(&COUNTERS, cpu) < counted + 3 {
                    count(cpu);
                }
                // SAFETY: only INIT ends it.
                unsafe { asm!("hlt", options(nostack)) };
            }
            3 => {
                program(msr::INITIAL_COUNT, TIME / 4);
                halt();
            }
            _ => {
                load(ABSENT_AT.load(Ordering::Relaxed));
            }
        }
    }
}

/// Checks what INIT has reset, and lets interrupts in again.
fn check_reset() -> Result<(), Failure> {
    const SVR: u64 = 0xFF;
    smp::x2apic_mode();
    let registers = [
        (msr::SVR, SVR),
        (msr::LVT_TIMER, MASKED),
        (msr::INITIAL_COUNT, 0),
        (msr::DIVIDE, 0),
        (msr::IRR + u32::from(TIMER / 32), 0),
    ];
    for (register, value) in registers {
        let found = read(register);
        if found != value {
            println!("{register:#x}: {found:#x}");
            return Err(INIT_REGISTERS);
        }
    }
    smp::enable_apic();
    if cpu::offers_split_lock_detection() == Ok(true) {
        INIT_DETECTION.unless(read(TEST_CTRL) == 0)?;
        // SAFETY: this guest splits no lock.
        unsafe { write(TEST_CTRL, SPLIT_LOCK_DETECT) };
        NOT_SET.unless(read(TEST_CTRL) == SPLIT_LOCK_DETECT)?;
    }
    Ok(())
}

// ---- stop ----

const PAGE: u64 = 4096;

/// A page that is not memory, with another one behind it.
fn absent(boot: &Boot) -> Result<u64, Failure> {
    NO_MEMORY_MAP.unless(boot.memory_end != 0)?;
    Ok(boot.memory_end.next_multiple_of(PAGE).max(0x4000_0000))
}

/// How many pages that are not memory are used, by all CPUs.
const ABSENT_PAGES: u64 = 4;

/// Memory of each CPU's own.
#[repr(C, align(4096))]
struct Pages([[AtomicU64; 512]; MAX_CPUS]);

static OWN: Pages = Pages([const { [const { AtomicU64::new(0) }; 512] }; MAX_CPUS]);

fn stop(boot: &Boot) -> Result<(), Failure> {
    ABSENT_AT.store(absent(boot)?, Ordering::Relaxed);
    TOTAL.store(0, Ordering::Relaxed);
    together(use_absent)?;
    SUM.unless(TOTAL.load(Ordering::Relaxed) == rounds() * cpus() as u64)
}

fn use_absent(cpu: usize) -> Result<(), Failure> {
    let mut random = Random::new(5, cpu as u64);
    let own = &OWN.0[cpu];
    let mut value = random.next();
    own.iter().for_each(|word| word.store(value, Ordering::Relaxed));
    meet()?;
    for _ in 0..rounds() {
        let page = ABSENT_AT.load(Ordering::Relaxed) + PAGE * random.below(ABSENT_PAGES);
        if !absent_access(page, random.below(6), random.next()) {
            println!("CPU {cpu}, at {page:#x}");
            return Err(ABSENT);
        }
        TOTAL.fetch_add(1, Ordering::Relaxed);
        // Some words of its own memory, each time others.
        let first = random.below(512 - 16) as usize;
        let next = value.wrapping_add(1);
        for word in &own[first..first + 16] {
            MEMORY.unless(word.swap(next, Ordering::Relaxed) == value)?;
        }
        for word in &own[first..first + 16] {
            MEMORY.unless(word.swap(value, Ordering::Relaxed) == next)?;
        }
        if random.one_in(16) {
            value = random.next();
            own.iter().for_each(|word| word.store(value, Ordering::Relaxed));
        }
    }
    let right = own.iter().all(|word| word.load(Ordering::Relaxed) == value);
    MEMORY.unless(right)
}

/// Writes `value` to a page that is not memory, and reads; whether that gives all ones.
fn absent_access(page: u64, way: u64, value: u64) -> bool {
    let mut read = [u64::MAX; 2];
    let [first, second] = &mut read;
    // SAFETY: mapped, no memory of the guest is there, and the second half of the page is left alone.
    unsafe {
        match way {
            0 => asm!("mov [{at}], {value}", "mov {first}, [{at}]", at = in(reg) page,
                value = in(reg) value, first = out(reg) *first, options(nostack)),
            1 => asm!("mov [{at} + 24], {value:l}", "mov {first:l}, [{at} + 24]",
                at = in(reg) page, value = in(reg) value, first = inout(reg) *first,
                options(nostack)),
            2 => asm!("mov {first:e}, [{at} + 36]", "not {first:e}", "not {first}",
                at = in(reg) page, first = out(reg) *first, options(nostack)),
            // Locked, aligned.
            3 => asm!("xchg [{at} + 8], {value}", at = in(reg) page,
                value = inout(reg) value => *first, options(nostack)),
            4 => asm!("movq {x}, {value}", "movups [{at} + 16], {x}", "movups {x}, [{at} + 16]",
                "movq {first}, {x}", "psrldq {x}, 8", "movq {second}, {x}", at = in(reg) page,
                value = in(reg) value, first = out(reg) *first, second = out(reg) *second,
                x = out(xmm_reg) _, options(nostack)),
            // Across two pages.
            _ => asm!("mov [{at} + 4093], {value}", "mov {first}, [{at} + 4093]",
                at = in(reg) page, value = in(reg) value, first = out(reg) *first,
                options(nostack)),
        }
    }
    read == [u64::MAX; 2]
}

// ---- shootdown ----

/// Pages whose mapping changes, in turn.
const CHANGING: usize = 16;
/// Frames that they show, in turn; each holds its number.
const FRAMES: u64 = 64;

/// How many changes there were, and the page of the last one.
static CHANGES: AtomicU64 = AtomicU64::new(0);
/// How many changes each CPU knows of: it has forgotten what was before.
static KNOWN: PerCpu = zeros();

#[repr(C, align(4096))]
struct Frames([[AtomicU64; 512]; FRAMES as usize]);

static FRAME: Frames = Frames([const { [const { AtomicU64::new(0) }; 512] }; FRAMES as usize]);

/// The page that a change is of.
fn changed(change: u64) -> usize {
    change as usize % CHANGING
}

fn show(change: u64) {
    let frame = &FRAME.0[(change % FRAMES) as usize];
    paging::show(changed(change), frame.as_ptr() as u64);
}

/// Forgets the page that changed, on this CPU.
fn forget() {
    let cpu = smp::this_cpu();
    let change = CHANGES.load(Ordering::Acquire);
    paging::forget(paging::small_page(changed(change)));
    set(&KNOWN, cpu, change);
}

fn shootdown(_: &Boot) -> Result<(), Failure> {
    for (number, frame) in FRAME.0.iter().enumerate() {
        frame[0].store(number as u64, Ordering::Relaxed);
    }
    for change in 0..CHANGING as u64 {
        show(change);
    }
    for cpu in 0..cpus() {
        set(&KNOWN, cpu, CHANGING as u64 - 1);
    }
    CHANGES.store(CHANGING as u64 - 1, Ordering::Release);
    on_interrupt(CHANGED, forget);
    together(use_changing)
}

fn use_changing(cpu: usize) -> Result<(), Failure> {
    let last = CHANGING as u64 - 1 + rounds() * cpus() as u64;
    let mut random = Random::new(6, cpu as u64);
    meet()?;
    enable_interrupts();
    let (mut seen, mut since) = (0, now());
    loop {
        let known = get(&KNOWN, cpu);
        if known >= last {
            break;
        }
        if known != seen {
            (seen, since) = (known, now());
            (0..CHANGING).try_for_each(|page| use_page(cpu, page))?;
        }
        STUCK.unless(now().wrapping_sub(since) < PATIENCE)?;
        // Each CPU has its turns to change.
        let next = known + 1;
        let turn = next % cpus() as u64 == cpu as u64;
        if turn && (0..cpus()).all(|cpu| get(&KNOWN, cpu) == known) {
            disable_interrupts();
            show(next);
            CHANGES.store(next, Ordering::Release);
            forget();
            send(To::Others, Ipi::Fixed(CHANGED));
            enable_interrupts();
        }
        use_page(cpu, random.below(CHANGING as u64) as usize)?;
        hint::spin_loop();
    }
    disable_interrupts();
    meet()
}

/// Reads a page, which must show what this CPU knows, or the change that is going on.
fn use_page(cpu: usize, page: usize) -> Result<(), Failure> {
    let known = get(&KNOWN, cpu);
    let found = load(paging::small_page(page) as u64);
    if get(&KNOWN, cpu) != known {
        return Ok(());
    }
    let latest = known - (known - page as u64) % CHANGING as u64;
    let going_on = known + 1;
    let right = found == latest % FRAMES || changed(going_on) == page && found == going_on % FRAMES;
    if !right {
        println!("CPU {cpu}, page {page}, change {known}: frame {found}");
        return Err(STALE);
    }
    Ok(())
}

// ---- end and spin ----

fn end(boot: &Boot) -> Result<(), Failure> {
    ABSENT_AT.store(absent(boot)?, Ordering::Relaxed);
    together(end_all)
}

/// The last CPU ends the guest when all others do what they do.
fn end_all(cpu: usize) -> Result<(), Failure> {
    if cpu == cpus() - 1 {
        let before: [u64; MAX_CPUS] = array::from_fn(|cpu| get(&COUNTERS, cpu));
        meet()?;
        let busy = (0..cpu).all(|other| wait(|| get(&COUNTERS, other) > before[other] + 2));
        IDLE.unless(busy)?;
        println!("ok");
        exit::exit(exit::SUCCESS)
    }
    let way = cpu % 5;
    if way == 3 {
        // Its IPI ends HLT at once, but for Bochs' first CPU: there VM exits of the others count as
        // instructions, and the IPI may come between STI and HLT.
        program(msr::DIVIDE, BY_1);
        program(msr::LVT_TIMER, PERIODIC | u64::from(TIMER));
        program(msr::INITIAL_COUNT, TIME);
    }
    meet()?;
    loop {
        count(cpu);
        match way {
            0 => hint::spin_loop(),
            1 => {
                cpuid(0);
            }
            2 => {
                load(ABSENT_AT.load(Ordering::Relaxed));
            }
            3 => {
                send(To::Own, Ipi::Fixed(WAKE));
                halt();
            }
            _ => {
                count(cpu);
                count(cpu);
                // SAFETY: nothing ends it but the end of all.
                unsafe { asm!("cli", "hlt", options(nostack)) };
            }
        }
    }
}

/// Counts for ever.
extern "C" fn spin(cpu: usize) {
    loop {
        count(cpu);
    }
}

// ---- contend ----

/// Two cache lines. A number lies across them, each CPU has one of its own beside it.
#[repr(C, align(64))]
struct Lines([AtomicU64; 16]);

static LINES: Lines = Lines([const { AtomicU64::new(0) }; 16]);
/// How far the split number is from the lines' start, in bytes.
const SPLIT: usize = 60;
/// The words of [`LINES`] that the split number touches lie between these of CPUs 0 to 6, and 7 to 13.
const OWN_BELOW: usize = 7;

/// The number of this CPU beside the split one.
fn neighbour(cpu: usize) -> &'static AtomicU64 {
    &LINES.0[if cpu < OWN_BELOW { cpu } else { cpu + 2 }]
}

/// Adds 1 to the split number by another instruction each time.
fn add_split(round: u64) {
    let number = LINES.0.as_ptr().cast::<u8>().wrapping_add(SPLIT);
    // SAFETY: the operand lies within LINES, whose words are atomic to the compiler; what the other
    // CPUs do to it is locked as well.
    unsafe {
        match round % 3 {
            0 => asm!("lock add qword ptr [{}], 1", in(reg) number, options(nostack)),
            1 => asm!("lock xadd qword ptr [{}], {}", in(reg) number, inout(reg) 1u64 => _,
                      options(nostack)),
            _ => asm!(
                "mov rax, [{number}]",
                "2: lea {next}, [rax + 1]",
                "lock cmpxchg [{number}], {next}",
                "jne 2b",
                number = in(reg) number,
                next = out(reg) _,
                out("rax") _,
                options(nostack)
            ),
        }
    }
}

fn change(cpu: usize) -> Result<(), Failure> {
    meet()?;
    for round in 0..rounds() {
        add_split(round);
        neighbour(cpu).fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn contend() -> Result<(), Failure> {
    together(change)?;
    let number = LINES.0.as_ptr().cast::<u8>().wrapping_add(SPLIT).cast::<u64>();
    // SAFETY: within LINES; the others are done.
    let sum = unsafe { number.read_unaligned() };
    SUM.unless(sum == rounds() * cpus() as u64)?;
    let right = |cpu| neighbour(cpu).load(Ordering::Relaxed) == rounds();
    NEIGHBOUR.unless((0..cpus()).all(right))
}

/// A test: its word, how it is run, rounds if none are given.
type Test = (&'static str, fn(&Boot) -> Result<(), Failure>, u64);

fn all<const TEST: usize>(_: &Boot) -> Result<(), Failure> {
    const JOBS: [Job; 4] = [ipi, nmi, halts, timer];
    together(JOBS[TEST])
}

const TESTS: [Test; 9] = [
    ("start", start, 1000),
    ("ipi", all::<0>, 20),
    ("nmi", all::<1>, 20),
    ("halt", all::<2>, 500),
    ("timer", all::<3>, 10),
    ("init", init, 10),
    ("stop", stop, 500),
    ("shootdown", shootdown, 50),
    ("end", end, 1),
];

fn main(boot: &Boot) -> Result<(), Failure> {
    println!("{} CPUs", cpus());
    if boot.has("spin") {
        smp::start_others(spin)?;
        spin(0);
    }
    FEW.unless(cpus() > 1)?;
    smp::enable_apic();
    smp::start_others(work)?;
    if boot.has("contend") {
        ROUNDS.store(boot.number("count").unwrap_or(100), Ordering::Relaxed);
        return contend();
    }
    let any = TESTS.iter().any(|(word, ..)| boot.has(word));
    for (word, test, rounds) in TESTS {
        if any && !boot.has(word) {
            continue;
        }
        println!("{word}");
        ROUNDS.store(boot.number("count").unwrap_or(rounds), Ordering::Relaxed);
        test(boot)?;
    }
    Ok(())
}
